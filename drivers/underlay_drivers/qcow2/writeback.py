"""What has changed in memory and not yet on disk, and the order in which it gets there.

Nothing on disk ever refers to something that is not durable:

1. under the lock, copies of all dirty refcount blocks, L2 tables and L1 entries are taken;
2. the refcount blocks are written, and the L2 tables to which nothing on disk leads yet;
   if blocks are new (or the refcount table has moved): a sync, and then the entries (or the header)
   that lead to them;
3. barrier A: a sync of the data file and of the image, if anything is to be shown that was not
   there before;
4. the L2 tables that are in use, in their places, and the L1 entries.

The caller's own ``sync`` (barrier B) makes that durable. Clusters that an entry let go are freed
late: once a barrier has passed since the entry was written, and every lease that is older has
ended. Only then are they punched, counted down, and used again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs

from underlay.errors import ConflictError, CorruptImageError, StorageError, UnderlayError
from underlay.face import is_blocking, to_the_end
from underlay.lease import Leases
from underlay.locks import Lock
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.allocation import Allocator, RefcountChanges
from underlay_drivers.qcow2.tables import Table, packed

if TYPE_CHECKING:
    from underlay.handle import StorageHandle
    from underlay_drivers.qcow2.dependencies import Dependencies
    from underlay_drivers.qcow2.header import Header

__all__ = ["Freed", "Writeback"]

#: An L2 table is written in pieces of this many bytes: those that were changed.
_SLICE: Final = 4096
#: L1 entries are written in sectors.
_SECTOR_ENTRIES: Final = layout.SECTOR // 8

#: Seconds to wait for leases to end.
_LONGEST_LEASE: Final = 10.0
#: Memory for one item of what waits to be freed.
_FREED_BYTES: Final = 128
#: Items that may wait for a barrier.
_WRITTEN_MOST: Final = 1 << 16
#: Clusters that are freed in one go.
_FREED_AT_ONCE: Final = 1 << 12

#: Host offset and clusters; one reference of each is let go.
Freed = tuple[int, int]


@attrs.frozen(kw_only=True)
class _Work:
    """Copies of all that one flush writes."""

    refcounts: RefcountChanges | None
    #: L2 tables that nothing on disk leads to: what to mark again if it fails, what to write.
    new: dict[int, int]
    new_bytes: list[tuple[int, bytes]]
    #: The changed pieces of those that are in use.
    changed: dict[int, int]
    changed_bytes: list[tuple[int, bytes]]
    l1: frozenset[int]
    l1_bytes: list[tuple[int, bytes]]
    #: Whether anything is shown that was not there before.
    shows: bool
    unlinked: list[Freed]


class Writeback:
    """The dirty state of one writable image, and the clusters that wait to be freed."""

    __slots__ = (
        "_broken",
        "_dirty_l1",
        "_dirty_l2",
        "_disk",
        "_flushing",
        "_new_l2",
        "_ready",
        "_shows",
        "_slice",
        "_unlinked",
        "_waiting",
        "_written",
        "allocator",
        "dirty_limit",
        "leases",
        "lock",
    )

    def __init__(self, disk: Dependencies, allocator: Allocator, *, dirty_limit: int) -> None:
        self._disk = disk
        self.allocator = allocator
        #: Guards all tables in memory. Not held during data I/O or syncs.
        self.lock = Lock()
        self.leases = Leases()
        #: Bytes of tables beyond which a writer flushes first.
        self.dirty_limit = dirty_limit
        self._flushing = Lock()
        self._broken: UnderlayError | None = None
        self._slice = min(_SLICE, disk.geometry.cluster_size)
        #: L2 tables by the number of their L1 entry: a bit for each piece that was changed.
        self._dirty_l2: dict[int, int] = {}
        #: Those to which no L1 entry on disk leads.
        self._new_l2: set[int] = set()
        self._dirty_l1: set[int] = set()
        self._shows = False
        # What was let go, on its way: in memory only; written; durable; and out of every lease.
        self._unlinked: list[Freed] = []
        self._written: list[Freed] = []
        self._waiting: list[list[Freed]] = []
        self._ready: deque[list[Freed]] = deque()

    # -- what was changed; under the lock

    def touch_l2(self, number: int, table: Table, index: int, count: int, *, shows: bool) -> None:
        """``count`` entries from ``index`` on of the L2 table behind L1 entry ``number`` changed.

        ``shows`` says that what they lead to must be durable before they are written.
        """
        entry_bytes = self._disk.geometry.words * 8
        first = index * entry_bytes // self._slice
        last = ((index + count) * entry_bytes - 1) // self._slice
        bits = (1 << last + 1) - (1 << first)
        dirty = self._dirty_l2.get(number)
        if dirty is None:
            self._disk.pin_table(number, table)
            dirty = 0
        self._dirty_l2[number] = dirty | bits
        self._shows = self._shows or shows

    def link_l2(self, number: int, table: Table, offset: int) -> None:
        """Let L1 entry ``number`` lead to a new table, which is to be at ``offset``."""
        self._disk.pin_table(number, table)
        self._dirty_l2[number] = -1
        self._new_l2.add(number)
        self._disk.l1[number] = offset | layout.COPIED
        self.touch_l1(number)

    def unlink_l2(self, number: int) -> None:
        """Let L1 entry ``number`` lead nowhere, and free its table late."""
        self.release(self._disk.l1[number] & layout.HOST_OFFSET)
        self._disk.l1[number] = 0
        self._disk.forget_table(number)
        self._dirty_l2.pop(number, None)
        self._new_l2.discard(number)
        self._dirty_l1.add(number)

    def touch_l1(self, number: int) -> None:
        """L1 entry ``number`` was changed."""
        self._dirty_l1.add(number)
        self._shows = True

    def release(self, offset: int, clusters: int = 1) -> None:
        """Free these clusters (one reference each), late: nothing in memory leads to them now."""
        if self._unlinked:
            start, count = self._unlinked[-1]
            if start + count * self._disk.geometry.cluster_size == offset:
                self._unlinked[-1] = start, count + clusters
                return
        self._unlinked.append((offset, clusters))

    @property
    def too_dirty(self) -> bool:
        """Whether more is dirty than memory may be used for."""
        tables = len(self._dirty_l2) + self.allocator.dirty_blocks
        waiting = len(self._unlinked) * _FREED_BYTES
        return tables * self._disk.geometry.cluster_size + waiting > self.dirty_limit

    async def relieve(self) -> None:
        """Flush if too much is dirty, and sync if too much waits for that; without the lock."""
        self.check()
        if self.too_dirty:
            await self.flush()
        if len(self._written) > _WRITTEN_MOST:
            await self.sync()

    async def leases_ended(self) -> None:
        """Wait until every lease that is held now has ended.

        Raises:
            ConflictError: one is held for too long.
        """
        ended: list[None] = []
        self.leases.defer(lambda: ended.append(None))
        pause, waited = 0.0001, 0.0
        while not ended:
            if waited > _LONGEST_LEASE:
                raise ConflictError(
                    f"'{self._disk.image.name()}': somebody holds a lease on its mappings; end it "
                    "first"
                )
            if is_blocking():
                time.sleep(pause)  # noqa: ASYNC251 - the blocking face blocks
            else:
                import asyncio

                await asyncio.sleep(pause)
            waited += pause
            pause = min(pause * 2, 0.01)
            self.leases.settle()

    # -- trouble

    @property
    def broken(self) -> bool:
        """Whether nothing more can be written."""
        return self._broken is not None

    def check(self) -> None:
        """Raise what broke this image for writing, if anything did."""
        if self._broken is not None:
            # Without the calls that met it before, whose buffers it would keep.
            raise self._broken.with_traceback(None)

    def give_up(self, why: str, cause: BaseException) -> None:
        """Nobody knows what reached the disk, so nothing more is written."""
        if self._broken is None:
            name = self._disk.image.name()
            self._broken = StorageError(
                f"'{name}' can no longer be written, because {why} ({cause}); close it, and check "
                "it before it is used again",
                filename=name,
            )
            self._disk.forbid_writing()

    @asynccontextmanager
    async def condemning(self) -> AsyncGenerator[None]:
        """An image that contradicts itself in here is not written any more."""
        try:
            yield
        except CorruptImageError as error:
            await self.condemn(error)
            raise

    async def condemn(self, error: CorruptImageError) -> None:
        """The image contradicts itself: stop writing, and mark it, as far as that can be done."""
        if self._broken is not None:
            return
        self._broken = CorruptImageError(
            f"{error}; nothing more is written to it",
            offset=error.offset,
            field=error.field,
            value=error.value,
        )
        self._disk.forbid_writing()
        if self._disk.header.version > 2:  # noqa: PLR2004 (a version is its own best name)
            features = self._disk.header.incompatible_features | layout.CORRUPT
            try:
                await self._disk.image.write(
                    features.to_bytes(8, "big"), layout.INCOMPATIBLE_FEATURES_OFFSET
                )
                await self._disk.image.sync()
            except StorageError:
                return  # its damage will be met again
            self._disk.header = attrs.evolve(self._disk.header, incompatible_features=features)

    # -- to the disk

    async def flush(self) -> None:
        """Write everything that is dirty, in order.

        Raises:
            StorageError: not all was written; what was not stays dirty. After a failed *sync* the
                image cannot be written any more, since nobody knows what reached the disk.
        """
        async with self._flushing:
            await self._flush()

    async def _flush(self) -> None:
        self.check()
        await self._free_ready()
        async with self.lock:
            work = self._take()
        if work is not None:
            await to_the_end(self._write(work))

    @asynccontextmanager
    async def not_flushing(self) -> AsyncGenerator[None]:
        """Nobody flushes while this is held."""
        async with self._flushing:
            yield

    @asynccontextmanager
    async def all_at_once(self) -> AsyncGenerator[None]:
        """Changes made while this is held reach the disk with ``switch``, all of them or none.

        It begins with nothing dirty, and nothing to be freed but what a lease keeps; nobody flushes
        meanwhile.
        """
        async with self._flushing:
            await self._flush()
            if self._written or self._ready:
                # What was let go shall not count any more.
                await self._barrier(self._storages())
                await self._flush()
            yield

    @asynccontextmanager
    async def forgetting(self) -> AsyncGenerator[None]:
        """Forget what is dirty; what waited to be freed is leaked. Nobody flushes meanwhile."""
        async with self._flushing:
            self._dirty_l2, self._new_l2, self._dirty_l1 = {}, set(), set()
            self._shows = False
            self._unlinked, self._written, self._waiting = [], [], []
            self._ready.clear()
            yield

    async def switch(self, **fields: int) -> None:
        """Change the header, and with it all counts, in one write: inside ``all_at_once``.

        Counts that have changed go to new places, and so does the refcount table.
        """
        async with self.lock:
            await self.allocator.relocate()
            work = self._take()
        assert work is not None
        await to_the_end(self._write(work, fields))

    async def sync(self) -> None:
        """Make what was flushed durable, and free what waited for that."""
        async with self._flushing:
            self.check()
            await self._barrier(self._storages())
            await self._free_ready()

    async def update_header(self, **fields: int) -> None:
        """Change fields of the header at once: after all that was written, and before the rest.

        Raises:
            StorageError: it could not be written; the image cannot be written any more.
        """
        async with self._flushing:
            self.check()
            await to_the_end(self._write_header(fields))

    async def _write_header(self, fields: dict[str, int]) -> None:
        await self._barrier(self._storages())
        header = attrs.evolve(self._disk.header, **fields)  # type: ignore[arg-type]
        try:
            await self._disk.image.write(header.fixed_bytes(), 0)
            self._disk.follow(header)
        except BaseException as error:
            self.give_up("the header could not be written", error)
            raise
        await self._barrier(self._storages())

    async def change_header(self, **fields: int) -> None:
        """``update_header`` for one who is inside ``all_at_once``."""
        await to_the_end(self._write_header(fields))

    async def rewrite_header(self, header: Header) -> None:
        """Write another header, its extensions and names included; otherwise ``update_header``.

        Raises:
            LimitExceededError: there is no room for it; nothing was written.
        """
        from underlay_drivers.qcow2.header_writing import plan_header

        async with self._flushing:
            self.check()
            steps, placed = plan_header(self._disk.header, header)
            await to_the_end(self._take_steps(steps))
            self._disk.follow(placed)

    async def _take_steps(self, steps: list[tuple[int, bytes]]) -> None:
        image = self._disk.image
        await self._barrier(self._storages())
        try:
            for offset, data in steps:
                await image.write(data, offset)
                await self._barrier([image])
        except UnderlayError as error:
            self.give_up("the header could not be written", error)
            raise

    async def finish(self) -> None:
        """At the end of a session: free what is still waiting, and cut the file's free tail.

        Call it when the disk is flushed and synced, and used no more.
        """
        if self._broken is not None or self._dirty_l2 or self._dirty_l1 or self._unlinked:
            return
        # Nobody can use a closed disk's mappings, whatever leases are still held.
        self._ready.extend(self._waiting)
        self._waiting = []
        if not self.allocator.highest_freed and not self._ready and not self.allocator.dirty_blocks:
            return
        await self.flush()
        await self._cut_tail()
        await self._barrier(self._storages())

    def _storages(self) -> list[StorageHandle]:
        """What a barrier syncs: the data first."""
        return list(reversed(self._disk.collect_storage_dependencies()))

    async def _barrier(self, storages: list[StorageHandle]) -> None:
        """Sync; then what was unlinked on disk before is durably unlinked."""
        written, self._written = self._written, []
        try:
            for storage in storages:
                if storage.writable():
                    await storage.sync()
        except UnderlayError as error:
            self.give_up("a sync failed", error)
            raise
        except BaseException:  # cancelled: the next barrier tells
            self._written = written + self._written
            raise
        if written:
            self._waiting.append(written)
            self.leases.defer(lambda: self._let_free(written))

    def _let_free(self, batch: list[Freed]) -> None:
        """No lease is older than these any more."""
        if batch in self._waiting:
            self._waiting.remove(batch)
            self._ready.append(batch)

    def _take(self) -> _Work | None:
        """Copies of all that is dirty, which is clean from now on; under the lock."""
        refcounts = self.allocator.take_changes()
        if refcounts is None and not (self._dirty_l2 or self._dirty_l1 or self._unlinked):
            return None
        new: dict[int, int] = {}
        changed: dict[int, int] = {}
        new_bytes: list[tuple[int, bytes]] = []
        changed_bytes: list[tuple[int, bytes]] = []
        for number in sorted(self._dirty_l2):
            pieces = self._dirty_l2[number]
            offset = self._disk.l1[number] & layout.HOST_OFFSET
            table = self._disk.cached_table(number)
            assert table is not None
            if number in self._new_l2:
                new[number] = pieces
                new_bytes.append((offset, packed(table)))
            else:
                changed[number] = pieces
                changed_bytes += self._pieces(offset, table, pieces)
        work = _Work(
            refcounts=refcounts,
            new=new,
            new_bytes=new_bytes,
            changed=changed,
            changed_bytes=changed_bytes,
            l1=frozenset(self._dirty_l1),
            l1_bytes=self._l1_sectors(),
            shows=self._shows,
            unlinked=self._unlinked,
        )
        self._dirty_l2 = {}
        self._new_l2 = set()
        self._dirty_l1 = set()
        self._shows = False
        self._unlinked = []
        return work

    def _pieces(self, offset: int, table: Table, pieces: int) -> list[tuple[int, bytes]]:
        """The changed pieces of a table, those that follow each other as one."""
        words = self._slice // 8
        found: list[tuple[int, bytes]] = []
        first = 0
        count = len(table) // words
        while first < count:
            if not pieces >> first & 1:
                first += 1
                continue
            last = first + 1
            while last < count and pieces >> last & 1:
                last += 1
            found.append(
                (offset + first * self._slice, packed(table[first * words : last * words]))
            )
            first = last
        return found

    def _l1_sectors(self) -> list[tuple[int, bytes]]:
        l1 = self._disk.l1
        base = self._disk.header.l1_table_offset
        found: list[tuple[int, bytes]] = []
        for sector in sorted({number // _SECTOR_ENTRIES for number in self._dirty_l1}):
            first = sector * _SECTOR_ENTRIES
            found.append((base + first * 8, packed(l1[first : first + _SECTOR_ENTRIES])))
        return found

    async def _write(self, work: _Work, fields: dict[str, int] | None = None) -> None:
        """Write what was taken; what cannot be written is dirty again."""
        counted = linked = False
        try:
            await self._write_unlinked(work, fields or {})
            counted = True
            moved = work.refcounts is not None and work.refcounts.moved is not None
            if work.shows and not moved:  # moving the table has synced all of it
                await self._barrier(self._storages())
            linked = True
            await self._write_all(work.changed_bytes)
            await self._write_all(work.l1_bytes)
        except BaseException:
            async with self.lock:
                self._put_back(work, counted=counted, linked=linked)
            raise
        async with self.lock:
            self._written += work.unlinked
            for number in (*work.new, *work.changed):
                if number not in self._dirty_l2:
                    self._disk.unpin_table(number)

    async def _write_unlinked(self, work: _Work, fields: dict[str, int]) -> None:
        """Everything to which nothing on disk leads yet; of refcount blocks also what leads there.

        Afterwards the counts are durable with the next barrier.
        """
        changes = work.refcounts
        if changes is not None:
            await self._write_all(changes.block_bytes)
        await self._write_all(work.new_bytes)
        if changes is None:
            return
        if changes.moved is not None:
            offset, table, clusters = changes.moved
            await self._disk.image.write(table, offset)
            pointer = {"refcount_table_offset": offset, "refcount_table_clusters": clusters}
            await self._write_header(pointer | fields)
            self._written += changes.superseded
        elif changes.entry_bytes:
            await self._barrier([self._disk.image])
            await self._write_all(changes.entry_bytes)
            if not work.shows:
                await self._barrier([self._disk.image])
        self.allocator.written(changes)

    async def _write_all(self, pieces: list[tuple[int, bytes]]) -> None:
        for offset, data in pieces:
            await self._disk.image.write(data, offset)

    def _put_back(self, work: _Work, *, counted: bool, linked: bool) -> None:
        """Mark what was taken as dirty again; under the lock."""
        if work.refcounts is not None and not counted:
            self.allocator.put_back(work.refcounts)
        for number, pieces in (*work.new.items(), *work.changed.items()):
            if self._disk.l1[number]:
                self._dirty_l2[number] = self._dirty_l2.get(number, 0) | pieces
        if not linked:
            self._new_l2 |= work.new.keys() & self._dirty_l2.keys()
        self._dirty_l1 |= work.l1
        self._shows = self._shows or work.shows
        self._unlinked = work.unlinked + self._unlinked

    # -- giving space back

    async def _free_ready(self) -> None:
        """Punch and count down what nobody can reach any more."""
        self.leases.settle()
        while self._ready:
            parts = self._in_parts(self._ready.popleft())
            for part in parts:
                try:
                    await self._free(part)
                except BaseException:
                    self._ready.append([run for left in parts for run in left])
                    raise

    def _in_parts(self, freed: list[Freed]) -> Iterator[list[Freed]]:
        """The same, so many clusters at a time."""
        size = self._disk.geometry.cluster_size
        part: list[Freed] = []
        room = _FREED_AT_ONCE
        for offset, clusters in freed:
            done = 0
            while done < clusters:
                count = min(clusters - done, room)
                part.append((offset + done * size, count))
                done += count
                room -= count
                if not room:
                    yield part
                    part, room = [], _FREED_AT_ONCE
        if part:
            yield part

    async def _free(self, freed: list[Freed]) -> None:
        size = self._disk.geometry.cluster_size
        references: dict[int, int] = {}
        for offset, clusters in freed:
            for cluster in range(offset, offset + clusters * size, size):
                references[cluster] = references.get(cluster, 0) + 1
        try:
            async with self.lock:
                unused = [
                    cluster
                    for cluster, count in references.items()
                    if await self.allocator.refcount(cluster) == count
                ]
                self.allocator.stop_packing(unused)
            # Before they can be used again, and so not under the lock.
            await self._punch(sorted(unused))
            async with self.lock:
                while references:
                    cluster = next(reversed(references))
                    if not await self.allocator.change(cluster, -references[cluster]):
                        self.allocator.metadata.discard(cluster)
                    del references[cluster]
        except CorruptImageError as error:
            await self.condemn(error)
            raise
        except BaseException:
            self._ready.append(
                [(cluster, 1) for cluster in references for _ in range(references[cluster])]
            )
            raise

    async def _punch(self, clusters: list[int]) -> None:
        """Give clusters' space back to the host; keeping it would do no harm."""
        size = self._disk.geometry.cluster_size
        start = 0
        for position in range(1, len(clusters) + 1):
            if position < len(clusters) and clusters[position] == clusters[position - 1] + size:
                continue
            length = clusters[position - 1] + size - clusters[start]
            try:
                await self._disk.image.discard(clusters[start], length)
            except StorageError:
                return
            start = position

    async def _cut_tail(self) -> None:
        """Cut the file behind its last cluster in use, if this session has freed what is there."""
        image = self._disk.image
        async with self.lock:
            end = await self.allocator.end_of_use()
        if end <= self.allocator.highest_freed and end < image.size():
            try:
                await image.resize(end)
            except UnderlayError:
                return  # a block device, say: the tail stays
