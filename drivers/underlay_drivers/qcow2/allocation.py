"""Which clusters of the image file are in use: reference counts, and the search for free ones.

Everything here changes memory only, under the lock of ``Writeback``; what has to be written, and in
which order, is decided there.
"""

from __future__ import annotations

from array import array
from collections.abc import Container
from typing import TYPE_CHECKING

import attrs

from underlay.errors import CorruptImageError, LimitExceededError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.counts import Counts
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.tables import Table, empty_table, swap

if TYPE_CHECKING:
    from underlay.handle import StorageHandle

__all__ = ["Allocator", "RefcountChanges"]


@attrs.frozen(kw_only=True)
class RefcountChanges:
    """Copies of everything about reference counts that is not on disk yet."""

    #: Numbers of blocks.
    blocks: frozenset[int]
    #: Host offsets with what belongs there.
    block_bytes: list[tuple[int, bytes]]
    #: Numbers of the refcount table's entries that are new; none if the table has moved.
    entries: frozenset[int]
    entry_bytes: list[tuple[int, bytes]]
    #: The whole table, if it has moved: its new host offset, its bytes, its clusters.
    moved: tuple[int, bytes, int] | None
    #: Tables that are no longer used once the header leads to the new one: host offset, clusters.
    superseded: list[tuple[int, int]]


class Allocator:
    """The refcount table and its blocks. All offsets are host bytes, at cluster borders.

    A *metadata* cluster is one that holds the header, a table, a block or a directory;
    ``metadata`` is the set of their offsets, and nothing of it is ever handed out as free.
    """

    __slots__ = (
        "_being_written",
        "_block_capacity",
        "_blocks",
        "_cluster_bits",
        "_cluster_size",
        "_dirty_blocks",
        "_dirty_entries",
        "_hint",
        "_image",
        "_moved",
        "_packed_to",
        "_superseded",
        "_table",
        "_table_clusters",
        "_table_offset",
        "counts",
        "fresh_from",
        "highest_freed",
        "metadata",
    )

    def __init__(
        self, image: StorageHandle, header: Header, *, metadata: set[int], cache_size: int
    ) -> None:
        self._image = image
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self.counts = Counts(refcount_bits=header.refcount_bits, cluster_size=header.cluster_size)
        self.metadata = metadata
        self._table_offset = header.refcount_table_offset
        self._table_clusters = header.refcount_table_clusters
        self._table: Table = array("Q")
        #: From here on no cluster was ever used or handed out, for metadata neither: they read as
        #: zeroes.
        self.fresh_from = 0
        #: Blocks in memory by their number; the one that was used last stands last.
        self._blocks: dict[int, bytearray] = {}
        self._block_capacity = max(4, cache_size // header.cluster_size)
        self._dirty_blocks: set[int] = set()
        #: Clean in memory, but not on disk before ``written`` says so.
        self._being_written: frozenset[int] = frozenset()
        self._dirty_entries: set[int] = set()
        self._moved = False
        self._superseded: list[tuple[int, int]] = []
        #: Where the compressed data that was packed last ends.
        self._packed_to = 0
        #: Every cluster with a lower number is in use.
        self._hint = 1
        #: Host offset of the last cluster that has become free in this session; 0 if none has.
        self.highest_freed = 0

    async def load(self, header: Header) -> None:
        """Read the refcount table and put its blocks among the metadata; forget what was known.

        Raises:
            CorruptImageError: the table makes no sense.
        """
        self._blocks.clear()
        self._dirty_blocks, self._dirty_entries = set(), set()
        self._moved, self._superseded = False, []
        self._hint, self._packed_to = 1, 0
        self._table_offset = header.refcount_table_offset
        self._table_clusters = header.refcount_table_clusters
        self.counts = Counts(refcount_bits=header.refcount_bits, cluster_size=self._cluster_size)
        table = empty_table(self._table_clusters * self._cluster_size // 8)
        await self._image.readv((memoryview(table).cast("B"),), self._table_offset)
        swap(table)
        file_size = self._image.size()
        for number, entry in enumerate(table):
            if entry:
                fault = self._entry_fault(entry, file_size)
                if fault is not None:
                    raise CorruptImageError(
                        f"'{self._image.name()}': the refcount table's entry {entry:#x} {fault}; "
                        "repair the image before writing to it",
                        offset=self._table_offset + number * 8,
                        field="refcount table entry",
                        value=entry,
                    )
                self.metadata.add(entry)
        self._table = table
        self.fresh_from = max(file_size, max(self.metadata, default=0) + self._cluster_size)

    def _entry_fault(self, entry: int, file_size: int) -> str | None:
        if entry & (self._cluster_size - 1):
            return "does not lead to the start of a cluster"
        if entry in self.metadata:
            return "leads to metadata of another kind, or to another's block"
        if entry >= file_size:
            return "leads past the end of the file"
        return None

    # -- looking

    async def refcount(self, offset: int) -> int:
        """The count of the cluster at ``offset``; 0 where there is no block for it yet."""
        number, index = divmod(offset >> self._cluster_bits, self.counts.per_block)
        block = await self._block(number)
        return 0 if block is None else self.counts.get(block, index)

    def blocks(self) -> set[int]:
        """The host offsets of all refcount blocks."""
        return set(self._table) - {0}

    async def end_of_use(self) -> int:
        """Host offset of the end of the last cluster that is in use."""
        for number in reversed(range(len(self._table))):
            block = await self._block(number)
            last = -1 if block is None else self.counts.last_used(block)
            if last >= 0:
                return number * self.counts.per_block + last + 1 << self._cluster_bits
        return 0

    # -- taking

    async def allocate(self, count: int) -> tuple[int, int]:
        """Up to ``count`` free clusters in a row (at least one): their offset, and how many.

        Their counts are one from now on.

        Raises:
            CorruptImageError: the first free cluster is none: there is metadata in it.
            LimitExceededError: there is no room for more reference counts.
        """
        while (room := self.try_allocate(count)) is None:
            number, at = divmod(self._hint, self.counts.per_block)
            block = await self._block(number) or await self._add_block(number)
            if self.counts.find_free(block, at) < 0:
                self._hint = (number + 1) * self.counts.per_block
        return room

    def try_allocate(self, count: int) -> tuple[int, int] | None:
        """``allocate`` if that needs no other block than the current one, which is in memory.

        None otherwise; nothing has changed then.
        """
        counts, bits = self.counts, self._cluster_bits
        number, at = divmod(self._hint, counts.per_block)
        block = self._blocks.get(number)
        if block is None:
            return None
        found, got = counts.find_run(block, at, count)
        if not got:
            return None
        index = number * counts.per_block + found
        self._take(index, got)
        counts.fill(block, found, got)
        self._dirty_blocks.add(number)
        self._hint = index + got
        return index << bits, got

    async def allocate_exactly(self, count: int) -> int:
        """The host offset of ``count`` free clusters in a row, for a table.

        Raises:
            CorruptImageError, LimitExceededError: as ``allocate`` does.
        """
        start = await self._find_run(self._hint, count)
        self._take(start, count)
        await self._cover(start, count)
        await self._fill(start, count)
        if start == self._hint:
            self._hint = start + count
        return start << self._cluster_bits

    async def _find_run(self, start: int, count: int) -> int:
        """The first of ``count`` free clusters in a row, from cluster ``start`` on."""
        counts = self.counts
        index = start
        while index - start < count:
            number, at = divmod(index, counts.per_block)
            block = await self._block(number)
            if block is None:
                index = (number + 1) * counts.per_block  # all free, since nothing counts them
                continue
            run = counts.free_run(block, at, count - (index - start))
            index += run
            if index - start < count and at + run < counts.per_block:
                found = counts.find_free(block, at + run)
                step = found if found >= 0 else counts.per_block
                index = start = number * counts.per_block + step
        return start

    async def _fill(self, start: int, count: int) -> None:
        """Count one reference to each of ``count`` clusters, all of which have a block."""
        for number, at, run in self._pieces(start, count):
            block = await self._block(number)
            assert block is not None
            self.counts.fill(block, at, run)
            self._dirty_blocks.add(number)

    def _take(self, index: int, count: int) -> None:
        """Refuse to hand out what cannot be free."""
        end = index + count << self._cluster_bits
        if end > layout.HOST_OFFSET:
            raise LimitExceededError(
                f"'{self._image.name()}' would become larger than qcow2 can address",
                limit="host offset",
                value=end,
                allowed=layout.HOST_OFFSET,
            )
        start = index << self._cluster_bits
        if start >= self.fresh_from:
            self.fresh_from = end
            return
        clusters = range(start, end, self._cluster_size)
        if not self.metadata.isdisjoint(clusters) or not index:
            offset = next(offset for offset in clusters if offset in self.metadata or not offset)
            raise CorruptImageError(
                f"'{self._image.name()}': the cluster at {offset:#x} holds metadata, and its "
                "reference count says that it is free; repair the image",
                offset=offset,
                field="refcount",
                value=0,
            )
        self.fresh_from = max(self.fresh_from, end)

    async def pack(self, length: int) -> int:
        """Room for ``length`` bytes of compressed data, less than a cluster: its host offset.

        Behind what was packed before, if that can be; its clusters are counted once more.

        Raises:
            CorruptImageError, LimitExceededError: as ``allocate`` does.
        """
        at = self._packed_to
        left = -at % self._cluster_size
        if at and left:
            shared = at - at % self._cluster_size
            if left >= length and await self.refcount(shared) < self.counts.maximum:
                await self.change(shared, 1)
                self._packed_to = at + length
                return at
        offset, _ = await self.allocate(1)
        self._packed_to = offset + length
        if at and left and offset == at + left and left < length:
            shared = offset - self._cluster_size
            if await self.refcount(shared) < self.counts.maximum:
                await self.change(shared, 1)
                self._packed_to = at + length
                return at
        return offset

    def stop_packing(self, clusters: Container[int]) -> None:
        """Put nothing more into these clusters, which are about to be freed."""
        if self._packed_to and self._packed_to & -self._cluster_size in clusters:
            self._packed_to = 0

    # -- changing

    async def change(self, offset: int, delta: int) -> int:
        """Raise or lower one cluster's count, and return the new one.

        Raises:
            LimitExceededError: it cannot be counted so high in ``refcount_bits``.
            CorruptImageError: it would fall below zero.
        """
        index = offset >> self._cluster_bits
        number, at = divmod(index, self.counts.per_block)
        block = await self._block(number)
        count = (0 if block is None else self.counts.get(block, at)) + delta
        if block is None or count < 0:
            raise CorruptImageError(
                f"'{self._image.name()}': the cluster at {offset:#x} is in use, and its reference "
                "count says that it is free; repair the image",
                offset=offset,
                field="refcount",
                value=count - delta,
            )
        if count > self.counts.maximum:
            raise LimitExceededError(
                f"'{self._image.name()}': a cluster cannot be referenced {count} times with "
                f"refcount_bits={self.counts.bits}; amend the image to a wider one",
                limit="refcount_bits",
                value=count,
                allowed=self.counts.maximum,
            )
        self.counts.set(block, at, count)
        self._dirty_blocks.add(number)
        if not count:
            self._hint = min(self._hint, index)
            self.highest_freed = max(self.highest_freed, offset)
        return count

    async def lower(self, offset: int, clusters: int) -> None:
        """Take one reference from each of ``clusters`` clusters. Raises as ``change`` does."""
        for cluster in range(offset, offset + clusters * self._cluster_size, self._cluster_size):
            await self.change(cluster, -1)

    # -- blocks

    async def _block(self, number: int) -> bytearray | None:
        """A block, or None where there is none."""
        block = self._blocks.pop(number, None)
        if block is None:
            if not self._has_block(number):
                return None
            block = await self._image.read_bytes(self._table[number], self._cluster_size)
            self._make_room()
        self._blocks[number] = block
        return block

    def _make_room(self) -> None:
        if len(self._blocks) < self._block_capacity:
            return
        for number in self._blocks:
            if number not in self._dirty_blocks and number not in self._being_written:
                del self._blocks[number]
                return

    async def _add_block(self, number: int) -> bytearray:
        """A new block, in the first cluster of those that it describes."""
        await self._cover(number * self.counts.per_block, 0)
        block = await self._block(number)
        assert block is not None
        return block

    async def _cover(self, start: int, count: int) -> None:
        """Let there be blocks for ``count`` clusters that are free, and for themselves.

        New ones stand right behind those clusters; behind them, if it has become too short for
        them, the refcount table.
        """
        per_block = self.counts.per_block
        in_cluster = self._cluster_size // 8
        first = start // per_block
        base, needed = start + count, 0
        while True:
            used = needed
            base = await self._find_run(start + count, used)
            last = max(base + used - 1, start + count - 1, start) // per_block
            missing = [number for number in range(first, last + 1) if not self._has_block(number)]
            needed = len(missing)
            if last >= len(self._table):
                wanted = max(last + 1, len(self._table) * 3 // 2)
                needed += self._table_limit(-(-wanted // in_cluster), last + 1)
            if needed <= used:
                break
        if not missing:
            return
        self._take(base, needed)
        if needed > len(missing):
            self._move_table(base + len(missing), needed - len(missing))
        for step, number in enumerate(self._in_order(missing, base)):
            self._put_block(number, base + step << self._cluster_bits)
        await self._fill(base, needed)

    def _in_order(self, missing: list[int], base: int) -> dict[int, None]:
        """New blocks in the order in which they stand from cluster ``base`` on: QEMU's.

        A block that counts where another one stands comes right behind that one.
        """
        order: dict[int, None] = {}
        for number in missing:
            following = number
            while following in missing and following not in order:
                order[following] = None
                following = (base + len(order) - 1) // self.counts.per_block
        return order

    def _has_block(self, number: int) -> bool:
        return number < len(self._table) and self._table[number] != 0

    def _put_block(self, number: int, offset: int) -> None:
        self._make_room()
        self._blocks[number] = bytearray(self._cluster_size)
        self._table[number] = offset
        self._dirty_blocks.add(number)
        self._dirty_entries.add(number)
        self.metadata.add(offset)

    def _table_limit(self, clusters: int, entries: int) -> int:
        """``clusters`` for the refcount table, or as many as it may have at most."""
        most = layout.REFCOUNT_TABLE_BYTES_MAX // self._cluster_size
        if entries * 8 > layout.REFCOUNT_TABLE_BYTES_MAX:
            raise LimitExceededError(
                f"'{self._image.name()}': the refcount table cannot become larger than "
                f"{layout.REFCOUNT_TABLE_BYTES_MAX} bytes; convert the image to one with larger "
                "clusters",
                limit="refcount table",
                value=entries * 8,
                allowed=layout.REFCOUNT_TABLE_BYTES_MAX,
            )
        return min(clusters, most)

    def _move_table(self, index: int, clusters: int) -> None:
        """Let the refcount table have ``clusters`` clusters from number ``index`` on."""
        self._superseded.append((self._table_offset, self._table_clusters))
        self._moved = True
        self._table.extend([0] * (clusters * self._cluster_size // 8 - len(self._table)))
        self._table_offset = index << self._cluster_bits
        self._table_clusters = clusters
        end = self._table_offset + (clusters << self._cluster_bits)
        self.metadata.update(range(self._table_offset, end, self._cluster_size))

    def _pieces(self, index: int, count: int) -> list[tuple[int, int, int]]:
        """A run of clusters as block number, first count in it, and how many, block by block."""
        pieces: list[tuple[int, int, int]] = []
        while count:
            number, at = divmod(index, self.counts.per_block)
            run = min(count, self.counts.per_block - at)
            pieces.append((number, at, run))
            index += run
            count -= run
        return pieces

    async def relocate(self) -> None:
        """Let all blocks that are dirty, and the table, go to new places.

        What is on disk stays as it is until the header leads to the new table.
        """
        clusters = self._table_clusters
        start = await self._find_run(self._hint, clusters)
        await self._cover(start, clusters)
        if self._table_clusters == clusters:  # else it has moved just now, to grow
            self._take(start, clusters)
            await self._fill(start, clusters)
            self._move_table(start, clusters)
        done: set[int] = set()
        while pending := self._dirty_blocks - done:
            for number in sorted(pending):
                offset, _ = await self.allocate(1)
                self._superseded.append((self._table[number], 1))
                self._table[number] = offset
                self.metadata.add(offset)
                done.add(number)

    # -- for the write-back

    @property
    def dirty_blocks(self) -> int:
        """How many blocks are not on disk as they should be."""
        return len(self._dirty_blocks)

    def take_changes(self) -> RefcountChanges | None:
        """Copies of what is dirty, for ``written`` or ``put_back``; None if nothing is."""
        if not (self._dirty_blocks or self._dirty_entries or self._moved):
            return None
        moved: tuple[int, bytes, int] | None = None
        entries = frozenset(self._dirty_entries)
        if self._moved:
            table = array("Q", self._table)
            swap(table)
            moved = (self._table_offset, table.tobytes(), self._table_clusters)
            entries = frozenset[int]()
        changes = RefcountChanges(
            blocks=frozenset(self._dirty_blocks),
            block_bytes=[
                (self._table[number], bytes(self._blocks[number]))
                for number in sorted(self._dirty_blocks)
            ],
            entries=entries,
            entry_bytes=[
                (self._table_offset + number * 8, self._table[number].to_bytes(8, "big"))
                for number in sorted(entries)
            ],
            moved=moved,
            superseded=self._superseded,
        )
        self._being_written = changes.blocks
        self._dirty_blocks = set()
        self._dirty_entries = set()
        self._moved = False
        self._superseded = []
        return changes

    def written(self, changes: RefcountChanges) -> None:
        """They are on disk."""
        self._being_written = frozenset()

    def put_back(self, changes: RefcountChanges) -> None:
        """They did not all reach the disk: they are dirty as before."""
        self._being_written = frozenset()
        self._dirty_blocks |= changes.blocks
        self._dirty_entries |= changes.entries
        self._moved = self._moved or changes.moved is not None
        self._superseded = changes.superseded + self._superseded
