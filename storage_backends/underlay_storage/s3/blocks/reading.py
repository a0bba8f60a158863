"""Reading blocks that lie in objects: through a bounded cache, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from underlay.errors import StorageChangedError, StorageError, StorageNotFoundError
from underlay_storage.s3.blocks.cache import Cache
from underlay_storage.s3.blocks.index import Index
from underlay_storage.s3.blocks.layout import Name, Ref, Root
from underlay_storage.s3.blocks.objects import Objects
from underlay_storage.s3.workers import Workers

__all__ = ["Reader"]

_NOTHING: Final = memoryview(b"")
#: The part of the memory for what was read that the index has.
_INDEX_SHARE: Final = 8


class Reader:
    """The blocks that an index finds. Thread-safe."""

    def __init__(
        self,
        objects: Objects,
        root: Root,
        *,
        memory: int,
        workers: Workers,
        parallel: int,
        is_current: Callable[[Root], bool],
    ) -> None:
        """``memory`` bytes are kept. ``is_current`` tells whether a root is still what is read.

        Up to ``parallel`` blocks are fetched ahead of who reads one after the other.
        """
        self.index = Index(objects, root, most=memory // _INDEX_SHARE)
        self._objects = objects
        self._cache: Cache[Name, memoryview] = Cache(memory - memory // _INDEX_SHARE)
        self._workers = workers
        self._is_current = is_current
        #: What comes behind the block that was read last, and how many are fetched ahead there.
        self._next = -1
        self._window = 1
        self._window_most = min(parallel, memory // 4 // root.block_size)

    def block(self, block: int) -> memoryview:
        """What is stored of a block: as many bytes as it has before its last zeroes.

        Raises:
            StorageChangedError: it was given up, as others have written the disk since.
            StorageError: it cannot be had.
        """
        try:
            ref = self.index.find(block)
            return _NOTHING if ref is None else self._fetch(ref)
        except StorageNotFoundError as error:
            if self._is_current(self._objects.read_root().root):
                raise StorageError(
                    f"{error}; 'underlay storage check {self._objects}' tells what else is missing",
                    errno=error.errno,
                ) from None
            raise StorageChangedError(
                f"'{self._objects}' was written by somebody else since it was opened, so long ago "
                "that what was there then is gone: open it again"
            ) from None

    def ready(self, block: int) -> memoryview | None:
        """The same without fetching anything; None where it is not here."""
        is_known, ref = self.index.known(block)
        if not is_known:
            return None
        return _NOTHING if ref is None else self._cache.peek(ref.name)

    def several(self, blocks: Sequence[int]) -> list[memoryview]:
        """Several blocks, fetched side by side."""
        found = [self.ready(block) for block in blocks]
        missing = [at for at, content in enumerate(found) if content is None]
        futures = [
            (at, self._workers.submit(partial(self.block, blocks[at]))) for at in missing[1:]
        ]
        if missing:
            found[missing[0]] = self.block(blocks[missing[0]])
        for at, future in futures:
            found[at] = future.result()
        if blocks:
            self._read_ahead(blocks[0], blocks[-1] + 1)
        return [content for content in found if content is not None]

    def _read_ahead(self, first: int, end: int) -> None:
        """Fetch what follows where one read goes on behind another, more each time.

        Many threads may be here; at worst they fetch what is not needed, or not what is.
        """
        if end == self._next:
            return  # still in the same block
        follows, self._next = first in {self._next, self._next - 1}, end
        self._window = min(2 * self._window, self._window_most) if follows else 1
        if follows:
            for block in range(end, end + self._window):
                if self.ready(block) is None:
                    self._workers.submit(partial(self.block, block))

    def keep(self, name: Name, data: memoryview) -> None:
        """Have an object that was just written at hand."""
        self._cache.put(name, data, len(data))

    def clear(self) -> None:
        """Drop what was fetched."""
        self._cache.clear()
        self.index.clear()

    def _fetch(self, ref: Ref) -> memoryview:
        return self._cache.get(ref.name, lambda: (self._objects.read(ref), ref.length))
