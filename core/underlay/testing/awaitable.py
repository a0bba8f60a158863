"""A storage of the coroutine rung: memory that pretends to be a client of an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

from underlay.errors import ReadOnlyError
from underlay.storage import Extent, PreallocateMode, ReadBuffers, Storage, WriteBuffers

__all__ = ["AwaitableMemoryStorage"]


class AwaitableMemoryStorage(Storage):
    """Bytes that can be had only in the loop in which it was made, and never without waiting."""

    __slots__ = ("_content", "_loop", "_writable")

    def __init__(self, content: bytes = b"", *, writable: bool = True) -> None:
        """Made inside a running event loop.

        Raises:
            RuntimeError: there is none.
        """
        self._loop = asyncio.get_running_loop()
        self._content = bytearray(content)
        self._writable = writable

    def another_handle(self) -> AwaitableMemoryStorage:
        """A read-only one on the same bytes, in the same loop."""
        other = AwaitableMemoryStorage(writable=False)
        other._content = self._content
        return other

    def size(self) -> int:
        """See ``Storage.size``."""
        return len(self._content)

    def identity(self) -> Hashable:
        """The same for all handles on the same bytes."""
        return id(self._content)

    def writable(self) -> bool:
        """See ``Storage.writable``."""
        return self._writable

    async def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """See ``Storage.readv``."""
        await self._wait()
        for buffer in buffers:
            data = self._content[offset : offset + len(buffer)]
            memoryview(buffer)[:] = data.ljust(len(buffer), b"\0")
            offset += len(buffer)

    async def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """See ``Storage.writev``."""
        await self._wait(writing=True)
        for buffer in buffers:
            self._reach(offset + len(buffer))
            self._content[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    async def extent_at(self, offset: int) -> Extent:
        """See ``Storage.extent_at``."""
        await self._wait()
        return Extent(length=max(len(self._content) - offset, 0), is_data=True)

    async def flush(self) -> None:
        """See ``Storage.flush``."""
        await self._wait()

    async def sync(self) -> None:
        """See ``Storage.sync``."""
        await self._wait()

    async def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        """See ``Storage.resize``."""
        await self._wait(writing=True)
        del self._content[size:]
        self._reach(size)

    async def close(self) -> None:
        """See ``Storage.close``."""
        await self._wait()

    async def _wait(self, *, writing: bool = False) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise AssertionError("a coroutine storage was called in a loop that is not its own")
        if writing and not self._writable:
            raise ReadOnlyError(f"{self.name()} was opened read-only")
        await asyncio.sleep(0)

    def _reach(self, size: int) -> None:
        self._content.extend(bytes(max(size - len(self._content), 0)))
