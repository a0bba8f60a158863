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
        is_current: Callable[[Root], bool],
    ) -> None:
        """``memory`` bytes are kept. ``is_current`` tells whether a root is still what is read."""
        self.index = Index(objects, root, most=memory // _INDEX_SHARE)
        self._objects = objects
        self._cache: Cache[Name, memoryview] = Cache(memory - memory // _INDEX_SHARE)
        self._workers = workers
        self._is_current = is_current

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
        return [content for content in found if content is not None]

    def keep(self, name: Name, data: memoryview) -> None:
        """Have an object that was just written at hand."""
        self._cache.put(name, data, len(data))

    def clear(self) -> None:
        """Drop what was fetched."""
        self._cache.clear()
        self.index.clear()

    def _fetch(self, ref: Ref) -> memoryview:
        return self._cache.get(ref.name, lambda: (self._objects.read(ref), ref.length))
