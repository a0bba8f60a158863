"""The entries of an L2 table: of what kind each is, and which are wrong. With numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs
import numpy as np

from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.findings import Report, Verb
from underlay_drivers.qcow2.l1_check import L2Table
from underlay_drivers.qcow2.ledger import Ledger
from underlay_drivers.qcow2.table_uses import hosts_of
from underlay_drivers.qcow2.tables import Geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay_drivers.qcow2.bulk import Words

__all__ = ["Entries", "EntryFaults", "compressed_places"]

_LOW: Final = np.uint64(layout.ALL_ALLOCATED)

Marks: TypeAlias = "NDArray[np.bool_]"


@attrs.frozen
class Entries:
    """A table's entries, sorted into kinds as QEMU sorts them."""

    entries: Words
    #: None without extended L2 entries.
    bitmaps: Words | None
    compressed: NDArray[np.bool_]
    copied: NDArray[np.bool_]
    #: Host offsets, of standard entries.
    offsets: NDArray[np.int64]
    #: Standard entries that have a cluster.
    allocated: NDArray[np.bool_]

    @classmethod
    def of(cls, words: Words, geometry: Geometry) -> Entries:
        """Sort a whole table."""
        bitmaps = None
        if geometry.extended:
            words, bitmaps = words[0::2], words[1::2]
        compressed = (words & np.uint64(layout.COMPRESSED)) != 0
        copied = (words & np.uint64(layout.COPIED)) != 0
        offsets = hosts_of(words)
        allocated = offsets != 0
        if geometry.external:
            allocated |= copied
        allocated &= ~compressed
        return cls(words, bitmaps, compressed, copied, offsets, allocated)


def compressed_places(
    entries: Words, geometry: Geometry
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where compressed data begins, and where the last sector that it uses ends."""
    shift = np.uint64(geometry.compressed_shift)
    starts = (entries & np.uint64((1 << geometry.compressed_shift) - 1)).astype(np.int64)
    sectors = (entries >> shift) & np.uint64((1 << (geometry.cluster_bits - 8)) - 1)
    ends = (starts // layout.SECTOR + sectors.astype(np.int64) + 1) * layout.SECTOR
    return starts, ends


class EntryFaults:
    """The entries of one table that are wrong: marked all together, told one by one."""

    __slots__ = (
        "_found",
        "_geometry",
        "_kinds",
        "_ledger",
        "_table",
        "beyond",
        "mended",
        "uncounted",
        "wrong",
    )

    def __init__(
        self, found: Entries, table: L2Table, geometry: Geometry, ledger: Ledger, *, mend: bool
    ) -> None:
        """With ``mend``, what is preallocated nowhere becomes a zero cluster."""
        self._found = found
        self._table = table
        self._geometry = geometry
        self._ledger = ledger
        #: Each kind of fault: the entries that have it, how to tell of one, and how often.
        self._kinds: list[tuple[Marks, Callable[[Report, int], None], int]] = []
        nothing = np.zeros(len(found.entries), np.bool_)
        #: Entries that are to become zero clusters.
        self.mended: Marks = nothing
        #: Those whose cluster, or whose compressed data, lies past the end of the file.
        self.beyond: Marks = nothing
        #: Those that lead to nothing that could be counted or shown.
        self.uncounted: Marks = nothing
        self._judge_standard(mend=mend)
        if found.compressed.any():
            self._judge_compressed()
        #: All of them.
        self.wrong: Marks = np.logical_or.reduce([marks for marks, _, _ in self._kinds])

    def report(self, report: Report) -> None:
        """Tell of each, in order; of what nobody hears, count how many there are."""
        wrong = np.flatnonzero(self.wrong)
        room = report.room
        for index in wrong[:room].tolist():
            for marks, tell, _ in self._kinds:
                if marks[index]:
                    tell(report, index)
        for marks, _, times in self._kinds:
            report.omit(corruptions=int(np.count_nonzero(marks[wrong[room:]])) * times)

    def places(self, marks: Marks) -> NDArray[np.int64]:
        """Where entries stand in the file."""
        return self._table.host + np.flatnonzero(marks) * (8 * self._geometry.words)

    # -- which

    def _judge_standard(self, *, mend: bool) -> None:
        found, geometry, times = self._found, self._geometry, self._table.times
        allocated, standard = found.allocated, ~found.compressed
        reserved = standard & ((found.entries & np.uint64(layout.L2_RESERVED)) != 0)
        self._kinds.append((reserved, self._tell_reserved, times))
        if found.bitmaps is not None:
            both = found.bitmaps & found.bitmaps >> np.uint64(layout.SUBCLUSTERS)
            self._kinds.append((allocated & (both != 0), self._tell_overlap, times))
            stray = standard & ~allocated & ((found.bitmaps & _LOW) != 0)
            self._kinds.append((stray, self._tell_stray, times))
        unaligned = allocated & ((found.offsets & (geometry.cluster_size - 1)) != 0)
        if mend and unaligned.any():
            if found.bitmaps is None:
                self.mended = unaligned & ((found.entries & np.uint64(layout.ZERO)) != 0)
            else:
                self.mended = unaligned & ((found.bitmaps & _LOW) == 0)
            # Mended, it is right for all others that lead to the table.
            self._kinds.append((self.mended, self._tell_mended, 1))
            self.uncounted = self.mended
        self._kinds.append((unaligned & ~self.mended, self._tell_unaligned, times))
        if not geometry.external:
            self.beyond = allocated & (found.offsets >= self._ledger.file_length) & ~self.mended
            self._kinds.append((self.beyond, self._tell_beyond, times))

    def _judge_compressed(self) -> None:
        found, geometry, times = self._found, self._geometry, self._table.times
        compressed = found.compressed
        self._kinds.append((compressed & found.copied, self._tell_copied, times))
        if geometry.external:
            self._kinds.append((compressed, self._tell_external, times))
            self.uncounted = self.uncounted | compressed
            return
        if found.bitmaps is not None:
            mapped = compressed & (found.bitmaps != 0)
            self._kinds.append((mapped, self._tell_mapped, times))
            self.uncounted = self.uncounted | mapped
        _, ends = compressed_places(found.entries, geometry)
        beyond = compressed & (ends - self._ledger.file_length >= geometry.cluster_size)
        beyond &= ~self.uncounted
        self._kinds.append((beyond, self._tell_compressed_beyond, times))
        self.beyond = self.beyond | beyond

    # -- telling

    def _entry(self, index: int) -> int:
        return int(self._found.entries[index])

    def _offset(self, index: int) -> int:
        return int(self._found.offsets[index])

    def _bitmap(self, index: int) -> int:
        return 0 if self._found.bitmaps is None else int(self._found.bitmaps[index])

    def _place(self, index: int) -> int:
        return self._table.host + index * 8 * self._geometry.words

    def _tell_reserved(self, report: Report, index: int) -> None:
        entry, place = self._entry(index), self._place(index)
        report.corruption(
            f"ERROR found l2 entry with reserved bits set: {entry:x}",
            f"the L2 entry at {place:#x} has reserved bits set",
            offset=place,
            found=entry,
            expected=entry & ~layout.L2_RESERVED,
            times=self._table.times,
        )

    def _tell_overlap(self, report: Report, index: int) -> None:
        place = self._place(index)
        report.corruption(
            f"ERROR offset={self._offset(index):x}: Allocated cluster has corrupted subcluster "
            "allocation bitmap",
            f"the L2 entry at {place:#x} has subclusters that are both allocated and zero",
            offset=place,
            found=self._bitmap(index),
            times=self._table.times,
        )

    def _tell_unaligned(self, report: Report, index: int) -> None:
        if self._found.bitmaps is None:
            reads_data = not self._entry(index) & layout.ZERO
        else:
            reads_data = bool(self._bitmap(index) & layout.ALL_ALLOCATED)
        kind = "Data" if reads_data else "Preallocated"
        self._tell_misplaced(report, index, Verb.ERROR, kind, times=self._table.times)

    def _tell_mended(self, report: Report, index: int) -> None:
        self._tell_misplaced(report, index, Verb.REPAIRING, "Preallocated", times=1)

    def _tell_misplaced(
        self, report: Report, index: int, verb: str, kind: str, *, times: int
    ) -> None:
        offset, place = self._offset(index), self._place(index)
        report.corruption(
            f"{verb} offset={offset:x}: {kind} cluster is not properly aligned; L2 entry "
            "corrupted.",
            f"the L2 entry at {place:#x} points into a cluster instead of at its start",
            offset=place,
            found=offset,
            expected=offset & -self._geometry.cluster_size,
            times=times,
        )

    def _tell_beyond(self, _: Report, index: int) -> None:
        size, times = self._geometry.cluster_size, self._table.times
        self._ledger.tell_beyond("a data cluster", self._offset(index), size, times=times)

    def _tell_stray(self, report: Report, index: int) -> None:
        bitmap, place = self._bitmap(index), self._place(index)
        report.corruption(
            "ERROR: Unallocated cluster has non-zero subcluster allocation map",
            f"the L2 entry at {place:#x} has allocated subclusters and no cluster",
            offset=place,
            found=bitmap,
            expected=bitmap & layout.ALL_ZERO,
            times=self._table.times,
        )

    def _tell_copied(self, report: Report, index: int) -> None:
        entry, place = self._entry(index), self._place(index)
        offset, _ = self._geometry.compressed(entry)
        report.corruption(
            f"ERROR: coffset=0x{offset:x}: copied flag must never be set for compressed clusters",
            f"the L2 entry at {place:#x} of a compressed cluster has its COPIED bit set",
            offset=place,
            found=entry,
            expected=entry & ~layout.COPIED,
            times=self._table.times,
        )

    def _tell_external(self, report: Report, index: int) -> None:
        entry, place = self._entry(index) & ~layout.COPIED, self._place(index)
        report.corruption(
            f"ERROR compressed cluster {index} with data file, entry=0x{entry:x}",
            f"the L2 entry at {place:#x} is compressed, which with a data file it must not be",
            offset=place,
            found=entry,
            times=self._table.times,
        )

    def _tell_mapped(self, report: Report, index: int) -> None:
        entry, place = self._entry(index) & ~layout.COPIED, self._place(index)
        report.corruption(
            f"ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, "
            f"entry=0x{entry:x}",
            f"the L2 entry at {place:#x} is compressed and has subclusters",
            offset=place,
            found=self._bitmap(index),
            expected=0,
            times=self._table.times,
        )

    def _tell_compressed_beyond(self, _: Report, index: int) -> None:
        offset, length = self._geometry.compressed(self._entry(index))
        self._ledger.tell_beyond("a compressed cluster", offset, length, times=self._table.times)
