"""The refcount table and its blocks in memory: reading, changing and copying them out.

Everything here changes memory only, under the lock of ``DirtyState``; what has to be written, and
in which order, is decided in ``writeback``.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import attrs

from underlay.errors import CorruptImageError, LimitExceededError
from underlay_drivers.qcow2.counts import Counts
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.tables import Table, empty_table, swap

if TYPE_CHECKING:
    from underlay.handle import StorageHandle

__all__ = ["RefcountBlocks", "RefcountChanges"]


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


class RefcountBlocks:
    """The reference counts of one image. All offsets are host bytes, at cluster borders.

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
        "_superseded",
        "_table",
        "_table_clusters",
        "_table_offset",
        "counts",
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
        #: Blocks in memory by their number; the one that was used last stands last.
        self._blocks: dict[int, bytearray] = {}
        self._block_capacity = max(4, cache_size // header.cluster_size)
        self._dirty_blocks: set[int] = set()
        #: Clean in memory, but not on disk before ``written`` says so.
        self._being_written: frozenset[int] = frozenset()
        self._dirty_entries: set[int] = set()
        self._moved = False
        self._superseded: list[tuple[int, int]] = []
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
        self._hint = 1
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
        block = await self.block(number)
        return 0 if block is None else self.counts.get(block, index)

    def blocks(self) -> set[int]:
        """The host offsets of all refcount blocks."""
        return set(self._table) - {0}

    async def end_of_use(self) -> int:
        """Host offset of the end of the last cluster that is in use."""
        for number in reversed(range(len(self._table))):
            block = await self.block(number)
            last = -1 if block is None else self.counts.last_used(block)
            if last >= 0:
                return number * self.counts.per_block + last + 1 << self._cluster_bits
        return 0

    # -- changing

    async def change(self, offset: int, delta: int) -> int:
        """Raise or lower one cluster's count, and return the new one.

        Raises:
            LimitExceededError: it cannot be counted so high in ``refcount_bits``.
            CorruptImageError: it would fall below zero.
        """
        index = offset >> self._cluster_bits
        number, at = divmod(index, self.counts.per_block)
        block = await self.block(number)
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

    async def _fill(self, start: int, count: int) -> None:
        """Count one reference to each of ``count`` clusters, all of which have a block."""
        for number, at, run in self._pieces(start, count):
            block = await self.block(number)
            assert block is not None
            self.counts.fill(block, at, run)
            self._dirty_blocks.add(number)

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

    # -- blocks

    async def block(self, number: int) -> bytearray | None:
        """The block of this number as it is in memory, or None where there is none."""
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

    def _has_block(self, number: int) -> bool:
        return number < len(self._table) and self._table[number] != 0

    def _put_block(self, number: int, offset: int) -> None:
        self._make_room()
        self._blocks[number] = bytearray(self._cluster_size)
        self._table[number] = offset
        self._dirty_blocks.add(number)
        self._dirty_entries.add(number)
        self.metadata.add(offset)

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
