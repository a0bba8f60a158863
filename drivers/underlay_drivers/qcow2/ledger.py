"""The book of references that a check keeps: regions of host bytes, counted by clusters."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.findings import Report
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.references import Clusters, References
from underlay_drivers.qcow2.table_uses import overlaps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay.handle import StorageHandle
    from underlay.limits import Limits

__all__ = ["Ledger"]

_ADVICE: Final = (
    "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean "
    "copy if the image cannot be opened for writing"
)


def _length_in_sectors(size: int) -> int:
    """A file's length as QEMU sees it: rounded up to whole sectors."""
    return -(-size // layout.SECTOR) * layout.SECTOR


class Ledger:
    """Counts what is referenced, and reports what lies past the end of the file."""

    __slots__ = (
        "_beyond",
        "_bits",
        "_limits",
        "_name",
        "_report",
        "_spans",
        "file_length",
        "references",
    )

    def __init__(
        self, header: Header, report: Report, *, image: StorageHandle, limits: Limits
    ) -> None:
        """Raises ``LimitExceededError`` as ``References`` does."""
        self._bits = header.cluster_bits
        self._limits = limits
        self._name = image.name()
        self._report = report
        #: The first and the last cluster of each region that is not inside the file.
        self._beyond = array("q")
        nothing = np.empty(0, np.int64)
        self._spans: tuple[Clusters, Clusters] = (nothing, nothing)
        #: Bytes, in whole sectors.
        self.file_length = _length_in_sectors(image.size())
        self.references = References(
            -(-self.file_length >> self._bits),
            refcount_bits=header.refcount_bits,
            overflow=self._overflow,
            limits=limits,
            name=image.name(),
        )

    def region(self, what: str, offset: int, length: int, *, times: int = 1) -> bool:
        """Count the clusters of a region of host bytes; False if it is not inside the file.

        Something leads there so many ``times``.
        """
        if length <= 0:
            return True
        if not self.is_inside(offset, length):
            self.tell_beyond(what, offset, length, times=times)
            self.note_beyond(np.array([offset]), length)
            return False
        first, end = self._clusters(offset, length)
        self.references.add_run(first, end - first, times)
        return True

    def regions(self, what: str, places: Mapping[tuple[int, int], int]) -> None:
        """As ``region``, of many, which may overlap: host offset and bytes, and how often each."""
        spans: Counter[tuple[int, int]] = Counter()
        for (offset, length), times in places.items():
            if length > 0 and self.is_inside(offset, length):
                spans[self._clusters(offset, length)] += times
            else:
                self.region(what, offset, length, times=times)
        for first, uses in overlaps(spans):
            self.references.add_each(first, uses)

    def regions_beyond(self, what: str, offsets: Clusters, length: int, *, times: Clusters) -> None:
        """As ``regions``, of many of one length in bytes, none of which is inside the file."""
        room = self._report.room
        for offset, count in zip(offsets[:room].tolist(), times[:room].tolist(), strict=True):
            self.tell_beyond(what, offset, length, times=count)
        self._report.omit(corruptions=int(times[room:].sum()))
        self.note_beyond(offsets, length)

    def is_inside(self, offset: int, length: int) -> bool:
        """Whether a region is inside the file.

        Its last cluster may be cut: as long as some of it is there, so is the region.
        """
        return offset + length - self.file_length < 1 << self._bits

    def _clusters(self, offset: int, length: int) -> tuple[int, int]:
        """The first cluster of a region, and the end of its last one."""
        return offset >> self._bits, (offset + length - 1 >> self._bits) + 1

    def tell_beyond(self, what: str, offset: int, length: int, *, times: int) -> None:
        """Report a region that is not inside the file."""
        self._report.corruption(
            "ERROR: counting reference for region exceeding the end of the file by one cluster "
            f"or more: offset 0x{offset:x} size 0x{length:x}",
            f"{what} at {offset:#x} ({length} bytes) lies past the end of the file",
            offset=offset,
            found=offset + length,
            expected=self.file_length,
            times=times,
        )

    def note_beyond(self, offsets: Clusters, length: Clusters | int) -> None:
        """Remember regions that are not inside the file, of one length or each of its own.

        Raises:
            LimitExceededError: there are more than ``limits.metadata`` can remember.
        """
        clusters = np.stack((offsets, offsets + (length - 1)), axis=1) >> self._bits
        self._beyond.frombytes(clusters.tobytes())
        size = len(self._beyond) * self._beyond.itemsize
        what = f"'{self._name}': the memory for what lies past its end"
        self._limits.check("metadata", size, what=what)

    def leads_beyond(self, clusters: Clusters) -> NDArray[np.bool_]:
        """Whether each cluster is part of a region that goes on past the end of the file.

        Such regions are not counted, so that QEMU's verdict is ours; but what is there is in use.
        """
        starts, ends = self._spans_beyond()
        last = np.searchsorted(starts, clusters, "right") - 1
        found: NDArray[np.bool_] = last >= 0
        found[found] = ends[last[found]] >= clusters[found]
        return found

    def clear_of_beyond(self, start: int, count: int) -> int:
        """The first cluster from ``start`` on behind which ``count`` are led to by nothing.

        What leads past the end of the file would share whatever is put there.
        """
        starts, ends = self._spans_beyond()
        free = np.maximum(np.append(start, ends + 1), start)
        until = np.append(starts, np.iinfo(np.int64).max)
        return int(free[np.argmax(until - free >= count)])

    def _spans_beyond(self) -> tuple[Clusters, Clusters]:
        """Where regions begin that are not inside the file, in order, and how far any has come."""
        regions = np.frombuffer(self._beyond, np.int64).reshape(-1, 2)
        if len(regions) != len(self._spans[0]):
            order = np.argsort(regions[:, 0])
            # There may be millions, which are held no more often than they must be.
            ends = regions[order, 1]
            np.maximum.accumulate(ends, out=ends)
            self._spans = regions[order, 0], ends
        return self._spans

    def _overflow(self, clusters: Clusters, times: Clusters) -> None:
        room = self._report.room
        for cluster, count in zip(clusters[:room].tolist(), times[:room].tolist(), strict=True):
            offset = cluster << self._bits
            self._report.corruption(
                f"ERROR: overflow cluster offset=0x{offset:x}\n{_ADVICE}",
                f"the cluster at {offset:#x} is referenced more often than a refcount can say; "
                "convert the image into a new one",
                offset=offset,
                times=count,
            )
        self._report.omit(corruptions=int(times[room:].sum()))
