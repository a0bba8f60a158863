"""Checking one L2 table at a time, with numpy: what its entries reference, and which are wrong."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.findings import Report, Verb
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.l1_check import L2Table
from underlay_drivers.qcow2.ledger import Ledger
from underlay_drivers.qcow2.tables import Geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay_drivers.qcow2.bulk import Words

__all__ = ["Entries", "TableCheck"]

_LOW: Final = np.uint64(layout.ALL_ALLOCATED)
_HOST: Final = np.uint64(layout.HOST_OFFSET)


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
        offsets = (words & _HOST).astype(np.int64)
        allocated = offsets != 0
        if geometry.external:
            allocated |= copied
        allocated &= ~compressed
        return cls(words, bitmaps, compressed, copied, offsets, allocated)


class TableCheck:
    """Goes through L2 tables, counts references and clusters, and reports what is wrong."""

    __slots__ = (
        "_geometry",
        "_ledger",
        "_mend",
        "_ramp",
        "_report",
        "_run",
        "_times",
        "all_copied",
        "allocated",
        "compressed",
        "fragmented",
        "to_zero",
    )

    def __init__(self, header: Header, ledger: Ledger, report: Report, *, mend: bool) -> None:
        """With ``mend``, entries that can be made zero clusters are noted and not counted."""
        self._geometry = geometry = Geometry.of(header)
        self._ledger = ledger
        self._report = report
        self._mend = mend and header.version > 2  # noqa: PLR2004 (a version is its own best name)
        self._ramp = np.arange(geometry.l2_entries, dtype=np.uint64) << np.uint64(
            geometry.cluster_bits
        )
        self._run = self._ramp.copy()
        #: How many entries lead to the table that is looked at.
        self._times = 1
        #: Clusters of the active tables.
        self.allocated = 0
        self.fragmented = 0
        self.compressed = 0
        #: Whether each cluster of the active tables has its COPIED bit, and nothing is odd.
        self.all_copied = True
        #: Host offsets of entries that are to become zero clusters.
        self.to_zero = array("Q")

    def scan(self, words: Words, table: L2Table) -> None:
        """One table, which counts as often as entries lead to it."""
        self._times = table.times
        if self._is_one_run(words):
            host = int(words[0]) & layout.HOST_OFFSET
            first = host >> self._geometry.cluster_bits
            self._ledger.references.add_run(first, len(words), table.times)
            self.allocated += len(words) * table.active
        elif words.any():
            found = Entries.of(words, self._geometry)
            self._scan(found, table)
            self._note_unreadable(found, table)

    def _is_one_run(self, words: Words) -> bool:
        """Whether the table is what most are: data, one cluster behind the other, not shared."""
        geometry = self._geometry
        first = int(words[0])
        if geometry.extended or geometry.external or first <= layout.COPIED:
            return False
        host = first & layout.HOST_OFFSET
        return (
            first == layout.COPIED | host
            and not host & (geometry.cluster_size - 1)
            and host + len(words) * geometry.cluster_size <= self._ledger.file_length
            and int(words[-1]) == first + int(self._ramp[-1])
            and bool((words == np.add(self._ramp, first, out=self._run)).all())
        )

    def _scan(self, found: Entries, table: L2Table) -> None:
        geometry = self._geometry
        allocated, compressed = found.allocated, found.compressed
        odd = ~compressed & ((found.entries & np.uint64(layout.L2_RESERVED)) != 0)
        wrong = (found.offsets & (geometry.cluster_size - 1)) != 0
        if not geometry.external:
            wrong |= found.offsets >= self._ledger.file_length
        odd |= allocated & wrong
        if found.bitmaps is not None:
            low = found.bitmaps & _LOW
            overlap = (low & (found.bitmaps >> np.uint64(layout.SUBCLUSTERS))) != 0
            odd |= allocated & overlap
            odd |= ~compressed & ~allocated & (low != 0)
        any_compressed = bool(compressed.any())
        if any_compressed:
            odd |= self._odd_compressed(found)
        shown = allocated | compressed
        if odd.any():
            self.all_copied = False
            for index in np.flatnonzero(odd).tolist():
                shown[index] = self._odd_entry(found, index, table.host)
        if any_compressed:
            self._count_compressed(found.entries[compressed & ~odd])
        if not geometry.external:
            plain = found.offsets[allocated & ~odd]
            self._ledger.references.add(plain >> geometry.cluster_bits, self._times)
        if table.active:
            self._tell(found, shown, table.active)

    def _note_unreadable(self, found: Entries, table: L2Table) -> None:
        """Tell of entries that cannot be read, though a check of QEMU's passes over them."""
        geometry = self._geometry
        bad = np.uint64(geometry.standard_bad & layout.ZERO)
        if geometry.external:
            own = table.guest + self._ramp.astype(np.int64)
            # In two places on the disk, the offset of one of them would be wrong.
            odd = found.allocated & ((found.offsets != own) | (table.active > 1))
            odd &= table.active > 0
        else:
            odd = found.copied & (found.offsets == 0)
        odd |= (found.entries & bad) != 0
        places = np.flatnonzero(odd & ~found.compressed)
        room = self._report.room
        for index in places[:room].tolist():
            place = table.host + index * 8 * geometry.words
            self._report.note(
                "",
                f"the L2 entry {int(found.entries[index]):#x} at {place:#x} makes no sense in this "
                "image, and cannot be read",
                offset=place,
            )
        self._report.omit(notes=len(places[room:]))

    def _tell(self, found: Entries, shown: NDArray[np.bool_], times: int) -> None:
        """Keep the statistics; ``shown`` are the entries that count, so many ``times``."""
        offsets = found.offsets[shown & ~found.compressed]
        compressed = int(np.count_nonzero(shown & found.compressed)) * times
        self.compressed += compressed
        self.allocated += len(offsets) * times + compressed
        # What is compressed is taken for fragmented, wherever it lies.
        self.fragmented += compressed
        apart = np.count_nonzero(offsets[1:] != offsets[:-1] + self._geometry.cluster_size)
        self.fragmented += int(apart) * times
        self.all_copied &= bool(found.copied[found.allocated].all())

    # -- compressed clusters

    def _place(self, entries: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where compressed data begins, and where the last sector that it uses ends."""
        geometry = self._geometry
        shift = np.uint64(geometry.compressed_shift)
        starts = (entries & np.uint64((1 << geometry.compressed_shift) - 1)).astype(np.int64)
        sectors = (entries >> shift) & np.uint64((1 << (geometry.cluster_bits - 8)) - 1)
        ends = (starts // layout.SECTOR + sectors.astype(np.int64) + 1) * layout.SECTOR
        return starts, ends

    def _odd_compressed(self, found: Entries) -> NDArray[np.bool_]:
        if self._geometry.external:
            return found.compressed
        odd = found.copied.copy()
        if found.bitmaps is not None:
            odd |= found.bitmaps != 0
        _, ends = self._place(found.entries)
        odd |= ends - self._ledger.file_length >= self._geometry.cluster_size
        odd &= found.compressed
        return odd

    def _count_compressed(self, entries: Words) -> None:
        bits = self._geometry.cluster_bits
        starts, ends = self._place(entries)
        first, last = starts >> bits, (ends - 1) >> bits
        references = self._ledger.references
        references.add(first, self._times)
        # Compressed data is as long as two clusters at most, so it touches three.
        references.add(first[last > first] + 1, self._times)
        references.add(first[last > first + 1] + 2, self._times)

    # -- what is wrong

    def _odd_entry(self, found: Entries, index: int, where: int) -> bool:
        """Report one entry, and count what it references; whether it counts as allocated."""
        entry = int(found.entries[index])
        bitmap = 0 if found.bitmaps is None else int(found.bitmaps[index])
        place = where + index * 8 * self._geometry.words
        if entry & layout.COMPRESSED:
            return self._odd_compressed_entry(entry, bitmap, index, place)
        if entry & layout.L2_RESERVED:
            self._report.corruption(
                f"ERROR found l2 entry with reserved bits set: {entry:x}",
                f"the L2 entry at {place:#x} has reserved bits set",
                offset=place,
                found=entry,
                expected=entry & ~layout.L2_RESERVED,
                times=self._times,
            )
        if found.allocated[index]:
            return self._odd_cluster(entry, bitmap, place)
        if bitmap & layout.ALL_ALLOCATED:
            self._report.corruption(
                "ERROR: Unallocated cluster has non-zero subcluster allocation map",
                f"the L2 entry at {place:#x} has allocated subclusters and no cluster",
                offset=place,
                found=bitmap,
                expected=bitmap & layout.ALL_ZERO,
                times=self._times,
            )
        return False

    def _odd_cluster(self, entry: int, bitmap: int, place: int) -> bool:
        geometry = self._geometry
        offset = entry & layout.HOST_OFFSET
        if bitmap & bitmap >> layout.SUBCLUSTERS:
            self._report.corruption(
                f"ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation "
                "bitmap",
                f"the L2 entry at {place:#x} has subclusters that are both allocated and zero",
                offset=place,
                found=bitmap,
                times=self._times,
            )
        if offset & (geometry.cluster_size - 1):
            reads_data = (
                bitmap & layout.ALL_ALLOCATED if geometry.extended else not entry & layout.ZERO
            )
            mend = self._mend and not reads_data
            kind = "Data" if reads_data else "Preallocated"
            verb = Verb.REPAIRING if mend else Verb.ERROR
            self._report.corruption(
                f"{verb} offset={offset:x}: {kind} cluster is not properly aligned; L2 entry "
                "corrupted.",
                f"the L2 entry at {place:#x} points into a cluster instead of at its start",
                offset=place,
                found=offset,
                expected=offset & -geometry.cluster_size,
                times=1 if mend else self._times,  # mended, it is right for all others
            )
            if mend:
                self.to_zero.append(place)
                return False
        if not geometry.external:
            self._ledger.region("a data cluster", offset, geometry.cluster_size, times=self._times)
        return True

    def _odd_compressed_entry(self, entry: int, bitmap: int, index: int, place: int) -> bool:
        offset, length = self._geometry.compressed(entry)
        if entry & layout.COPIED:
            entry &= ~layout.COPIED
            self._report.corruption(
                f"ERROR: coffset=0x{offset:x}: copied flag must never be set for compressed "
                "clusters",
                f"the L2 entry at {place:#x} of a compressed cluster has its COPIED bit set",
                offset=place,
                found=entry | layout.COPIED,
                expected=entry,
                times=self._times,
            )
        if self._geometry.external:
            self._report.corruption(
                f"ERROR compressed cluster {index} with data file, entry=0x{entry:x}",
                f"the L2 entry at {place:#x} is compressed, which with a data file it must not be",
                offset=place,
                found=entry,
                times=self._times,
            )
        elif bitmap:
            self._report.corruption(
                f"ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, "
                f"entry=0x{entry:x}",
                f"the L2 entry at {place:#x} is compressed and has subclusters",
                offset=place,
                found=bitmap,
                expected=0,
                times=self._times,
            )
        else:
            self._ledger.region("a compressed cluster", offset, length, times=self._times)
            return True
        return False
