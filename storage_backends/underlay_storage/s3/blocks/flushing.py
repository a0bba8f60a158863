"""Writing: blocks wait in memory, become objects, and a new root makes them the disk's.

What counts is the order: a root is written when all that it names is acknowledged.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final

import attrs

from underlay.errors import UnderlayError
from underlay_storage.s3.blocks.layout import NOBODY, Name, Ref, pack_segment
from underlay_storage.s3.blocks.leftovers import Leftovers
from underlay_storage.s3.blocks.objects import Objects, Published
from underlay_storage.s3.blocks.own_root import OwnRoot
from underlay_storage.s3.blocks.reading import Reader
from underlay_storage.s3.workers import Workers

__all__ = ["Writer"]

#: So many blocks may wait for a root to name them; then one is written without being asked for.
_UNPUBLISHED_MOST: Final = 100_000
#: So many objects are removed together while the disk is open.
_SWEPT_TOGETHER: Final = 256


class Writer:
    """The one who may write a disk, until somebody else takes over. Thread-safe.

    Every method raises ``StorageChangedError`` once that has happened, but ``close``.
    """

    def __init__(
        self,
        objects: Objects,
        published: Published,
        *,
        reader: Reader,
        workers: Workers,
        parallel: int,
        memory: int,
        grace: float,
    ) -> None:
        """``published`` is this writer's own root. ``memory`` bytes may wait in memory.

        ``parallel`` uploads are made at a time.
        """
        self._objects = objects
        self._root = OwnRoot(objects, published)
        self._reader = reader
        self._index = reader.index
        self._workers = workers
        self._parallel = parallel
        self.writer = published.root.writer
        self.size = published.root.size
        self._block_size = published.root.block_size
        #: Blocks in memory: how many may be, and how many may be without being on their way.
        self._most = max(memory // self._block_size, 2)
        self._numbers = itertools.count(1)
        #: Held by whoever writes a root, or makes the disk shorter.
        self._publishing = threading.Lock()
        #: For all that follows; told when a block is not claimed any more.
        self._lock = threading.Condition()
        #: Blocks that somebody is just changing.
        self._claimed: set[int] = set()
        #: What is not in any object yet; that which was written last comes last.
        self._dirty: dict[int, bytearray] = {}
        #: What is on its way, and does not change.
        self._sending: dict[int, bytearray] = {}
        self._uploads: set[Future[None]] = set()
        self._leftovers = Leftovers(grace=grace)

    @property
    def published(self) -> Published:
        """The last root that is known to be there."""
        return self._root.published

    # -- blocks

    def peek(self, block: int, start: int, count: int) -> bytes | memoryview | None:
        """Bytes of a block that is in memory; None if it is not."""
        with self._lock:
            buffer = self._dirty.get(block)
            if buffer is not None:
                return bytes(memoryview(buffer)[start : start + count])
            buffer = self._sending.get(block)
        return None if buffer is None else memoryview(buffer)[start : start + count]

    def has(self, block: int) -> bool:
        """Whether a block is anything but zeroes, as far as is known."""
        with self._lock:
            if block in self._dirty or block in self._sending:
                return True
        return self._index.find(block) is not None

    def staged(self) -> set[int]:
        """The blocks that are in memory."""
        with self._lock:
            return {*self._dirty, *self._sending}

    def write(self, block: int, start: int, data: memoryview) -> None:
        """Change bytes of a block, and make the disk longer where they are behind its end."""
        self._change(block, start, data)
        self._make_room()

    def drop(self, block: int) -> None:
        """Let a block be zeroes."""
        with self._claim(block), self._lock:
            self._root.check()
            self._dirty.pop(block, None)
            self._sending.pop(block, None)
            self._gone(self._index.change(block, None))

    def resize(self, size: int) -> None:
        """Set the disk's length."""
        with self._publishing:
            block, rest = divmod(size, self._block_size)
            if size < self.size and rest and self.has(block):
                self._change(block, rest, memoryview(bytes(self._block_size - rest)), grow=False)
            with self._lock:
                self._root.check()
                if size < self.size:
                    self._cut(block, rest)
                self.size = size

    def _cut(self, block: int, rest: int) -> None:
        # What is on its way of the last block is longer than the disk will be.
        for other in [other for other in self._sending if other >= block]:
            del self._sending[other]
        keep = block + (rest > 0)
        for other in [other for other in self._dirty if other >= keep]:
            del self._dirty[other]
        for ref in self._index.cut(keep):
            self._gone(ref)

    def _change(self, block: int, start: int, data: memoryview, *, grow: bool = True) -> None:
        with self._claim(block):
            with self._lock:
                self._root.check()
                buffer = self._own(block)
            if buffer is None:
                buffer = bytearray(self._block_size)
                if len(data) < self._block_size:
                    old = self._reader.block(block)
                    buffer[: len(old)] = old
            with self._lock:
                # Meanwhile it may have been sent on its way.
                buffer = self._own(block) or buffer
                buffer[start : start + len(data)] = data
                self._dirty.pop(block, None)
                self._dirty[block] = buffer
                if grow:
                    end = block * self._block_size + start + len(data)
                    self.size = max(self.size, end)

    def _own(self, block: int) -> bytearray | None:
        """A block in memory that may be changed."""
        buffer = self._dirty.get(block)
        if buffer is None and block in self._sending:
            return bytearray(self._sending[block])
        return buffer

    @contextmanager
    def _claim(self, block: int) -> Generator[None]:
        with self._lock:
            while block in self._claimed:
                self._lock.wait()
            self._claimed.add(block)
        try:
            yield
        finally:
            with self._lock:
                self._claimed.discard(block)
                self._lock.notify_all()

    # -- from memory into objects

    def _make_room(self) -> None:
        """Send blocks on their way when there are many, and wait when there are too many."""
        while True:
            with self._lock:
                while (
                    len(self._dirty) > self._most // 2
                    and len(self._uploads) < self._parallel
                    and self._send_oldest()
                ):
                    pass
                full = len(self._dirty) + len(self._sending) > self._most
                uploads = list(self._uploads)
            if not full or not uploads:
                break
            for upload in wait(uploads, return_when=FIRST_COMPLETED).done:
                upload.result()
        if self._index.changed > _UNPUBLISHED_MOST:
            self.sync()

    def _send_oldest(self) -> bool:
        for block in self._dirty:
            if block not in self._sending:
                self._send(block)
                return True
        return False

    def _send(self, block: int) -> None:
        buffer = self._sending[block] = self._dirty.pop(block)
        upload = self._workers.submit(partial(self._upload, block, buffer))
        self._uploads.add(upload)
        upload.add_done_callback(self._uploads.discard)

    def _send_all(self) -> None:
        """Let everything that was written before this call be in objects."""
        for again in (False, True):
            with self._lock:
                if again:
                    for block in [block for block in self._dirty if block not in self._sending]:
                        self._send(block)
                uploads = list(self._uploads)
            wait(uploads)
            if again:
                for upload in uploads:
                    upload.result()

    def _upload(self, block: int, buffer: bytearray) -> None:
        data = memoryview(bytes(buffer).rstrip(b"\0"))
        name = Name(self.writer, next(self._numbers)) if data else None
        ref: Ref | None = None
        try:
            if name is not None:
                ref = self._objects.write(name, data)
                self._reader.keep(name, data)
        except BaseException:
            with self._lock:
                if self._sending.get(block) is buffer:
                    del self._sending[block]
                    self._dirty.setdefault(block, buffer)
                if name is not None:
                    self._leftovers.never_named(name)  # it may be there all the same
            raise
        with self._lock:
            if self._sending.get(block) is buffer:
                del self._sending[block]
                self._gone(self._index.change(block, ref))
            elif name is not None:
                self._leftovers.never_named(name)

    # -- from objects into the root

    def sync(self) -> None:
        """Make all that was written before this call the disk's, for good.

        Raises:
            StorageError: that is not certain; it is tried again by the next call.
        """
        with self._publishing:
            self._root.check()
            self._send_all()
            self._publish()
            self._sweep(at_least=_SWEPT_TOGETHER)

    def _publish(self) -> None:
        old = self._root.published.root
        with self._lock:
            size = self.size
            segments, changes = self._index.changes()
            if not changes and size == old.size and segments == old.segments:
                return
            # From here on, what takes the place of a change may take it from a root.
            self._leftovers.publishing()
        futures = [
            (
                place,
                self._workers.submit(
                    partial(self._write_segment, place, segments.get(place), some)
                ),
            )
            for place, some in changes.items()
        ]
        wait([future for _, future in futures])
        named = {ref.name for some in changes.values() for ref in some.values() if ref is not None}
        replaced: list[Name] = []
        for place, future in futures:
            written, some_replaced = future.result()
            replaced += some_replaced
            segments.pop(place, None)
            if written is not None:
                segments[place] = written
                named.add(written.name)
        replaced += [ref.name for place, ref in old.segments.items() if segments.get(place) != ref]
        root = self._root.swap(attrs.evolve(old, size=size, segments=segments))
        self._index.published(root, changes)
        with self._lock:
            self._leftovers.published(named, replaced)

    def _write_segment(
        self, place: int, base: Ref | None, changes: dict[int, Ref | None]
    ) -> tuple[Ref | None, list[Name]]:
        blocks, replaced = self._index.merged(place, base, changes)
        written: Ref | None = None
        if blocks:
            name = Name(self.writer, next(self._numbers))
            with self._lock:
                self._leftovers.maybe_named(name)
            written = self._objects.write(name, pack_segment(place, blocks))
            self._index.keep(written, blocks)
        return written, [ref.name for ref in replaced]

    # -- the end

    def _gone(self, ref: Ref | None) -> None:
        """An object that waited for a root to name it is not wanted any more."""
        if ref is not None:
            self._leftovers.unwanted(ref.name)

    def _sweep(self, *, at_least: int) -> None:
        """Remove what nobody can need, where there is that much of it."""
        with self._lock:
            names = self._leftovers.take(at_least=at_least)
        if names:
            with suppress(UnderlayError):  # what stays, `underlay storage gc` removes
                self._objects.delete(names)

    def close(self) -> None:
        """Give the disk back, as it was at the last sync; what can be removed is. Never raises."""
        with self._publishing:
            self._send_nothing()
            if not self._root.is_lost and not self._leftovers.in_doubt:
                with self._lock:
                    self._leftovers.never_named(*self._waiting())
                with suppress(UnderlayError):
                    self._root.swap(attrs.evolve(self._root.published.root, writer=NOBODY))
                    self._sweep(at_least=1)

    def remove_all(self) -> None:
        """Take the disk away, if nobody has taken over, and all that this writer has written."""
        with self._publishing:
            self._root.check()
            self._send_nothing()
            self._root.remove()
            self._objects.delete(
                found.name
                for found in self._objects.listing()
                if found.kind == "object" and found.name and found.name.writer == self.writer
            )

    def _send_nothing(self) -> None:
        with self._lock:
            uploads = list(self._uploads)
        for upload in uploads:
            upload.cancel()
        wait(uploads)

    def _waiting(self) -> list[Name]:
        """Objects that only a root would have named that is not written any more."""
        _, changes = self._index.changes()
        return [ref.name for some in changes.values() for ref in some.values() if ref is not None]
