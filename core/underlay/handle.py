"""What drivers and the core hold instead of a bare storage.

One ``StorageHandle`` stands before each open storage and does once what every storage and driver would
otherwise do for itself: it waits as the face that drives it wants, cuts requests to what the storage can
take, turns misaligned ones into aligned ones (bounce buffers, and read-modify-write under a range
lock), and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, cast

import attrs

from underlay.buffers import (
    AnyBuffer,
    address_of,
    aligned_buffer,
    copy_into,
    flat,
    flat_writable,
    join,
    split_at,
    total,
)
from underlay.face import home_loop, in_loop, in_worker, is_blocking
from underlay.locks import RangeLocks
from underlay.storage import (
    AnyStorage,
    BlockingStorage,
    Extent,
    PreallocateMode,
    ReadBuffers,
    Storage,
    is_blocking_storage,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["StorageHandle", "StorageStats"]

#: How many buffers one call may carry (IOV_MAX on Linux).
_MOST_BUFFERS = 1024


@attrs.define
class StorageStats:
    """What went through one handle. Requests of the blocking hot path are counted, not their bytes."""

    read_requests: int = 0
    read_bytes: int = 0
    write_requests: int = 0
    write_bytes: int = 0
    syncs: int = 0


class StorageHandle:
    """An open storage, as seen by drivers. All I/O methods are coroutines of either face.

    ``owned`` says whether closing the handle closes the storage (it was opened by name) or leaves it
    (the caller gave it).
    """

    __slots__ = (
        "_blocking",
        "_coroutine",
        "_home",
        "_locks",
        "closed",
        "inline_readv",
        "mem_align",
        "owned",
        "req_align",
        "stats",
        "storage",
        "try_readv",
    )

    def __init__(self, storage: AnyStorage, *, owned: bool) -> None:
        self.storage = storage
        self.owned = owned
        self.closed = False
        self.stats = StorageStats()
        self.req_align = storage.req_align()
        self.mem_align = storage.mem_align()
        self._locks = RangeLocks()
        self._blocking: BlockingStorage | None = None
        self._coroutine: Storage | None = None
        self._home = None
        #: For the hot path: the storage's own ``readv``, where it may be called as it is.
        self.inline_readv: Callable[[ReadBuffers, int], None] | None = None
        #: The same for ``try_readv``.
        self.try_readv: Callable[[ReadBuffers, int], int | None] | None = None
        if is_blocking_storage(storage):
            self._blocking = cast("BlockingStorage", storage)
            if self.req_align == 1 and self.mem_align == 1:
                self.inline_readv = self._blocking.readv
                self.try_readv = self._blocking.try_readv
        else:
            self._coroutine = cast("Storage", storage)
            self._home = home_loop()

    # -- facts

    def name(self) -> str:
        """See ``Storage.name``."""
        return self.storage.name()

    def size(self) -> int:
        """See ``Storage.size``."""
        return self.storage.size()

    def writable(self) -> bool:
        """See ``Storage.writable``."""
        return self.storage.writable()

    def identity(self) -> Hashable | None:
        """See ``Storage.identity``."""
        return self.storage.identity()

    def descriptor(self) -> int | None:
        """See ``Storage.descriptor``."""
        return self.storage.descriptor()

    def resolve_relative(self, name: str) -> str:
        """See ``Storage.resolve_relative``."""
        return self.storage.resolve_relative(name)

    def describe(self) -> Mapping[str, object]:
        """See ``Storage.describe``."""
        return self.storage.describe()

    # -- reading

    async def read(self, buffer: AnyBuffer, offset: int) -> None:
        """Fill one buffer with the bytes at host ``offset``; zeroes past the end."""
        view = flat_writable(buffer)
        if view.nbytes:
            await self.readv((view,), offset)

    async def read_bytes(self, offset: int, length: int) -> bytearray:
        """``length`` bytes from host ``offset``; zeroes past the end."""
        out = bytearray(length)
        if length:
            await self.readv((out,), offset)
        return out

    async def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """Fill flat, non-empty buffers one after the other. Any alignment."""
        if len(buffers) > _MOST_BUFFERS:
            for at in range(0, len(buffers), _MOST_BUFFERS):
                batch = buffers[at : at + _MOST_BUFFERS]
                await self.readv(batch, offset)
                offset += total(batch)
            return
        length = total(buffers)
        if self._aligned(buffers, offset, length):
            await self._readv(buffers, offset, length)
            return
        mask = self._padding_mask()
        start = offset & ~mask
        bounce = aligned_buffer((offset + length + mask & ~mask) - start)
        await self._readv((bounce,), start, len(bounce))
        copy_into(buffers, bounce[offset - start :])

    async def _readv(self, buffers: ReadBuffers, offset: int, length: int) -> None:
        self.stats.read_requests += 1
        self.stats.read_bytes += length
        blocking = self._blocking
        if blocking is None:
            await self._call_coroutine("readv", buffers, offset)
        elif is_blocking():
            blocking.readv(buffers, offset)
        else:
            done = blocking.try_readv(buffers, offset) or 0
            if done < length:
                rest = split_at([memoryview(buffer) for buffer in buffers], done)[1]
                if self.req_align > 1 or self.mem_align > 1:
                    rest, done = [memoryview(buffer) for buffer in buffers], 0
                await in_worker(blocking.readv, rest, offset + done)

    # -- writing

    async def write(self, data: AnyBuffer, offset: int) -> None:
        """Write one buffer at host ``offset``."""
        view = flat(data)
        if view.nbytes:
            await self.writev((view,), offset)

    async def writev(
        self, buffers: Sequence[memoryview | bytearray | bytes], offset: int
    ) -> None:
        """Write flat, non-empty buffers one after the other. Any alignment."""
        if len(buffers) > _MOST_BUFFERS:
            for at in range(0, len(buffers), _MOST_BUFFERS):
                batch = buffers[at : at + _MOST_BUFFERS]
                await self.writev(batch, offset)
                offset += total(batch)
            return
        length = total(buffers)
        if self.req_align == 1 and self.mem_align == 1:
            await self._writev(buffers, offset, length)
        elif self._aligned(buffers, offset, length):
            async with self._locks.hold(offset, offset + length, exclusive=False):
                await self._writev(buffers, offset, length)
        else:
            await self._write_misaligned(buffers, offset, length)

    async def _write_misaligned(
        self, buffers: Sequence[memoryview | bytearray | bytes], offset: int, length: int
    ) -> None:
        """Read what surrounds the data, and write whole blocks; alone on their range."""
        mask = self._padding_mask()
        start = offset & ~mask
        end = offset + length + mask & ~mask
        bounce = aligned_buffer(end - start)
        async with self._locks.hold(start, end, exclusive=True):
            block = mask + 1
            if offset > start:
                await self._readv((bounce[:block],), start, block)
            if end > offset + length and (end - block > start or offset == start):
                await self._readv((bounce[-block:],), end - block, block)
            join(buffers, bounce[offset - start :])
            wanted = max(self.size(), offset + length)
            await self._writev((bounce,), start, len(bounce))
            if self.size() > wanted:
                # The padding of the last block must not make the object longer.
                await self._call("resize", wanted)

    async def _writev(
        self, buffers: Sequence[memoryview | bytearray | bytes], offset: int, length: int
    ) -> None:
        self.stats.write_requests += 1
        self.stats.write_bytes += length
        await self._call("writev", buffers, offset)

    async def write_zeroes(self, offset: int, length: int, *, allocate: bool = False) -> None:
        """Make a range read as zeroes, cut at the object's end; any alignment."""
        length = min(length, self.size() - offset)
        if length <= 0:
            return
        start, end = self._inner_range(offset, length, self.storage.zero_align())
        if start >= end:
            await self._write_zero_bytes(offset, length)
            return
        if start > offset:
            await self._write_zero_bytes(offset, start - offset)
        async with self._locks.hold(start, end, exclusive=False):
            await self._call("write_zeroes", start, end - start, allocate)
        if offset + length > end:
            await self._write_zero_bytes(end, offset + length - end)

    async def _write_zero_bytes(self, offset: int, length: int) -> None:
        zeroes = memoryview(bytes(min(length, 1 << 20)))
        while length:
            chunk = zeroes[: min(length, len(zeroes))]
            await self.writev((chunk,), offset)
            offset += len(chunk)
            length -= len(chunk)

    async def discard(self, offset: int, length: int) -> None:
        """Give space back: the aligned blocks inside the range, whose content is undefined then."""
        start, end = self._inner_range(offset, length, self.storage.discard_align())
        if start < end:
            async with self._locks.hold(start, end, exclusive=False):
                await self._call("discard", start, end - start)

    # -- the rest of the contract

    async def extent_at(self, offset: int) -> Extent:
        """See ``Storage.extent_at``."""
        return cast("Extent", await self._call("extent_at", offset))

    async def flush(self) -> None:
        """See ``Storage.flush``."""
        await self._call("flush")

    async def sync(self) -> None:
        """See ``Storage.sync``."""
        self.stats.syncs += 1
        await self._call("sync")

    async def resize(
        self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF
    ) -> None:
        """See ``Storage.resize``."""
        await self._call("resize", size, preallocation)

    async def invalidate_cache(self) -> None:
        """See ``Storage.invalidate_cache``."""
        await self._call("invalidate_cache")

    async def close(self) -> None:
        """Close the storage if it is the handle's own. May be called again."""
        if not self.closed:
            self.closed = True
            self.inline_readv = None
            self.try_readv = None
            if self.owned:
                await self._call("close")

    # -- helpers

    async def _call(self, method: str, *args: object) -> object:
        """Call a method of the storage, waiting as its rung and the driving face want."""
        if self._blocking is not None:
            return await in_worker(getattr(self._blocking, method), *args)
        return await self._call_coroutine(method, *args)

    async def _call_coroutine(self, method: str, *args: object) -> object:
        assert self._home is not None
        return await in_loop(self._home, getattr(self._coroutine, method), *args)

    def _padding_mask(self) -> int:
        return max(self.req_align, self.mem_align) - 1

    def _aligned(
        self, buffers: Sequence[memoryview | bytearray | bytes], offset: int, length: int
    ) -> bool:
        if self.req_align == 1 and self.mem_align == 1:
            return True
        if (offset | length) & (self.req_align - 1):
            return False
        if self.mem_align == 1:
            return True
        mask = self.mem_align - 1
        for buffer in buffers:
            address = address_of(buffer)
            if address is None or (address | len(buffer)) & mask:
                return False
        return True

    @staticmethod
    def _inner_range(offset: int, length: int, align: int) -> tuple[int, int]:
        return offset + align - 1 & ~(align - 1), offset + length & ~(align - 1)
