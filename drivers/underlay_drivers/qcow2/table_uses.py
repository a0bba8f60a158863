"""Where entries of tables lead, and how often: so that each is looked at once. With numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

from underlay.errors import CorruptImageError
from underlay.limits import Limits
from underlay.time_limit import check_time
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.references import Clusters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay_drivers.qcow2.bulk import Words

__all__ = ["TableUses", "hosts_of", "overlaps", "words_in_use"]

#: Numbers, be they words or clusters, that are looked at together.
_WINDOW: Final = 8192
#: Tables that are sorted at once, at least.
_AT_ONCE: Final = 1 << 18
#: Memory for one table: where it lies, and how often it is used.
_REMEMBERED_BYTES: Final = 16


def overlaps(spans: Mapping[tuple[int, int], int]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """In how many of some spans of numbers, which may overlap, each number is.

    ``spans`` go from their first number to before their end, and there are so many of each. Of each
    piece: its first number, and for each of its numbers the uses, which may be 0 inside.
    """
    ends = np.array(list(spans), np.int64).reshape(-1, 2)
    uses = np.fromiter(spans.values(), np.int64, len(spans))
    edges, places = np.unique(ends, return_inverse=True)
    changes = np.bincount(places.reshape(-1), np.stack((uses, -uses), axis=1).reshape(-1))
    times = np.cumsum(changes.astype(np.int64))
    at, end = (int(edges[0]), int(edges[-1])) if len(edges) else (0, 0)
    while at < end:
        first = int(np.searchsorted(edges, at, "right")) - 1
        if not times[first]:
            at = int(edges[first + 1])
            continue
        until = min(at + _WINDOW, end)
        last = int(np.searchsorted(edges, until, "left"))
        bounds = np.clip(edges[first : last + 1], at, until)
        piece = np.repeat(times[first:last], bounds[1:] - bounds[:-1])
        yield at, piece[: int(np.flatnonzero(piece)[-1]) + 1]
        at = until


def words_in_use(
    tables: Mapping[tuple[int, int], int], *, end: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Where words of tables lie, and in how many tables each word is.

    ``tables`` are host offsets, of whole words, and bytes, with how often there is such a table;
    what lies at ``end`` and beyond is left out. Of each piece: its host offset, and its uses.
    """
    spans: Counter[tuple[int, int]] = Counter()
    for (offset, length), times in tables.items():
        if offset < end:
            spans[offset // 8, min(offset + length, end) // 8] += times
    for first, uses in overlaps(spans):
        check_time()
        yield first * 8, uses


def hosts_of(entries: Words) -> NDArray[np.int64]:
    """The host offsets that entries lead to, be they of L1, L2 or bitmap tables."""
    return (entries & np.uint64(layout.HOST_OFFSET)).astype(np.int64)


class TableUses:
    """How many entries lead to each table; by the tables' host offsets, in order."""

    __slots__ = ("_clusters", "_hosts", "_limits", "_name", "_new", "_times", "_waiting")

    def __init__(self, clusters: int, limits: Limits, *, name: str) -> None:
        """``clusters`` are how many the file has; ``name`` is the image's, for people."""
        self._clusters = clusters
        self._limits = limits
        self._name = name
        self._hosts: Clusters = np.empty(0, np.int64)
        self._times: NDArray[np.int64] = np.empty(0, np.int64)
        self._new: list[tuple[Clusters, NDArray[np.int64]]] = []
        self._waiting = 0

    def add(self, hosts: Clusters, times: NDArray[np.int64]) -> None:
        """So often, an entry leads there.

        Raises:
            LimitExceededError: there are more tables than ``limits.metadata`` can remember.
            CorruptImageError: there are so many that most of them overlap.
        """
        self._new.append(_sum(hosts, times))
        self._waiting += len(self._new[-1][0])
        if self._waiting > max(len(self._hosts), _AT_ONCE):
            self._settle()

    @property
    def hosts(self) -> Clusters:
        """Where the tables lie."""
        self._settle()
        return self._hosts

    def of(self, hosts: Clusters) -> NDArray[np.int64]:
        """How many entries lead to each of these."""
        self._settle()
        places = np.searchsorted(self._hosts, hosts)
        times = np.zeros(len(hosts), np.int64)
        inside = np.flatnonzero(places < len(self._hosts))
        known = inside[self._hosts[places[inside]] == hosts[inside]]
        times[known] = self._times[places[known]]
        return times

    def _settle(self) -> None:
        if not self._new:
            return
        hosts, times = zip((self._hosts, self._times), *self._new, strict=True)
        self._new, self._waiting = [], 0
        self._hosts, self._times = _sum(np.concatenate(hosts), np.concatenate(times))
        # Some that start inside a cluster are looked at, as QEMU does, though nobody can use them.
        # But a few MiB hold so many that to read each of them would take hours.
        if len(self._hosts) > 2 * self._clusters:
            raise CorruptImageError(
                f"'{self._name}': more than {2 * self._clusters} L2 tables lie in its "
                f"{self._clusters} clusters, and so overlap; it is too damaged to be checked",
                field="L1 table",
                value=len(self._hosts),
            )
        size = len(self._hosts) * _REMEMBERED_BYTES
        what = f"'{self._name}': the memory for counting its L2 tables"
        self._limits.check("metadata", size, what=what)


def _sum(hosts: Clusters, times: NDArray[np.int64]) -> tuple[Clusters, NDArray[np.int64]]:
    once, places = np.unique(hosts, return_inverse=True)
    return once, np.bincount(places, times, minlength=len(once)).astype(np.int64)
