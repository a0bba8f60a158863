"""What drivers and the core hold instead of a bare storage.

One ``StorageHandle`` stands before each open storage and does once what every storage and driver
would otherwise do for itself: it waits as the face that drives it wants, cuts requests to what the
storage can take, pads misaligned ones to whole blocks (``padding``; read-modify-write under a
range lock), and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, cast

import attrs

from underlay.buffers import (
    AnyBuffer,
    aligned_buffer,
    flat,
    flat_writable,
    split_at,
    total,
)
from underlay.errors import ClosedError, UnsupportedOperationError
from underlay.face import home_loop, in_loop, in_worker, is_blocking, run_blocking, to_the_end
from underlay.locks import RangeLocks
from underlay.padding import BOUNCE_MOST, Padding, inner_range
from underlay.steps import Steps
from underlay.storage import (
    AnyStorage,
    BlockingStorage,
    Extent,
    PreallocateMode,
    ReadBuffers,
    Reopening,
    Storage,
    WriteBuffers,
    is_blocking_storage,
)
from underlay.time_limit import check_time_to_read

if TYPE_CHECKING:
    import asyncio

__all__ = ["INLINE_MOST", "MOST_BUFFERS", "StorageHandle", "StorageStats"]

#: How many buffers one call may carry (IOV_MAX on Linux).
MOST_BUFFERS = 1024
#: Reads of up to this many bytes are tried without a worker thread, which costs more than copying.
INLINE_MOST = 256 << 10
#: Bytes reserved by one call, where somebody wants to know how far it has come.
_RESERVED_AT_ONCE = 64 << 20
#: Past the end of every object.
_FAR = 1 << 63


@attrs.define
class StorageStats:
    """What went through one handle, in requests and bytes; the hot path of a disk passes it by."""

    read_requests: int = 0
    read_bytes: int = 0
    write_requests: int = 0
    write_bytes: int = 0
    syncs: int = 0


class StorageHandle:
    """An open storage, as seen by drivers. All I/O methods are coroutines of either face.

    ``owned`` says whether closing the handle closes the storage (it was opened by name) or leaves
    it (the caller gave it).
    """

    __slots__ = (
        "_blocking",
        "_coroutine",
        "_locks",
        "_padded",
        "_padding",
        "closed",
        "inline_readv",
        "inline_writev",
        "mem_align",
        "owned",
        "req_align",
        "stats",
        "storage",
        "try_readv",
    )

    #: Whether callers may write to the storage itself, past the handle.
    bypassable: ClassVar[bool] = True

    def __init__(self, storage: AnyStorage, *, owned: bool) -> None:
        self.storage = storage
        self.owned = owned
        self.closed = False
        self.stats = StorageStats()
        self.req_align = storage.req_align()
        self.mem_align = storage.mem_align()
        self._locks = RangeLocks()
        self._blocking: BlockingStorage | None = None
        #: A coroutine storage, and the loop in which it lives.
        self._coroutine: tuple[Storage, asyncio.AbstractEventLoop] | None = None
        #: Whether requests may need padding to whole blocks.
        self._padding = Padding(self.req_align, self.mem_align)
        self._padded = self._padding.needed()
        #: For the hot path: the storage's own ``readv``, where it may be called as it is.
        self.inline_readv: Callable[[ReadBuffers, int], None] | None = None
        #: The same for ``writev``.
        self.inline_writev: Callable[[WriteBuffers, int], None] | None = None
        #: The same for ``try_readv``.
        self.try_readv: Callable[[ReadBuffers, int], int | None] | None = None
        if is_blocking_storage(storage):
            self._blocking = cast("BlockingStorage", storage)
            if not self._padded:
                self.inline_readv = self._blocking.readv
                self.inline_writev = self._blocking.writev
                self.try_readv = self._blocking.try_readv
        else:
            self._coroutine = cast("Storage", storage), home_loop()

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

    def reopening(self) -> Reopening | None:
        """See ``Storage.reopening``."""
        return self.storage.reopening()

    def descriptor(self) -> int | None:
        """See ``Storage.descriptor``."""
        return self.storage.descriptor()

    def real_path(self) -> str | None:
        """See ``Storage.real_path``."""
        return self.storage.real_path()

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
        if len(buffers) > MOST_BUFFERS:
            for at in range(0, len(buffers), MOST_BUFFERS):
                batch = buffers[at : at + MOST_BUFFERS]
                await self.readv(batch, offset)
                offset += total(batch)
            return
        length = total(buffers)
        if not self._padded or self._padding.fits(buffers, offset, length):
            await self._readv(buffers, offset, length)
        else:
            await self._padding.read(self._readv, buffers, offset, length)

    async def _readv(self, buffers: ReadBuffers, offset: int, length: int) -> None:
        self._check()
        self.stats.read_requests += 1
        self.stats.read_bytes += length
        blocking = self._blocking
        if blocking is None:
            await self._call("readv", buffers, offset)
        elif is_blocking():
            check_time_to_read()
            blocking.readv(buffers, offset)
        else:
            if length <= INLINE_MOST:
                done = blocking.try_readv(buffers, offset) or 0
                if done >= length:
                    return
                if done and not self._padded:
                    buffers = split_at([memoryview(buffer) for buffer in buffers], done)[1]
                    offset += done
            await in_worker(blocking.readv, buffers, offset)

    # -- writing

    async def write(self, data: AnyBuffer, offset: int) -> None:
        """Write one buffer at host ``offset``."""
        view = flat(data)
        if view.nbytes:
            await self.writev((view,), offset)

    async def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """Write flat, non-empty buffers one after the other. Any alignment."""
        if len(buffers) > MOST_BUFFERS:
            for at in range(0, len(buffers), MOST_BUFFERS):
                batch = buffers[at : at + MOST_BUFFERS]
                await self.writev(batch, offset)
                offset += total(batch)
            return
        length = total(buffers)
        self.stats.write_requests += 1
        self.stats.write_bytes += length
        if not self._padded:
            await self._call("writev", buffers, offset)
        elif self._padding.fits(buffers, offset, length):
            async with self._locks.hold(offset, offset + length, exclusive=False):
                await self._call("writev", buffers, offset)
        else:
            await self._write_misaligned(buffers, offset, length)

    async def _write_misaligned(self, buffers: WriteBuffers, offset: int, length: int) -> None:
        """Write the whole blocks around the data, alone on their range."""
        start, end = self._padding.around(offset, length)
        while True:
            # Padding that reaches past the object's end is cut off again. Whoever lets it grow
            # further meanwhile would lose that to the cut: such a write locks all that follows.
            crosses = end > self.size()
            async with self._locks.hold(start, _FAR if crosses else end, exclusive=True):
                if crosses or end <= self.size():
                    await self._in_one_go(self._write_blocks, buffers, offset, length, crosses)
                    return

    async def _write_blocks(
        self, buffers: WriteBuffers, offset: int, length: int, crosses_end: bool
    ) -> None:
        wanted_size = max(self.size(), offset + length)
        try:
            await self._padding.write(self._call, buffers, offset, length)
        finally:
            if crosses_end and self.size() > wanted_size:
                await self._call("resize", wanted_size)

    async def write_zeroes(self, offset: int, length: int, *, allocate: bool = False) -> None:
        """Make a range read as zeroes, cut at the object's end; any alignment."""
        length = min(length, self.size() - offset)
        if length <= 0:
            return
        start, end = inner_range(offset, length, self.storage.zero_align())
        if start >= end:
            await self._write_zero_bytes(offset, length)
            return
        await self._write_zero_bytes(offset, start - offset)
        try:
            await self._locked(start, end, "write_zeroes", start, end - start, allocate)
        except UnsupportedOperationError:
            await self._write_zero_bytes(start, end - start)
        await self._write_zero_bytes(end, offset + length - end)

    async def _write_zero_bytes(self, offset: int, length: int) -> None:
        if length <= 0:
            return
        zeroes = aligned_buffer(min(length, BOUNCE_MOST))
        while length:
            chunk = zeroes[:length]
            await self.writev((chunk,), offset)
            offset += len(chunk)
            length -= len(chunk)

    async def discard(self, offset: int, length: int) -> None:
        """Give space back: the aligned blocks inside the range, whose content is undefined then."""
        length = min(length, self.size() - offset)
        start, end = inner_range(offset, length, self.storage.discard_align())
        if start < end:
            # Where a storage cannot give space back, keeping it is as good.
            with suppress(UnsupportedOperationError):
                await self._locked(start, end, "discard", start, end - start)

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

    async def barrier(self) -> None:
        """See ``Storage.barrier``."""
        await self._call("barrier")

    async def resize(
        self,
        size: int,
        preallocation: PreallocateMode = PreallocateMode.OFF,
        steps: Steps | None = None,
    ) -> None:
        """See ``Storage.resize``. ``steps`` are the bytes that are reserved.

        Then they are reserved piece by piece, and cancelling that sets the length back.
        """
        old = at = self.size()
        try:
            while steps is not None and at + _RESERVED_AT_ONCE < size and preallocation.reserves:
                at += _RESERVED_AT_ONCE
                await self._resize(at, preallocation)
                steps.did(_RESERVED_AT_ONCE)
            await self._resize(size, preallocation)
            if steps is not None and preallocation.reserves:
                steps.did(max(size - at, 0))
        except BaseException:
            if at > old:
                await to_the_end(self._resize(old, PreallocateMode.OFF))
            raise

    async def _resize(self, size: int, preallocation: PreallocateMode) -> None:
        # Alone: no write is padding the object's end.
        await self._locked(0, _FAR, "resize", size, preallocation, exclusive=True)

    async def invalidate_cache(self) -> None:
        """See ``Storage.invalidate_cache``."""
        await self._call("invalidate_cache")

    async def close(self) -> None:
        """Close the storage if it is the handle's own. May be called again; cancelling waits."""
        if self.closed:
            return
        self.closed = True
        self.inline_readv = self.inline_writev = self.try_readv = None
        if self.owned:
            if self._blocking is not None:
                await in_worker(self._blocking.close, cancellable=False)
            elif self._coroutine is not None:
                storage, loop = self._coroutine
                await in_loop(loop, storage.close)

    async def abandon(self) -> None:
        """Undo the creation of what the handle owns, and close it."""
        if not self.closed:
            if self.owned:
                await self._call("abandon")
            await self.close()

    # -- helpers

    async def _call(self, method: str, *args: object) -> object:
        """Call a method of the storage, waiting as its rung and the driving face want."""
        self._check()
        if self._coroutine is None:
            return await in_worker(getattr(self._blocking, method), *args)
        storage, loop = self._coroutine
        return await in_loop(loop, getattr(storage, method), *args)

    def _check(self) -> None:
        if self.closed:
            raise ClosedError(f"'{self.name()}' is closed")

    async def _locked(
        self, start: int, end: int, method: str, *args: object, exclusive: bool = False
    ) -> None:
        """``_call``, kept apart from the read-modify-write of the same range."""
        if not self._padded:
            await self._call(method, *args)
            return
        async with self._locks.hold(start, end, exclusive=exclusive):
            await self._call(method, *args)

    async def _in_one_go(
        self, work: Callable[..., Coroutine[object, object, None]], *args: object
    ) -> None:
        """Run several calls as one: on the async face in one worker, which no cancelling splits."""
        if self._blocking is not None and not is_blocking():
            await in_worker(_drive, work, *args)
        else:
            await work(*args)


def _drive(work: Callable[..., Coroutine[object, object, None]], *args: object) -> None:
    run_blocking(work(*args))
