"""Freeing clusters late: their way from an entry that was changed to being free.

What an entry lets go may be used again once its removal is durable, and once every lease has ended
that is older than that. Then its space is given back to the host, and it is counted down.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from underlay.errors import CorruptImageError, StorageError, UnderlayError
from underlay.lease import Leases
from underlay_drivers.qcow2.dirty import DirtyState, Freed

if TYPE_CHECKING:
    from underlay.handle import StorageHandle
    from underlay.steps import Steps
    from underlay_drivers.qcow2.allocation import Allocator
    from underlay_drivers.qcow2.dependencies import Dependencies

__all__ = ["LateFreeing"]

#: Clusters that are freed in one go.
_FREED_AT_ONCE: Final = 1 << 12


class LateFreeing(DirtyState):
    """The clusters that wait to be freed, and the barriers that they wait for."""

    __slots__ = ("_ready", "_steps", "_waiting", "_written", "leases")

    def __init__(self, disk: Dependencies, allocator: Allocator, *, dirty_limit: int) -> None:
        super().__init__(disk, allocator, dirty_limit=dirty_limit)
        self.leases = Leases()
        # What was let go, on its way: written; durable; and out of every lease.
        self._written: list[Freed] = []
        self._waiting: list[list[Freed]] = []
        self._ready: deque[list[Freed]] = deque()
        #: The bytes that somebody waits for to be free.
        self._steps: Steps | None = None

    def _storages(self) -> list[StorageHandle]:
        """What a barrier syncs: the data first."""
        return list(reversed(self._disk.collect_storage_dependencies()))

    async def _barrier(self, storages: list[StorageHandle], *, durable: bool = False) -> None:
        """Order what was written before what follows; what was unlinked on disk before stays so.

        A sync does that, among several objects nothing else, and it makes all of it ``durable``.
        """
        written, self._written = self._written, []
        storages = [storage for storage in storages if storage.writable()]
        try:
            for storage in storages:
                await (storage.sync() if durable or len(storages) > 1 else storage.barrier())
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

    def forget_freed(self) -> None:
        """Free nothing of what waits for that: somebody else has."""
        self._unlinked, self._written, self._waiting = [], [], []
        self._ready.clear()

    async def _count_down_shared(self) -> None:
        """Count down what others use too; under the lock.

        Nothing of that is given back or used anew, so it need not wait for a lease.
        """
        await self.allocator.believe()
        size = self._disk.geometry.cluster_size
        for batch in list(self._waiting):
            left: list[Freed] = []
            try:
                while batch:
                    offset, clusters = batch[-1]
                    last = offset + (clusters - 1) * size
                    if await self.allocator.refcount(last) > 1:
                        await self.allocator.change(last, -1)
                    else:
                        left.append((last, 1))
                    batch[-1:] = [(offset, clusters - 1)] if clusters > 1 else []
            finally:
                batch.extend(left)

    # -- giving space back

    async def _free_ready(self) -> None:
        """Punch and count down what nobody can reach any more."""
        self.leases.settle()
        while self._ready:
            parts = self._in_parts(self._ready.popleft())
            for part in parts:
                try:
                    await self._free(part)
                    if self._steps is not None:
                        self._steps.did(self._bytes_of(part))
                except BaseException:
                    self._ready.append([run for left in parts for run in left])
                    raise

    def _bytes_of(self, *freed: list[Freed]) -> int:
        size = self._disk.geometry.cluster_size
        return sum(clusters for part in freed for _, clusters in part) * size

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
                if not references.keys() <= self.allocator.metadata:
                    await self.allocator.believe()  # of metadata it is known what leads there
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
                    cluster, count = references.popitem()
                    try:
                        left = await self.allocator.change(cluster, -count)
                    except KeyboardInterrupt:
                        raise  # it may be counted down already, so it is leaked at worst
                    except BaseException:
                        references[cluster] = count
                        raise
                    if not left:
                        self.allocator.metadata.discard(cluster)
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
        async with self.lock, self.condemning():
            end = await self.allocator.end_of_use()
            if end > self.allocator.highest_freed or end >= image.size():
                return
            await self.allocator.believe()
            try:
                await image.resize(end)
            except UnderlayError:
                return  # a block device, say: the tail stays
