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
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs

from underlay.errors import ConflictError
from underlay.face import is_blocking, to_the_end
from underlay.locks import Lock
from underlay_drivers.qcow2.dirty import Freed, Work
from underlay_drivers.qcow2.freeing import LateFreeing
from underlay_drivers.qcow2.header_writing import plan_header

if TYPE_CHECKING:
    from underlay.steps import Steps
    from underlay_drivers.qcow2.allocation import Allocator
    from underlay_drivers.qcow2.dependencies import Dependencies
    from underlay_drivers.qcow2.header import Header
    from underlay_drivers.qcow2.tables import Table

__all__ = ["HeaderSwitch", "Writeback"]

#: Seconds to wait for leases to end.
_LONGEST_LEASE: Final = 10.0
#: Items that may wait for a barrier.
_WRITTEN_MOST: Final = 1 << 16


@attrs.frozen(kw_only=True)
class HeaderSwitch:
    """From one header to another; the disk is what the new one says once that is durable."""

    #: The new header for the one that there is when nobody else can change it any more.
    change: Callable[[Header], Header]
    #: The L1 table that the new one leads to, if that is another; nothing in it is dirty.
    l1: Table | None = None
    #: What nothing leads to any more then, to be freed late.
    freed: Sequence[Freed] = ()


_NO_SWITCH: Final = HeaderSwitch(change=lambda header: header)


class Writeback(LateFreeing):
    """Brings one writable image's dirty state to the disk, in order."""

    __slots__ = ("_flushing",)

    def __init__(self, disk: Dependencies, allocator: Allocator, *, dirty_limit: int) -> None:
        super().__init__(disk, allocator, dirty_limit=dirty_limit)
        self._flushing = Lock()

    @property
    def hinders(self) -> bool:
        """Whether a writer has to ``relieve`` it first, or cannot write at all."""
        return self.broken or self.too_dirty or len(self._written) > _WRITTEN_MOST

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

    # -- the order

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

    async def sync(self) -> None:
        """Make what was flushed durable, and free what waited for that."""
        async with self._flushing:
            self.check()
            await self._barrier(self._storages(), durable=True)
            await self._free_ready()

    async def free_all(self, steps: Steps) -> None:
        """Flush and sync, and free what waited for that: its bytes are the last of ``steps``."""
        await self.flush()
        waiting = self._bytes_of(self._unlinked, self._written, *self._waiting, *self._ready)
        steps.reach(steps.total - waiting)
        self._steps = steps
        try:
            await self.sync()
        finally:
            self._steps = None

    async def finish(self) -> None:
        """At the end of a session: free what is still waiting, and cut the file's free tail.

        Call it when the disk is flushed and synced, and used no more.
        """
        if not self.at_peace:
            return
        # Nobody can use a closed disk's mappings, whatever leases are still held.
        self._ready.extend(self._waiting)
        self._waiting = []
        if not self.allocator.highest_freed and not self._ready and not self.allocator.dirty_blocks:
            return
        await self.flush()
        await self._cut_tail()
        await self._barrier(self._storages(), durable=True)

    async def _write(self, work: Work, switch: HeaderSwitch = _NO_SWITCH) -> None:
        """Write what was taken; what cannot be written is dirty again."""
        counted = linked = False
        try:
            await self._write_unlinked(work, switch)
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

    async def _write_unlinked(self, work: Work, switch: HeaderSwitch) -> None:
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

            def lead(header: Header) -> Header:
                return attrs.evolve(
                    switch.change(header),
                    refcount_table_offset=offset,
                    refcount_table_clusters=clusters,
                )

            await self._lead(attrs.evolve(switch, change=lead))
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

    # -- with nobody flushing, and changes of the header

    @asynccontextmanager
    async def not_flushing(self) -> AsyncGenerator[None]:
        """Nobody flushes while this is held."""
        async with self._flushing:
            yield

    @asynccontextmanager
    async def all_at_once(self) -> AsyncGenerator[None]:
        """Changes made while this is held reach the disk with ``switch_all``, all or none.

        It begins with nothing dirty, and what others use too is counted without what was let go;
        nobody flushes meanwhile.
        """
        async with self._flushing:
            await self._flush()
            if self._written or self._ready:
                # What was let go shall not count any more.
                await self._barrier(self._storages())
                await self._flush()
            if self._waiting:
                async with self.lock:
                    await self._count_down_shared()
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

    async def switch_header(self, switch: HeaderSwitch) -> None:
        """Let the image have another header: after all that was written, and before the rest.

        A crash leaves the old one or the new one. It happens whole or not at all, even where the
        caller is cancelled.

        Raises:
            LimitExceededError: there is no room for it; nothing was written.
            StorageError: it could not be written; the image cannot be written any more.
        """

        async def alone() -> None:
            async with self._flushing:
                self.check()
                await self._lead(switch)

        await to_the_end(alone())

    async def switch_header_now(self, switch: HeaderSwitch) -> None:
        """``switch_header`` for one who is inside ``all_at_once``."""
        await to_the_end(self._lead(switch))

    async def switch_all(self, switch: HeaderSwitch) -> None:
        """``switch_header_now``, and with it all counts, in one write.

        Counts that have changed go to new places, and so does the refcount table.
        """
        async with self.lock:
            await self.allocator.relocate()
            work = self._take()
        assert work is not None
        await to_the_end(self._write(work, switch))

    async def _lead(self, switch: HeaderSwitch) -> None:
        """Write another header, durably, and let the disk be what it says."""
        image = self._disk.image
        steps, header = plan_header(self._disk.header, switch.change(self._disk.header))
        await self._barrier(self._storages())
        try:
            for number, (offset, data) in enumerate(steps):
                if number:
                    await self._barrier([image])
                await image.write(data, offset)
            self._disk.follow(header, switch.l1)
        except BaseException as error:
            self.give_up("the header could not be written", error)
            raise
        await self._barrier([image])
        for offset, clusters in switch.freed:
            self.release(offset, clusters)
