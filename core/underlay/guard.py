"""The guard of an object that was only guessed to be raw.

Whoever writes to such a disk (a guest, say) could write another format's header into it, and the
next ``open_any()``, or another program, would believe it. So a change after which the object would
look like an image of some format is refused.

The guard stands before the storage, below the driver: whichever way a change takes, through a
slice, as a backing image, by a job, it comes by here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar, Final

from underlay.buffers import split_at, total
from underlay.errors import ReadOnlyError
from underlay.handle import StorageHandle
from underlay.locks import RangeLocks
from underlay.probing import VIEW_BYTES, ProbeView
from underlay.steps import Steps
from underlay.storage import PreallocateMode, WriteBuffers

__all__ = ["GuardedHandle"]

#: What a change locks: the two ends of the object together, what lies between them, or both.
_ENDS: Final = (0, 1)
_MIDDLE: Final = (1, 2)
_ALL: Final = (0, 2)


class GuardedHandle(StorageHandle):
    """A handle that looks at the ends of its object as they would be after each change.

    What changes the object raises ``ReadOnlyError`` if it would look like another format then, and
    leaves it as it was. It takes ``handle`` over. Others who write to the same object at the same
    time are not seen.
    """

    __slots__ = ("_bare", "_changes", "_matches")

    bypassable: ClassVar[bool] = False

    def __init__(
        self, handle: StorageHandle, *, matches: Callable[[ProbeView], Sequence[str]]
    ) -> None:
        super().__init__(handle.storage, owned=False)
        self.stats = handle.stats
        self.inline_writev = None
        #: Makes the changes, and closes the storage.
        self._bare = handle
        self._matches = matches
        self._changes = RangeLocks()

    async def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """See ``StorageHandle.writev``."""
        end = offset + total(buffers)
        async with self._changing(offset, end) as at_ends:
            if at_ends:
                size = max(self.size(), end)
                buffers = _own_ends(buffers, offset, size)
                await self._refuse_image(size, offset, end, buffers)
            await self._bare.writev(buffers, offset)

    async def write_zeroes(self, offset: int, length: int, *, allocate: bool = False) -> None:
        """See ``StorageHandle.write_zeroes``."""
        end = offset + length
        async with self._changing(offset, end) as at_ends:
            if at_ends:
                await self._refuse_image(self.size(), offset, end, None)
            await self._bare.write_zeroes(offset, length, allocate=allocate)

    async def discard(self, offset: int, length: int) -> None:
        """As ``write_zeroes``: nobody could say what undefined content looks like."""
        await self.write_zeroes(offset, length)

    async def resize(
        self,
        size: int,
        preallocation: PreallocateMode = PreallocateMode.OFF,
        steps: Steps | None = None,
    ) -> None:
        """See ``StorageHandle.resize``."""
        async with self._changes.hold(*_ALL, exclusive=True):
            await self._refuse_image(size, size, size, None)
            await self._bare.resize(size, preallocation, steps)

    async def close(self) -> None:
        """See ``StorageHandle.close``."""
        await super().close()
        await self._bare.close()

    @asynccontextmanager
    async def _changing(self, start: int, end: int) -> AsyncGenerator[bool]:
        """Around a change of the bytes from ``start`` to ``end``: whether it is at the ends.

        Such changes come one by one, since two harmless ones could be a harmful one together.
        """
        async with self._changes.hold(*_MIDDLE, exclusive=False):  # no resize moves the end
            if start >= VIEW_BYTES and end <= self.size() - VIEW_BYTES:
                yield False
                return
        async with self._changes.hold(*_ENDS, exclusive=True):
            yield True

    async def _refuse_image(
        self, size: int, start: int, end: int, data: WriteBuffers | None
    ) -> None:
        """Refuse to make the object ``size`` bytes long, with ``data`` (None: zeroes) in it.

        Raises:
            ReadOnlyError: it would look like an image of another format.
        """
        window = min(size, VIEW_BYTES)
        ends: list[bytes] = []
        for at in (0, size - window):
            content = await self.read_bytes(at, window)  # zeroes past the present end
            _overlay(content, at, start, end, data)
            ends.append(bytes(content))
        formats = self._matches(ProbeView(ends[0], ends[1], size))
        if formats:
            what = f"writing {end - start} bytes at {start}" if end > start else f"size {size}"
            raise ReadOnlyError(
                f"'{self.name()}' was guessed to be raw, and {what} would make it look "
                f"like {' or '.join(formats)}; open it with format='raw' if that is meant"
            )


def _own_ends(buffers: WriteBuffers, offset: int, size: int) -> list[memoryview]:
    """The same data, with a copy of what lies at the ends of an object of ``size`` bytes.

    What was looked at is to be what is written, and the caller's memory may be the guest's too.
    """
    views = [memoryview(buffer) for buffer in buffers]
    head, rest = split_at(views, max(0, VIEW_BYTES - offset))
    middle, tail = split_at(rest, max(0, size - VIEW_BYTES - offset - total(head)))
    parts = [memoryview(b"".join(head)), *middle, memoryview(b"".join(tail))]
    return [part for part in parts if part]


def _overlay(content: bytearray, at: int, start: int, end: int, data: WriteBuffers | None) -> None:
    """Put what is to be written from ``start`` to ``end`` into the bytes from ``at`` on."""
    for piece in (None,) if data is None else data:
        stop = end if piece is None else start + len(piece)
        low, high = max(start, at), min(stop, at + len(content))
        if low < high:
            content[low - at : high - at] = (
                bytes(high - low) if piece is None else piece[low - start : high - start]
            )
        start = stop
