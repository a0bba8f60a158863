"""Checking an image: QEMU's verdict and counts, and a report of each thing that is wrong.

References are counted over all tables, then compared with the refcounts that are stored; then the
COPIED bits of the active tables are judged by these. A table that is shared, be it by thousands of
snapshots, is read and judged once, and weighs as much as all that lead to it. One L2 table or
refcount block is in memory at a time, and a byte for each cluster of the file.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from underlay.capabilities import CheckResult
from underlay.limits import Limits
from underlay.steps import Steps, StepsCallback
from underlay.time_limit import check_time
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.bitmaps import read_bitmaps
from underlay_drivers.qcow2.findings import Report, Verb
from underlay_drivers.qcow2.header import Header, text
from underlay_drivers.qcow2.ledger import Ledger
from underlay_drivers.qcow2.loading import load_table
from underlay_drivers.qcow2.refcount_check import RefcountCheck, StoredRefcounts
from underlay_drivers.qcow2.references import Clusters
from underlay_drivers.qcow2.snapshots import SnapshotEntry, read_snapshots
from underlay_drivers.qcow2.table_check import Entries, TableCheck
from underlay_drivers.qcow2.table_uses import TableUses, cover
from underlay_drivers.qcow2.tables import Geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay.handle import StorageHandle
    from underlay_drivers.qcow2.bulk import Words

__all__ = ["Checker", "check_image"]

#: Entries of an L1 table that are looked at together.
_PIECE: Final = 1 << 16


async def check_image(
    image: StorageHandle,
    header: Header,
    limits: Limits,
    report: Report,
    *,
    progress: StepsCallback | None = None,
) -> CheckResult:
    """See ``Checkable.check``. ``progress`` counts tables: L2 tables, and refcount blocks."""
    steps = Steps(progress)
    checker = Checker(image, header, limits, report, steps=steps)
    await checker.count()
    await checker.compare()
    await checker.judge_copied()
    steps.end()
    return checker.result()


class Checker:
    """One check, step by step; a repair takes other steps between them."""

    def __init__(
        self,
        image: StorageHandle,
        header: Header,
        limits: Limits,
        report: Report,
        *,
        steps: Steps | None = None,
        mend: bool = False,
    ) -> None:
        """With ``mend``, what a repair will mend is reported so, and counted as if it were.

        What there is to do is expected of ``steps`` when it is known.

        Raises:
            LimitExceededError: the counts would take more memory than ``limits.metadata``.
        """
        self.image = image
        self.header = header
        self.geometry = Geometry.of(header)
        self.report = report
        self._limits = limits
        self._steps = steps or Steps(None)
        self._mend = mend
        self.ledger = Ledger(header, report, image=image, limits=limits)
        self.tables = TableCheck(header, self.ledger, report, mend=mend)
        self.l1: Words = np.empty(0, np.uint64)
        self.refcounts: RefcountCheck | None = None
        self.snapshots: tuple[SnapshotEntry, ...] = ()
        #: Snapshots whose entry lacks extra data that it must have.
        self.incomplete = 0
        #: The L2 tables that L1 entries lead to.
        self._uses = TableUses(limits, name=image.name())
        #: Those that the active ones lead to.
        self._active = TableUses(limits, name=image.name())

    # -- counting

    async def count(self, *, without: Sequence[SnapshotEntry] | None = None) -> None:
        """Count every reference.

        ``without`` the refcount structures and the snapshot table where they are going to be
        replaced: then those are the snapshots.

        Raises:
            CorruptImageError: the snapshot table or the bitmap directory cannot be read.
        """
        snapshots = await self._load_snapshots() if without is None else without
        self.snapshots = tuple(snapshots)
        self._steps.expect(self.tables_to_count)
        header, region = self.header, self.ledger.region
        region("the header", 0, header.cluster_size)
        await self._count_active_l1()
        if header.external_data_file and snapshots:
            self.report.corruption(
                f"ERROR {len(snapshots)} snapshots in image with data file",
                "there are snapshots, and a data file, which keeps no old data",
                found=len(snapshots),
                expected=0,
            )
        await self._count_snapshots(snapshots)
        await self._count_l2_tables()
        if without is None:
            table_size = sum(len(snapshot.pack()) for snapshot in snapshots)
            region("the snapshot table", header.snapshots_offset, table_size)
            await self._count_structures()
        await self._count_bitmaps()
        if self.refcounts is not None:
            self.refcounts.check_table()

    @property
    def tables_to_count(self) -> int:
        """As many tables as ``count`` and ``compare`` look at, if none is missing."""
        in_block = self.header.cluster_size * 8 // self.header.refcount_bits
        return self.l1_entries + -(-self.ledger.references.size // in_block)

    @property
    def l1_entries(self) -> int:
        """As many as all L1 tables have."""
        snapshots = [entry.l1_size for entry in self.snapshots]
        plausible = [size for size in snapshots if size * 8 <= layout.L1_BYTES_MAX]
        return self.header.l1_size + sum(plausible)

    async def _count_structures(self) -> None:
        """Count the refcount table, and read it."""
        header = self.header
        length = header.refcount_table_clusters * header.cluster_size
        self.ledger.region("the refcount table", header.refcount_table_offset, length)
        stored = await StoredRefcounts.load(self.image, header)
        self.refcounts = RefcountCheck(stored, self.ledger, self.report)

    async def _load_snapshots(self) -> tuple[SnapshotEntry, ...]:
        header = self.header
        snapshots = await read_snapshots(self.image, header, self._limits, to_check=True)
        if header.version > 2:  # noqa: PLR2004 (a version is its own best name)
            for number, snapshot in enumerate(snapshots):
                if len(snapshot.extra) < layout.SNAPSHOT_EXTRA_V3:
                    self.incomplete += 1
                    verb = Verb.REPAIRING if self._mend else Verb.ERROR
                    self.report.corruption(
                        f"{verb} snapshot table entry {number} is incomplete",
                        f"entry {number} of the snapshot table lacks extra data",
                        offset=header.snapshots_offset,
                        found=len(snapshot.extra),
                        expected=layout.SNAPSHOT_EXTRA_V3,
                    )
        return snapshots

    def _is_usable(self, snapshot: SnapshotEntry) -> bool:
        """Whether a snapshot's L1 table can be looked at; if not, that is reported."""
        offset, entries = snapshot.l1_table_offset, snapshot.l1_size
        who = f"ERROR snapshot {text(snapshot.id)} ({text(snapshot.name)})"
        ending = "snapshot table entry corrupted"
        if offset % self.header.cluster_size:
            self.report.corruption(
                f"{who} l1_offset={offset:#x}: L1 table is not cluster aligned; {ending}",
                f"the L1 table of snapshot '{text(snapshot.name)}' starts no cluster",
                offset=self.header.snapshots_offset,
                found=offset,
            )
            return False
        if entries * 8 > layout.L1_BYTES_MAX:
            self.report.corruption(
                f"{who} l1_size={entries:#x}: L1 table is too large; {ending}",
                f"the L1 table of snapshot '{text(snapshot.name)}' is too large",
                offset=self.header.snapshots_offset,
                found=entries,
                expected=layout.L1_BYTES_MAX // 8,
            )
            return False
        return entries > 0

    async def _count_snapshots(self, snapshots: Sequence[SnapshotEntry]) -> None:
        """Count their L1 tables, which may be the same ones, or overlap: each word is read once."""
        tables = Counter(
            (snapshot.l1_table_offset, snapshot.l1_size)
            for snapshot in snapshots
            if self._is_usable(snapshot)
        )
        words_in_file = self.ledger.file_length // 8
        places: Counter[tuple[int, int]] = Counter()
        for (offset, entries), times in tables.items():
            what = f"'{self.image.name()}': the size of an L1 table"
            self._limits.check("metadata", entries * 8, what=what)
            self.ledger.region("an L1 table", offset, entries * 8, times=times)
            first = offset // 8
            if first < words_in_file:  # what lies past the end is zero
                places[first, min(first + entries, words_in_file)] += times
        for first, uses in cover(places):
            check_time()
            table = await self._load_table(first * 8, len(uses), what="an L1 table")
            self._count_l1_entries(table, first * 8, uses)

    async def _count_active_l1(self) -> None:
        offset, entries = self.header.l1_table_offset, self.header.l1_size
        if not entries:
            return
        inside = self.ledger.region("an L1 table", offset, entries * 8)
        if inside and not self.l1_is_there():
            # QEMU takes what is missing for zeroes, and shows an empty disk.
            self.report.corruption(
                f"ERROR: the L1 table is cut: offset 0x{offset:x} size 0x{entries * 8:x}",
                f"the L1 table at {offset:#x} ({entries} entries) is not inside the file",
                offset=offset,
                found=offset + entries * 8,
                expected=self.image.size(),
            )
        if offset >= self.ledger.file_length:
            self.l1 = np.zeros(entries, np.uint64)
            return
        # What lies past the end is zero, and need not be held.
        held = min(entries, -(-(self.ledger.file_length - offset) // 8))
        self.l1 = await self._load_table(offset, held, what="an L1 table")
        for first in range(0, held, _PIECE):
            piece = self.l1[first : first + _PIECE]
            self._count_l1_entries(piece, offset + first * 8, np.ones(len(piece), np.int64))

    def _count_l1_entries(self, table: Words, offset: int, times: Clusters) -> None:
        """Count what entries at a host offset lead to, each so many ``times``."""
        used = np.flatnonzero((table != 0) & (times != 0))
        entries, times = table[used], times[used]
        hosts = _hosts(entries)
        inside = hosts < self.ledger.file_length
        self._uses.add(hosts[inside], times[inside])
        odd = ~inside | ((hosts & (self.header.cluster_size - 1)) != 0)
        odd |= (entries & np.uint64(layout.L1_RESERVED)) != 0
        self.ledger.references.add(hosts[~odd] >> self.header.cluster_bits, times[~odd])
        for number in np.flatnonzero(odd).tolist():
            place = offset + int(used[number]) * 8
            self._odd_l1_entry(int(entries[number]), place, int(times[number]))

    def _l1_pieces(self) -> Iterator[Clusters]:
        """The numbers of the active L1 entries that are not zero, some at a time."""
        for first in range(0, len(self.l1), _PIECE):
            yield first + np.flatnonzero(self.l1[first : first + _PIECE])

    async def _count_l2_tables(self) -> None:
        """Count all beneath the L2 tables: first the active ones, as the disk goes."""
        for numbers in self._l1_pieces():
            hosts = _hosts(self.l1[numbers])
            hosts = hosts[hosts < self.ledger.file_length]
            self._active.add(hosts, np.ones(len(hosts), np.int64))
        active = self._active.hosts
        uses = self._active.of(active)
        firsts, lasts = np.full(len(active), -1, np.int64), np.zeros(len(active), np.int64)
        for piece in self._l1_pieces():
            numbers = piece[_hosts(self.l1[piece]) < self.ledger.file_length]
            places = np.searchsorted(active, _hosts(self.l1[numbers]))
            lasts[places] = numbers  # of what is put in one place, the last stays
            new = np.flatnonzero(firsts[places] < 0)[::-1]
            firsts[places[new]] = numbers[new]
        order = np.argsort(firsts)
        others = np.setdiff1d(self._uses.hosts, active, assume_unique=True)
        hosts = np.concatenate((active[order], others))
        times = self._uses.of(hosts).tolist()
        begun, steps = self._steps.done, self.l1_entries
        shift = self.geometry.l1_shift
        async for number, words in self._l2_tables(hosts):
            guests: tuple[int, ...] = ()
            count = 0
            if number < len(active):
                place = order[number]
                count = int(uses[place])
                guests = (int(firsts[place]) << shift, int(lasts[place]) << shift)
            where = int(hosts[number])
            self.tables.scan(words, where, times=times[number], active=count, guests=guests)
            self._steps.reach(begun + steps * (number + 1) // len(hosts))
        self._steps.reach(begun + steps)

    async def _load_table(self, offset: int, entries: int, *, what: str) -> Words:
        table = await load_table(self.image, offset, entries, self._limits, what=what)
        return np.frombuffer(table, np.uint64)

    def is_only_table(self, cluster: int) -> bool:
        """Whether L1 entries, and nothing else, lead to a cluster."""
        uses = int(self._uses.of(np.array([cluster << self.header.cluster_bits]))[0])
        return uses > 0 and self.ledger.references.at(cluster) <= uses

    def l1_is_there(self) -> bool:
        """Whether the active L1 table is inside the file, as it must be to open the image."""
        header = self.header
        end = header.l1_table_offset + header.l1_size * 8
        return not header.l1_size or end <= self.image.size()

    def l1_is_alone(self) -> bool:
        """Whether nothing else leads to the clusters of the active L1 table."""
        first = self.header.l1_table_offset >> self.header.cluster_bits
        end = -(-(self.header.l1_table_offset + len(self.l1) * 8) >> self.header.cluster_bits)
        return bool((self.ledger.references.counts[first:end] <= 1).all())

    def _odd_l1_entry(self, entry: int, place: int, times: int) -> None:
        if entry & layout.L1_RESERVED:
            self.report.corruption(
                f"ERROR found L1 entry with reserved bits set: {entry:x}",
                f"the L1 entry at {place:#x} has reserved bits set",
                offset=place,
                found=entry,
                expected=entry & ~layout.L1_RESERVED,
                times=times,
            )
        table_offset = entry & layout.HOST_OFFSET
        self.ledger.region("an L2 table", table_offset, self.header.cluster_size, times=times)
        if table_offset % self.header.cluster_size:
            self.report.corruption(
                f"ERROR l2_offset={table_offset:x}: Table is not cluster aligned; L1 entry "
                "corrupted",
                f"the L1 entry at {place:#x} points into a cluster instead of at its start",
                offset=place,
                found=table_offset,
                times=times,
            )

    async def _l2_tables(self, hosts: Clusters) -> AsyncIterator[tuple[int, Words]]:
        """The number of each L2 table, and the table, which is valid until the next one."""
        buffer = bytearray(self.header.cluster_size)
        words = np.frombuffer(buffer, np.uint64)
        buffers = (buffer,)
        readv = self.image.readv
        for number, host in enumerate(hosts.tolist()):
            await readv(buffers, host)
            if sys.byteorder == "little":
                words.byteswap(inplace=True)
            yield number, words

    async def _count_bitmaps(self) -> None:
        cluster_size = self.header.cluster_size
        bitmaps = await read_bitmaps(self.image, self.header, self._limits)
        if not bitmaps or self.header.bitmaps is None:
            return
        place = self.header.bitmaps
        self.ledger.region("the bitmap directory", place.directory_offset, place.directory_size)
        for bitmap in bitmaps:
            offset, entries = bitmap.bitmap_table_offset, bitmap.bitmap_table_size
            if offset % cluster_size:
                self.report.corruption(
                    "",
                    f"the table of bitmap '{text(bitmap.name)}' starts no cluster",
                    offset=place.directory_offset,
                    found=offset,
                )
            if not self.ledger.region("a bitmap table", offset, entries * 8):
                continue
            table = await self._load_table(offset, entries, what="a bitmap table")
            self._count_bitmap(text(bitmap.name), table, cluster_size)

    def _count_bitmap(self, name: str, table: Words, cluster_size: int) -> None:
        hosts = table & np.uint64(layout.HOST_OFFSET)
        reserved = np.uint64(0xFF000000000001FE)
        odd = (table & reserved) != 0
        odd |= (hosts != 0) & ((table & np.uint64(1)) != 0)
        odd |= (hosts & np.uint64(cluster_size - 1)) != 0
        for entry in table[odd].tolist():
            self.report.corruption(
                "", f"an entry of the table of bitmap '{name}' makes no sense", found=entry
            )
        for host in hosts[~odd & (hosts != 0)].tolist():
            self.ledger.region("a bitmap's cluster", host, cluster_size)

    # -- judging

    async def compare(
        self, *, mend_leaks: bool = False, mend_errors: bool = False, keep: bool = False
    ) -> None:
        """Report each refcount that is not what was counted; see ``RefcountCheck.compare``."""
        if self.refcounts is None:
            raise ValueError("the refcount structures were not counted")
        await self.refcounts.compare(
            self._steps, mend_leaks=mend_leaks, mend_errors=mend_errors, keep=keep
        )

    async def judge_copied(self) -> None:
        """Report each COPIED bit of the active tables that does not fit the stored refcounts."""
        if self.copied_is_right():
            return
        begun = self._steps.done
        self._steps.expect(len(self.l1))
        judged = np.zeros(len(self._active.hosts), np.bool_)
        for numbers in self._l1_pieces():
            await self._judge_l1_entries(numbers, judged, begun)

    async def _judge_l1_entries(
        self, numbers: Clusters, judged: NDArray[np.bool_], begun: int
    ) -> None:
        """Judge entries of the active table, and the L2 tables that are not yet ``judged``."""
        bits = self.header.cluster_bits
        numbers = numbers[_hosts(self.l1[numbers]) != 0]
        tables, firsts, places = np.unique(
            _hosts(self.l1[numbers]), return_index=True, return_inverse=True
        )
        uses = self._active.of(tables)
        known_at = np.searchsorted(self._active.hosts, tables[uses > 0])
        new = firsts[uses > 0][~judged[known_at]]
        judged[known_at] = True
        counts = [await self.refcount(table >> bits) for table in tables.tolist()]
        ones = np.array([count == 1 for count in counts], np.bool_)
        known = np.array([count is not None for count in counts], np.bool_)
        copied = (self.l1[numbers] & np.uint64(layout.COPIED)) != 0
        wrong = known[places] & (ones[places] != copied)
        first = np.zeros(len(numbers), np.bool_)
        first[new] = True
        for index in np.flatnonzero(wrong | first).tolist():
            if wrong[index] and self.report.is_full and not first[index]:
                self.report.omit()
                continue
            number, place = int(numbers[index]), int(places[index])
            if wrong[index]:
                entry, count = int(self.l1[number]), counts[place]
                self.report.corruption(
                    f"{Verb.ERROR} OFLAG_COPIED L2 cluster: l1_index={number} "
                    f"l1_entry={entry:x} refcount={count}",
                    f"the COPIED bit of L1 entry {number} does not fit the refcount {count}",
                    offset=self.header.l1_table_offset + number * 8,
                    found=entry,
                    expected=entry ^ layout.COPIED,
                )
            if first[index]:
                await self._judge_table(int(tables[place]), int(uses[place]))
            self._steps.reach(begun + number + 1)

    def judge_by_references(self) -> None:
        """Let COPIED bits be judged by what was counted: refcounts are about to be made so."""
        nothing = StoredRefcounts(self.image, self.header, np.empty(0, np.uint64))
        self.refcounts = RefcountCheck(nothing, self.ledger, self.report)

    async def refcount(self, cluster: int) -> int | None:
        """What the COPIED bit of an entry for this cluster is judged by; None: not known."""
        return None if self.refcounts is None else await self.refcounts.refcount(cluster)

    async def load_table(self, where: int) -> Words:
        """The L2 table at a host offset, as an array that may be changed."""
        buffer = await self.image.read_bytes(where, self.header.cluster_size)
        return np.frombuffer(buffer, ">u8").astype(np.uint64)

    async def _judge_table(self, where: int, times: int) -> None:
        if where >= self.image.size():
            return
        words = await self.load_table(where)
        if not words.any():
            return
        found = Entries.of(words, self.geometry)
        for index in (await self.wrong_copied(found)).tolist():
            entry = int(found.entries[index])
            count: int | None = 1
            if not self.geometry.external:
                cluster = int(found.offsets[index]) >> self.header.cluster_bits
                count = await self.refcount(cluster)
            self.report.corruption(
                f"{Verb.ERROR} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={count}",
                f"the COPIED bit of the L2 entry does not fit the refcount {count}",
                offset=where + index * 8 * self.geometry.words,
                found=entry,
                expected=entry ^ layout.COPIED,
                times=times,
            )

    async def wrong_copied(self, found: Entries) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        """The entries of a table whose COPIED bit does not fit the refcount."""
        wrong = found.allocated & ~found.copied
        if not self.geometry.external and self.refcounts is not None:
            where = np.flatnonzero(found.allocated)
            clusters = found.offsets[where] >> self.header.cluster_bits
            ones = await self.refcounts.is_one(clusters)
            wrong[where] = ones != found.copied[where]
            wrong[where] &= self.refcounts.is_known(clusters)
        return np.flatnonzero(wrong)

    def copied_is_right(self) -> bool:
        """Whether that is already known, as of most images, without another look at the tables."""
        refcounts = self.refcounts
        if refcounts is None or refcounts.differs or refcounts.unknown:
            return False
        tables = self.l1[(self.l1 & np.uint64(layout.HOST_OFFSET)) != 0]
        return (
            self.tables.all_copied
            and bool(((tables & np.uint64(layout.COPIED)) != 0).all())
            and int(self.ledger.references.counts.max()) == 1
        )

    def result(self) -> CheckResult:
        """What was found."""
        highest = 0 if self.refcounts is None else self.refcounts.highest
        sectors = -(-self.header.size // layout.SECTOR) * layout.SECTOR
        return attrs.evolve(
            self.report.result(),
            image_end_offset=(highest + 1) << self.header.cluster_bits,
            total_clusters=-(-sectors >> self.header.cluster_bits),
            allocated_clusters=self.tables.allocated,
            fragmented_clusters=self.tables.fragmented,
            compressed_clusters=self.tables.compressed,
        )


def _hosts(entries: Words) -> Clusters:
    """The host offsets that L1 entries lead to."""
    return (entries & np.uint64(layout.HOST_OFFSET)).astype(np.int64)
