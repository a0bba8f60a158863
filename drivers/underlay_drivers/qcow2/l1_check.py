"""Counting the L1 tables, the active one and those of snapshots: what their entries lead to.

Snapshots share tables by design, and those of a hostile file as often as a file can say. So each
word of an L1 table is read once, whatever tables it stands in, and each L2 table is handed out
once, with the number of entries that lead to it. With numpy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.findings import Report
from underlay_drivers.qcow2.header import Header, text
from underlay_drivers.qcow2.ledger import Ledger
from underlay_drivers.qcow2.loading import load_words
from underlay_drivers.qcow2.references import Clusters
from underlay_drivers.qcow2.snapshots import SnapshotEntry
from underlay_drivers.qcow2.table_uses import TableUses, hosts_of, words_in_use
from underlay_drivers.qcow2.tables import Geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay.handle import StorageHandle
    from underlay.limits import Limits
    from underlay_drivers.qcow2.bulk import Words

__all__ = ["L1Check", "L2Table"]

#: Entries of an L1 table, and L2 tables, that are looked at together.
_PIECE: Final = 1 << 16


@attrs.frozen
class L2Table:
    """An L2 table, and what leads to it."""

    #: Its host offset.
    host: int
    #: How many L1 entries lead to it.
    times: int
    #: How many of them are the active table's.
    active: int
    #: Where on the disk the first of these says that its clusters begin; 0 if there is none.
    guest: int


class L1Check:
    """Counts what L1 tables lead to, and reports entries that are odd."""

    def __init__(
        self, image: StorageHandle, header: Header, limits: Limits, ledger: Ledger, report: Report
    ) -> None:
        self._image = image
        self._header = header
        self._limits = limits
        self._ledger = ledger
        self._report = report
        #: The active table, as far as it is inside the file.
        self.active: Words = np.empty(0, np.uint64)
        clusters = -(-ledger.file_length >> header.cluster_bits)
        self._active_uses = TableUses(clusters, limits, name=image.name())
        self._snapshot_uses = TableUses(clusters, limits, name=image.name())

    # -- counting

    async def count_active(self) -> None:
        """Count the active table, and keep it.

        Raises:
            LimitExceededError: it, or what it leads to, is more than ``limits.metadata``.
            CorruptImageError: too many L2 tables overlap.
        """
        offset, entries = self._header.l1_table_offset, self._header.l1_size
        if not entries:
            return
        inside = self._ledger.region("an L1 table", offset, entries * 8)
        if inside and not self.is_there():
            # QEMU takes what is missing for zeroes, and shows an empty disk.
            self._report.corruption(
                f"ERROR: the L1 table is cut: offset 0x{offset:x} size 0x{entries * 8:x}",
                f"the L1 table at {offset:#x} ({entries} entries) is not inside the file",
                offset=offset,
                found=offset + entries * 8,
                expected=self._image.size(),
            )
        # What lies past the end is zero, and need not be held.
        held = min(entries, -(-max(self._ledger.file_length - offset, 0) // 8))
        self._check_size(held * 8)
        self.active = await load_words(self._image, offset, held)
        for first in range(0, held, _PIECE):
            piece = self.active[first : first + _PIECE]
            once = np.ones(len(piece), np.int64)
            self._count_entries(piece, offset + first * 8, once, self._active_uses)

    async def count_snapshots(self, snapshots: Sequence[SnapshotEntry]) -> None:
        """Count their tables, which may be the same ones, or overlap: each word is read once.

        Raises:
            LimitExceededError: one, or what they lead to, is more than ``limits.metadata``.
            CorruptImageError: too many L2 tables overlap.
        """
        tables = Counter(
            (snapshot.l1_table_offset, snapshot.l1_size * 8)
            for snapshot in snapshots
            if self._is_usable(snapshot)
        )
        self._check_size(max((length for _, length in tables), default=0))
        self._ledger.regions("an L1 table", tables)
        for first, uses in words_in_use(tables, end=self._ledger.file_length):
            table = await load_words(self._image, first, len(uses))
            self._count_entries(table, first, uses, self._snapshot_uses)

    def _check_size(self, length: int) -> None:
        what = f"'{self._image.name()}': the size of an L1 table"
        self._limits.check("metadata", length, what=what)

    def _is_usable(self, snapshot: SnapshotEntry) -> bool:
        """Whether a snapshot's L1 table can be looked at; if not, that is reported."""
        offset, entries = snapshot.l1_table_offset, snapshot.l1_size
        who = f"ERROR snapshot {text(snapshot.id)} ({text(snapshot.name)})"
        ending = "snapshot table entry corrupted"
        if offset % self._header.cluster_size:
            self._report.corruption(
                f"{who} l1_offset={offset:#x}: L1 table is not cluster aligned; {ending}",
                f"the L1 table of snapshot '{text(snapshot.name)}' starts no cluster",
                offset=self._header.snapshots_offset,
                found=offset,
            )
            return False
        if entries * 8 > layout.L1_BYTES_MAX:
            self._report.corruption(
                f"{who} l1_size={entries:#x}: L1 table is too large; {ending}",
                f"the L1 table of snapshot '{text(snapshot.name)}' is too large",
                offset=self._header.snapshots_offset,
                found=entries,
                expected=layout.L1_BYTES_MAX // 8,
            )
            return False
        return entries > 0

    def _count_entries(
        self, table: Words, offset: int, times: NDArray[np.int64], uses: TableUses
    ) -> None:
        """Count what entries at a host offset lead to, each so many ``times``."""
        used = np.flatnonzero((table != 0) & (times != 0))
        entries, times = table[used], times[used]
        hosts = hosts_of(entries)
        inside = hosts < self._ledger.file_length
        uses.add(hosts[inside], times[inside])
        unaligned = (hosts & (self._header.cluster_size - 1)) != 0
        clusters = hosts >> self._header.cluster_bits
        self._ledger.references.add(clusters[inside], times[inside])
        second = inside & unaligned
        self._ledger.references.add(clusters[second] + 1, times[second])
        self._ledger.note_beyond(hosts[~inside], self._header.cluster_size)
        reserved = (entries & np.uint64(layout.L1_RESERVED)) != 0
        faults = reserved.astype(np.int64) + unaligned + ~inside
        odd = np.flatnonzero(faults)
        room = self._report.room
        for number in odd[:room].tolist():
            place = offset + int(used[number]) * 8
            self._odd_entry(int(entries[number]), place, int(times[number]))
        unheard = odd[room:]
        self._report.omit(corruptions=int((faults[unheard] * times[unheard]).sum()))

    def _odd_entry(self, entry: int, place: int, times: int) -> None:
        size = self._header.cluster_size
        if entry & layout.L1_RESERVED:
            self._report.corruption(
                f"ERROR found L1 entry with reserved bits set: {entry:x}",
                f"the L1 entry at {place:#x} has reserved bits set",
                offset=place,
                found=entry,
                expected=entry & ~layout.L1_RESERVED,
                times=times,
            )
        table_offset = entry & layout.HOST_OFFSET
        if table_offset >= self._ledger.file_length:
            self._ledger.tell_beyond("an L2 table", table_offset, size, times=times)
        if table_offset % size:
            self._report.corruption(
                f"ERROR l2_offset={table_offset:x}: Table is not cluster aligned; L1 entry "
                "corrupted",
                f"the L1 entry at {place:#x} points into a cluster instead of at its start",
                offset=place,
                found=table_offset,
                times=times,
            )

    # -- what was counted

    def active_entries(self) -> Iterator[tuple[Clusters, NDArray[np.bool_]]]:
        """The numbers of the active entries that are not zero, in order, some at a time.

        With each, whether it is the first that leads to its L2 table, if that is inside the file.
        """
        seen = np.zeros(len(self._active_uses.hosts), np.bool_)
        for start in range(0, len(self.active), _PIECE):
            numbers = start + np.flatnonzero(self.active[start : start + _PIECE])
            hosts = hosts_of(self.active[numbers])
            inside = np.flatnonzero(hosts < self._ledger.file_length)
            places = np.searchsorted(self._active_uses.hosts, hosts[inside])
            places, at = np.unique(places, return_index=True)
            first = np.zeros(len(numbers), np.bool_)
            first[inside[at]] = ~seen[places]
            seen[places] = True
            yield numbers, first

    def l2_tables(self) -> Iterator[L2Table]:
        """Each L2 table inside the file, once: first the disk's in its order, then all others."""
        shift = Geometry.of(self._header).l1_shift
        for numbers, first in self.active_entries():
            some = numbers[first]
            yield from self._weighed(hosts_of(self.active[some]), some << shift)
        others = self._snapshot_uses.hosts
        for start in range(0, len(others), _PIECE):
            piece = others[start : start + _PIECE]
            piece = piece[self._active_uses.of(piece) == 0]
            yield from self._weighed(piece, np.zeros(len(piece), np.int64))

    def _weighed(self, hosts: Clusters, guests: Clusters) -> Iterator[L2Table]:
        active = self._active_uses.of(hosts)
        times = active + self._snapshot_uses.of(hosts)
        fields = (hosts, times, active, guests)
        yield from map(L2Table, *(field.tolist() for field in fields))

    @property
    def table_count(self) -> int:
        """How many L2 tables there are; those that are the disk's and a snapshot's, twice."""
        return len(self._active_uses.hosts) + len(self._snapshot_uses.hosts)

    def active_uses(self, hosts: Clusters) -> NDArray[np.int64]:
        """How many active entries lead to each of these tables."""
        return self._active_uses.of(hosts)

    def are_only_tables(self, clusters: Clusters) -> NDArray[np.bool_]:
        """Whether L1 entries, and nothing else, lead to clusters that are inside the file."""
        hosts = clusters << self._header.cluster_bits
        uses = self._active_uses.of(hosts) + self._snapshot_uses.of(hosts)
        return (uses > 0) & (self._ledger.references.counts[clusters] <= uses.astype(np.uint64))

    def is_there(self) -> bool:
        """Whether the active table is inside the file, as it must be to open the image."""
        header = self._header
        end = header.l1_table_offset + header.l1_size * 8
        return not header.l1_size or end <= self._image.size()

    def is_alone(self) -> bool:
        """Whether nothing else leads to the clusters of the active table."""
        first = self._header.l1_table_offset >> self._header.cluster_bits
        end = -(-(self._header.l1_table_offset + len(self.active) * 8) >> self._header.cluster_bits)
        return bool((self._ledger.references.counts[first:end] <= 1).all())
