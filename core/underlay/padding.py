"""Requests at any offset, for a storage that takes whole blocks only.

They go through a buffer of whole blocks around what was asked for, in pieces of bounded size.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs

from underlay.buffers import address_of, aligned_buffer, copy_into, join, split_at
from underlay.storage import ReadBuffers, WriteBuffers

__all__ = ["BOUNCE_MOST", "Padding", "inner_range"]

#: Memory for one piece, in bytes.
BOUNCE_MOST = 1 << 20


@attrs.frozen
class Padding:
    """What a storage needs: offsets and lengths, and addresses of buffers, that are multiples."""

    req_align: int
    mem_align: int

    def needed(self) -> bool:
        """Whether any request may have to be padded."""
        return self.req_align > 1 or self.mem_align > 1

    def fits(self, buffers: WriteBuffers, offset: int, length: int) -> bool:
        """Whether the storage takes a request as it is."""
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

    def around(self, offset: int, length: int) -> tuple[int, int]:
        """Where the blocks that a range touches start and end."""
        mask = self._mask()
        return offset & ~mask, offset + length + mask & ~mask

    async def read(
        self,
        readv: Callable[[ReadBuffers, int, int], Awaitable[object]],
        buffers: ReadBuffers,
        offset: int,
        length: int,
    ) -> None:
        """Read the blocks around the range, and copy what was asked for.

        ``readv`` takes buffers that fit, an offset, and their length in all.
        """
        at, end = offset, offset + length
        rest = [memoryview(buffer) for buffer in buffers]
        bounce = self._bounce_buffer(offset, length)
        while at < end:
            start, stop = self.around(at, end - at)
            piece = bounce[: stop - start]
            await readv((piece,), start, len(piece))
            taken = min(start + len(piece), end) - at
            wanted, rest = split_at(rest, taken)
            copy_into(wanted, piece[at - start :])
            at += taken

    async def write(
        self,
        call: Callable[..., Awaitable[object]],
        buffers: WriteBuffers,
        offset: int,
        length: int,
    ) -> None:
        """Read what surrounds the data in its blocks, and write it together with them.

        ``call`` calls a method of the storage by its name. Nobody else may write there meanwhile.
        """
        block = self._mask() + 1
        at, end = offset, offset + length
        rest = [memoryview(buffer) for buffer in buffers]
        bounce = self._bounce_buffer(offset, length)
        while at < end:
            start, stop = self.around(at, end - at)
            piece = bounce[: stop - start]
            stop = start + len(piece)
            taken = min(stop, end) - at
            if at > start:
                await call("readv", (piece[:block],), start)
            if stop > end and (at == start or len(piece) > block):
                await call("readv", (piece[-block:],), stop - block)
            data, rest = split_at(rest, taken)
            join(data, piece[at - start :])
            await call("writev", (piece,), start)
            at += taken

    def _mask(self) -> int:
        return max(self.req_align, self.mem_align) - 1

    def _bounce_buffer(self, offset: int, length: int) -> memoryview:
        """Memory for the blocks around a range, or for as many as one piece may have."""
        start, end = self.around(offset, length)
        return aligned_buffer(min(end - start, max(BOUNCE_MOST, 2 * (self._mask() + 1))))


def inner_range(offset: int, length: int, align: int) -> tuple[int, int]:
    """The whole blocks inside a range: where they start and end."""
    return offset + align - 1 & ~(align - 1), offset + length & ~(align - 1)
