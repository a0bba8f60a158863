"""What a disk shows at this moment: blocks that wait in memory, over those in the bucket."""

from __future__ import annotations

from collections.abc import Iterator

from underlay.buffers import fill_zero, total
from underlay.storage import Extent, ReadBuffers
from underlay_storage.s3.blocks.flushing import Writer
from underlay_storage.s3.blocks.layout import SEGMENT_BLOCKS
from underlay_storage.s3.blocks.reading import Reader

__all__ = ["View"]


class View:
    """Reads of any range. Thread-safe."""

    def __init__(
        self, reader: Reader, writer: Writer | None, *, block_size: int, parallel: int
    ) -> None:
        """Up to ``parallel`` blocks of ``block_size`` bytes are fetched side by side."""
        self._reader = reader
        self._writer = writer
        self._block_size = block_size
        self._parallel = parallel

    def pieces(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The blocks of a range: the number of each, where in it to begin, and how many bytes."""
        while offset < end:
            block, start = divmod(offset, self._block_size)
            count = min(end - offset, self._block_size - start)
            yield block, start, count
            offset += count

    def read(self, buffers: ReadBuffers, offset: int) -> None:
        """Fill ``buffers`` with the bytes at ``offset``."""
        target = _Target(buffers)
        waiting: list[tuple[int, int, int]] = []
        for piece in self.pieces(offset, offset + total(buffers)):
            waiting.append(piece)
            if len(waiting) == self._parallel:
                self._read(waiting, target)
                waiting.clear()
        self._read(waiting, target)

    def _read(self, pieces: list[tuple[int, int, int]], target: _Target) -> None:
        here = {block: self._staged(block, start, count) for block, start, count in pieces}
        missing = [block for block, content in here.items() if content is None]
        stored = dict(zip(missing, self._reader.several(missing), strict=True))
        for block, start, count in pieces:
            content = here[block]
            if content is None:
                content = stored[block][start : start + count]
            target.fill(content, count)

    def read_ready(self, buffers: ReadBuffers, offset: int) -> int:
        """Fill them as far as all is in memory; how many bytes that is."""
        target = _Target(buffers)
        done = 0
        for block, start, count in self.pieces(offset, offset + total(buffers)):
            content = self._staged(block, start, count)
            if content is None:
                found = self._reader.ready(block)
                if found is None:
                    break
                content = found[start : start + count]
            target.fill(content, count)
            done += count
        return done

    def extent_at(self, offset: int, size: int) -> Extent:
        """Whether there is data at ``offset``, and how far, in a disk of ``size`` bytes."""
        if offset >= size:
            return Extent(length=0, is_data=False)
        blocks = -(-size // self._block_size)
        block = offset // self._block_size
        is_data = self._has(block)
        block += 1
        staged = self._staged_places()
        while block < blocks:
            if block % SEGMENT_BLOCKS == 0:
                place = block // SEGMENT_BLOCKS
                if is_data or place in staged or not self._reader.index.is_empty(place):
                    break  # the next call fetches that part of the index
                block += SEGMENT_BLOCKS
            elif self._has(block) == is_data:
                block += 1
            else:
                break
        return Extent(length=min(block * self._block_size, size) - offset, is_data=is_data)

    def filled(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """``pieces``, but for whole parts of the index that are known to hold nothing."""
        span = SEGMENT_BLOCKS * self._block_size
        staged = self._staged_places()
        while offset < end:
            place = offset // span
            stop = min((place + 1) * span, end)
            if place in staged or not self._reader.index.is_empty(place):
                yield from self.pieces(offset, stop)
            offset = stop

    def _staged(self, block: int, start: int, count: int) -> bytes | memoryview | None:
        return None if self._writer is None else self._writer.peek(block, start, count)

    def _staged_places(self) -> set[int]:
        staged: set[int] = set() if self._writer is None else self._writer.staged()
        return {block // SEGMENT_BLOCKS for block in staged}

    def _has(self, block: int) -> bool:
        if self._writer is not None:
            return self._writer.has(block)
        return self._reader.index.find(block) is not None


class _Target:
    """Buffers that are filled one after the other."""

    def __init__(self, buffers: ReadBuffers) -> None:
        self._views = iter([memoryview(buffer) for buffer in buffers])
        self._view = memoryview(b"")

    def fill(self, content: bytes | memoryview, count: int) -> None:
        """Add ``count`` bytes: the content, and zeroes."""
        content = memoryview(content)
        while count:
            if not len(self._view):
                self._view = next(self._views)
            length = min(count, len(self._view))
            part = content[:length]
            self._view[: len(part)] = part
            fill_zero((self._view[len(part) : length],))
            self._view, content = self._view[length:], content[length:]
            count -= length
