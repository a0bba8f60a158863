"""How often each host cluster is referenced; and reference counts as they are stored. With numpy.

One byte a cluster is enough for nearly every image, so that is what the counts begin with: 16 MiB
for 1 TiB. They become wider where a cluster needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from underlay.limits import Limits

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Clusters",
    "Counts",
    "References",
    "cannot_overflow",
    "pack_counts",
    "unpack_counts",
]

#: Numbers of host clusters.
Clusters: TypeAlias = "NDArray[np.int64]"
#: Reference counts of consecutive clusters, of whatever width.
Counts: TypeAlias = "NDArray[Any]"
#: How many references there are: to each of some clusters, or to every one.
Times: TypeAlias = "NDArray[np.int64] | int"

_WIDTHS: Final = (np.uint8, np.uint16, np.uint32, np.uint64)
#: Clusters counted by ``bincount`` rather than by sorting: the span of numbers a cluster.
_DENSE: Final = 16
#: Clusters that are sorted or looked through at a time: what that takes stays below 64 MiB.
_AT_ONCE: Final = 1 << 18


class References:
    """Counts of references to host clusters, none above what the image's refcounts can hold."""

    __slots__ = ("_fits", "_limits", "_name", "_overflow", "counts", "most", "size")

    def __init__(
        self,
        clusters: int,
        *,
        refcount_bits: int,
        overflow: Callable[[Clusters, NDArray[np.int64]], None],
        limits: Limits,
        name: str,
    ) -> None:
        """``overflow`` is told of clusters, and how many references to each are too many.

        Raises:
            LimitExceededError: the counts would take more memory than ``limits.metadata``; the
                message speaks of ``name``. Counting raises it too, as counts become wider.
        """
        self._limits = limits
        self._name = name
        self._check_memory(clusters)
        # One more than there are: compressed data may reach past a file that ends in mid-cluster.
        self.counts: Counts = np.zeros(clusters + 1, np.uint8)
        #: Clusters that are inside the file, or referenced.
        self.size = clusters
        #: What a refcount can say.
        self.most = (1 << refcount_bits) - 1
        #: The highest count that fits as things are.
        self._fits = min(self.most, 0xFF)
        self._overflow = overflow

    def add_run(self, first: int, count: int, times: int = 1) -> None:
        """A reference, or that many, to each of ``count`` consecutive clusters."""
        self.size = max(self.size, first + count)
        part = self.counts[first : first + count]
        if int(part.max()) + times <= self._fits:
            part += times
        else:
            self._add(first, part, times)

    def add_each(self, first: int, times: NDArray[np.int64]) -> None:
        """References to consecutive clusters, to each so many."""
        self.size = max(self.size, first + len(times))
        self._add(first, self.counts[first : first + len(times)], times)

    def add(self, clusters: Clusters, times: Times = 1) -> None:
        """References, so many to each of these clusters, which may be in any order and repeat."""
        for at in range(0, len(clusters), _AT_ONCE):
            end = at + _AT_ONCE
            some = times if isinstance(times, int) else times[at:end]
            self._add_some(clusters[at:end], some)

    def _add_some(self, clusters: Clusters, times: Times) -> None:
        low, high = int(clusters.min()), int(clusters.max())
        self.size = max(self.size, high + 1)
        if (
            isinstance(times, int)
            and high - low + 1 == len(clusters)
            and bool((np.diff(clusters) == 1).all())
        ):
            self.add_run(low, len(clusters), times)
        elif high - low < _DENSE * len(clusters):
            self._add(low, self.counts[low : high + 1], _totals(clusters - low, times))
        else:
            numbers, places = np.unique(clusters, return_inverse=True)
            self._add_scattered(numbers, _totals(places, times))

    def at(self, cluster: int) -> int:
        """The count of one cluster."""
        return int(self.counts[cluster]) if cluster < len(self.counts) else 0

    def end(self) -> int:
        """The first cluster behind all that are referenced."""
        for end in range(len(self.counts), 0, -_AT_ONCE):
            start = max(end - _AT_ONCE, 0)
            used = np.flatnonzero(self.counts[start:end])
            if len(used):
                return start + int(used[-1]) + 1
        return 0

    def _add(self, first: int, part: Counts, times: Times) -> None:
        highest = int(part.max()) + (times if isinstance(times, int) else int(times.max()))
        if highest <= self._fits:
            part += np.asarray(times, part.dtype)
            return
        wanted = part.astype(np.uint64) + np.asarray(times, np.uint64)
        self._store(slice(first, first + len(part)), wanted, first + np.arange(len(part)))

    def _add_scattered(self, numbers: Clusters, times: NDArray[np.int64]) -> None:
        wanted = self.counts[numbers].astype(np.uint64) + times.astype(np.uint64)
        self._store(numbers, wanted, numbers)

    def _store(self, where: Any, wanted: NDArray[np.uint64], numbers: Clusters) -> None:
        excess = wanted > self.most
        if excess.any():
            times = (wanted[excess] - np.uint64(self.most)).astype(np.int64)
            self._overflow(numbers[excess], times)
            wanted = np.minimum(wanted, np.uint64(self.most))
        self.make_room(int(wanted.max()))
        self.counts[where] = wanted.astype(self.counts.dtype)

    def make_room(self, highest: int) -> None:
        """Let a count be as high as this."""
        for width in _WIDTHS:
            if highest <= int(np.iinfo(width).max):
                if np.iinfo(width).max > np.iinfo(self.counts.dtype).max:
                    self._check_memory(self.size * np.dtype(width).itemsize)
                    self.counts = self.counts.astype(width)
                    self._fits = min(self.most, int(np.iinfo(width).max))
                return

    def _check_memory(self, size: int) -> None:
        what = f"'{self._name}': the memory for counting its clusters"
        self._limits.check("metadata", size, what=what)


def cannot_overflow(clusters: Clusters, _: NDArray[np.int64]) -> None:
    """For counts that are known to fit."""
    raise AssertionError(f"the clusters {clusters.tolist()} are counted too often")


def _totals(places: NDArray[np.intp], times: Times) -> NDArray[np.int64]:
    """How many references there are to each place."""
    if isinstance(times, int):
        return np.bincount(places) * times
    return np.bincount(places, times).astype(np.int64)


def unpack_counts(data: bytes | bytearray | memoryview, bits: int) -> Counts:
    """The reference counts in refcount blocks, in the machine's order."""
    if bits >= 8:  # noqa: PLR2004 (bits in a byte)
        return np.frombuffer(data, f">u{bits // 8}")
    packed = np.frombuffer(data, np.uint8)
    fields = 8 // bits
    counts = np.empty((len(packed), fields), np.uint8)
    for field in range(fields):
        # Bit 0 begins the first field.
        counts[:, field] = packed >> (field * bits) & ((1 << bits) - 1)
    return counts.reshape(-1)


def pack_counts(counts: Counts, bits: int) -> bytes:
    """Reference counts as blocks hold them; each fits into ``bits``."""
    if bits >= 8:  # noqa: PLR2004
        return counts.astype(f">u{bits // 8}").tobytes()
    fields = counts.astype(np.uint8).reshape(-1, 8 // bits)
    packed = np.zeros(len(fields), np.uint8)
    for field in range(8 // bits):
        packed |= fields[:, field] << np.uint8(field * bits)
    return packed.tobytes()
