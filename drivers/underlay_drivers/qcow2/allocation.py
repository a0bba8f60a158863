"""The search for free clusters, and more reference counts where there are too few.

Blocks are added behind what they are to count, and the refcount table moves to where it has room.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Sequence
from typing import TYPE_CHECKING, Final

from underlay.errors import CorruptImageError, LimitExceededError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.refcount_blocks import RefcountBlocks

if TYPE_CHECKING:
    from underlay.handle import StorageHandle

__all__ = ["Allocator"]

#: More than there can be encoded clusters in one cluster of the host.
_PLENTY: Final = 0xFFFF


class Allocator(RefcountBlocks):
    """Hands clusters out; each that it has handed out counts one reference.

    Clusters that were never used come without more ado. Those that a count calls free are handed
    out only when all counts were verified.
    """

    __slots__ = ("_packed_to", "_sound", "_verify", "believed", "fresh_from", "limit")

    def __init__(
        self,
        image: StorageHandle,
        header: Header,
        *,
        metadata: set[int],
        cache_size: int,
        verify: Callable[[], Awaitable[bool]],
    ) -> None:
        """``verify`` raises ``CorruptImageError`` if a count is too low.

        It tells whether every entry leads where it may.
        """
        super().__init__(image, header, metadata=metadata, cache_size=cache_size)
        self._verify = verify
        #: Whether no count is too low.
        self.believed = False
        self._sound = False
        #: From here on no cluster was ever used or handed out, for metadata neither: they read as
        #: zeroes.
        self.fresh_from = 0
        #: From here on nothing may be handed out, since an entry leads there (see ``strays``).
        self.limit = layout.HOST_OFFSET
        #: Where the compressed data that was packed last ends.
        self._packed_to = 0

    async def load(self, header: Header) -> None:
        """See ``RefcountBlocks.load``."""
        self.believed = False
        await super().load(header)
        self._packed_to = 0
        used_to = max(self.metadata, default=0) + self._cluster_size
        self.fresh_from = await self._end_of_counts(max(self._image.size(), used_to))
        self.limit = layout.HOST_OFFSET

    async def _end_of_counts(self, end: int) -> int:
        """Where the counts end that there are for clusters from host offset ``end`` on."""
        index = -(-end >> self._cluster_bits)
        while (block := await self.block(index // self.counts.per_block)) is not None:
            number, at = divmod(index, self.counts.per_block)
            last = self.counts.last_used(block)
            if last < at:
                break
            index = number * self.counts.per_block + last + 1
            if last + 1 < self.counts.per_block:
                break
        return index << self._cluster_bits

    async def believe(self) -> bool:
        """Make sure, once, that no count is too low: before something that is in use is let go.

        False if an entry was found, too, that leads where it must not.

        Raises:
            CorruptImageError: one is.
        """
        if not self.believed:
            self._sound = await self._verify()
            self.believed = True
        return self._sound

    async def allocate(self, count: int) -> tuple[int, int]:
        """Up to ``count`` free clusters in a row (at least one): their offset, and how many.

        Their counts are one from now on.

        Raises:
            CorruptImageError: what the counts call free is in use.
            LimitExceededError: there is no room for more reference counts.
        """
        while (room := self.try_allocate(count)) is None:
            number, at = divmod(self._hint, self.counts.per_block)
            block = await self.block(number)
            if block is None:
                # Behind what it is made for, as QEMU does it.
                await self._cover(self._hint, min(count, self.counts.per_block - at))
                continue
            found = self.counts.find_free(block, at)
            self._hint = number * self.counts.per_block + found
            if found < 0:
                self._hint = (number + 1) * self.counts.per_block
            elif self._hint << self._cluster_bits < self.fresh_from:
                await self.believe()
        return room

    def try_allocate(self, count: int) -> tuple[int, int] | None:
        """``allocate`` if that needs no other block than the current one, which is in memory.

        None otherwise, or if the counts have to be verified first; nothing has changed then.
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
        if not (self.believed or index << bits >= self.fresh_from):
            return None
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
        await self._take_found(start, count)
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
            block = await self.block(number)
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

    async def _take_found(self, index: int, count: int) -> None:
        """``_take`` when it is sure that the counts can be believed."""
        if index << self._cluster_bits < self.fresh_from:
            await self.believe()
        self._take(index, count)

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
        if end > self.limit:
            raise CorruptImageError(
                f"'{self._image.name()}': an L2 entry leads to {self.limit:#x}, which counts as "
                "free, and comes next; repair the image",
                offset=self.limit,
                field="refcount",
                value=0,
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

    # -- compressed data

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

    async def pack_all(self, lengths: Sequence[int]) -> list[int]:
        """``pack`` for each of these lengths, in their order; all of them or none."""
        if self.counts.maximum < _PLENTY:
            return [await self.pack(length) for length in lengths]
        size = self._cluster_size
        at = self._packed_to
        end = at + size - 1 & -size
        left = sum(lengths)
        offsets: list[int] = []
        #: What has to be added to the count of each cluster.
        changes: dict[int, int] = {}
        undo: list[tuple[int, int]] = []
        try:
            for length in lengths:
                if length > end - at:
                    start, count = await self.allocate(-(-(left - (end - at)) // size))
                    clusters = range(start, start + count * size, size)
                    undo += [(cluster, -1) for cluster in clusters]
                    changes |= dict.fromkeys(clusters, -1)
                    if start != end:
                        at = start
                    end = start + count * size
                offsets.append(at)
                for cluster in range(at & -size, at + length, size):
                    changes[cluster] = changes.get(cluster, 0) + 1
                at += length
                left -= length
            for cluster, change in changes.items():
                if change:
                    await self.change(cluster, change)
                    undo.append((cluster, -change))
        except BaseException:
            for cluster, change in reversed(undo):
                await self.change(cluster, change)
            raise
        self._packed_to = at
        return offsets

    def stop_packing(self, clusters: Container[int]) -> None:
        """Put nothing more into these clusters, which are about to be freed."""
        if self._packed_to and self._packed_to & -self._cluster_size in clusters:
            self._packed_to = 0

    # -- more counts

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
        await self._take_found(base, needed)
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

    async def lay_out_counts(self, start: int, count: int) -> int:
        """Let there be counts for ``count`` clusters behind those in use: their host offset.

        The blocks, and a new refcount table, stand at host offset ``start``, where nothing is used.

        Raises:
            LimitExceededError: the table would become too large.
        """
        first = start >> self._cluster_bits
        per_block, in_cluster = self.counts.per_block, self._cluster_size // 8
        blocks = tables = 0
        while True:
            needed = -(-(first + count + blocks + tables) // per_block)
            clusters = self._table_limit(-(-needed // in_cluster), needed)
            if (needed, clusters) == (blocks, tables):
                break
            blocks, tables = needed, clusters
        tables = max(tables, self._table_clusters)
        missing = [n for n in range(first // per_block, blocks) if not self._has_block(n)]
        used = len(missing) + tables
        await self._take_found(first, used)
        self._move_table(first + len(missing), tables)
        for step, number in enumerate(missing):
            self._put_block(number, first + step << self._cluster_bits)
        await self._fill(first, used)
        return first + used << self._cluster_bits

    async def take_at(self, offset: int, count: int) -> None:
        """Count one reference to each of ``count`` clusters that ``lay_out_counts`` made room for.

        Raises:
            CorruptImageError, LimitExceededError: as ``allocate`` does.
        """
        await self._take_found(offset >> self._cluster_bits, count)
        await self._fill(offset >> self._cluster_bits, count)

    async def relocate(self) -> None:
        """Let all blocks that are dirty, and the table, go to new places.

        What is on disk stays as it is until the header leads to the new table.
        """
        clusters = self._table_clusters
        start = await self._find_run(self._hint, clusters)
        await self._cover(start, clusters)
        if self._table_clusters == clusters:  # else it has moved just now, to grow
            await self._take_found(start, clusters)
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
