"""Checking one L2 table at a time, with numpy: what its entries reference, and which are wrong."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.entry_faults import Entries, EntryFaults, compressed_places
from underlay_drivers.qcow2.findings import Report
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.l1_check import L2Table
from underlay_drivers.qcow2.ledger import Ledger
from underlay_drivers.qcow2.tables import Geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay_drivers.qcow2.bulk import Words

__all__ = ["TableCheck"]


class TableCheck:
    """Goes through L2 tables, counts references and clusters, and reports what is wrong."""

    __slots__ = (
        "_geometry",
        "_ledger",
        "_mend",
        "_ramp",
        "_report",
        "_run",
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
        faults = EntryFaults(found, table, geometry, self._ledger, mend=self._mend)
        counted = ~(faults.beyond | faults.uncounted)
        if faults.wrong.any():
            self.all_copied = False
            faults.report(self._report)
            self.to_zero.extend(faults.places(faults.mended).tolist())
        if found.compressed.any():
            compressed = found.entries[found.compressed & counted]
            self._count_compressed(compressed, table.times)
            starts, ends = compressed_places(
                found.entries[found.compressed & faults.beyond], geometry
            )
            self._ledger.note_beyond(starts, ends - starts)
        if not geometry.external:
            self._count_data(found.offsets[found.allocated & counted], table.times)
            beyond = found.offsets[found.allocated & faults.beyond]
            self._ledger.note_beyond(beyond, geometry.cluster_size)
        if table.active:
            shown = (found.allocated | found.compressed) & ~faults.uncounted
            self._keep_statistics(found, shown, table.active)

    def _count_data(self, offsets: NDArray[np.int64], times: int) -> None:
        bits = self._geometry.cluster_bits
        references = self._ledger.references
        references.add(offsets >> bits, times)
        unaligned = offsets[(offsets & (self._geometry.cluster_size - 1)) != 0]
        references.add((unaligned >> bits) + 1, times)

    def _count_compressed(self, entries: Words, times: int) -> None:
        bits = self._geometry.cluster_bits
        starts, ends = compressed_places(entries, self._geometry)
        first, last = starts >> bits, (ends - 1) >> bits
        references = self._ledger.references
        references.add(first, times)
        # Compressed data is as long as two clusters at most, so it touches three.
        references.add(first[last > first] + 1, times)
        references.add(first[last > first + 1] + 2, times)

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

    def _keep_statistics(self, found: Entries, shown: NDArray[np.bool_], times: int) -> None:
        """Count clusters; ``shown`` are the entries that count, so many ``times``."""
        offsets = found.offsets[shown & ~found.compressed]
        compressed = int(np.count_nonzero(shown & found.compressed)) * times
        self.compressed += compressed
        self.allocated += len(offsets) * times + compressed
        # What is compressed is taken for fragmented, wherever it lies.
        self.fragmented += compressed
        apart = np.count_nonzero(offsets[1:] != offsets[:-1] + self._geometry.cluster_size)
        self.fragmented += int(apart) * times
        self.all_copied &= bool(found.copied[found.allocated].all())
