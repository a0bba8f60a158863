"""``S3Blocks``: a disk as many objects under one prefix of a bucket, written at random.

Importing this is cheap: what talks to servers is imported when something is opened.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, ClassVar, NoReturn, Self

from underlay.buffers import total
from underlay.errors import OptionError, ReadOnlyError
from underlay.maintenance import Collected, Maintainable, ObjectsCheck
from underlay.steps import StepsCallback
from underlay.storage import (
    BlockingStorage,
    Extent,
    PreallocateMode,
    ReadBuffers,
    Reopening,
    StorageCreateOptions,
    StorageOpenOptions,
    WriteBuffers,
)

if TYPE_CHECKING:
    from underlay_storage.s3.blocks.flushing import Writer
    from underlay_storage.s3.blocks.layout import Root
    from underlay_storage.s3.blocks.objects import Objects, Published
    from underlay_storage.s3.client import ObjectClient

__all__ = ["S3Blocks"]

_SCHEME = "s3+blocks"


class S3Blocks(BlockingStorage, Maintainable):
    """A handle on one disk. Storage options: ``underlay_storage.s3.settings.OPTIONS``.

    A read-only handle shows the disk as it was when it was opened. A writable one takes over from
    whoever wrote it before, and is shut out by the next.
    """

    __slots__ = (
        "_closed",
        "_is_new",
        "_objects",
        "_options",
        "_published",
        "_reader",
        "_view",
        "_workers",
        "_writer",
    )

    schemes: ClassVar[tuple[str, ...]] = (_SCHEME,)

    def __init__(
        self,
        objects: Objects,
        published: Published,
        *,
        writable: bool,
        options: Mapping[str, object],
    ) -> None:
        """``open`` and ``create_open`` are the ways in; a writable one has its own root there."""
        from underlay_storage.s3.blocks.flushing import Writer
        from underlay_storage.s3.blocks.reading import Reader
        from underlay_storage.s3.blocks.view import View
        from underlay_storage.s3.workers import Workers

        settings = objects.client.settings
        root = published.root
        self._closed = False
        self._is_new = False
        self._objects = objects
        self._options = options
        self._published = published
        self._workers = Workers(settings.parallel)

        def is_current(now: Root) -> bool:
            return now.writer == root.writer if writable else now.generation == root.generation

        self._reader = Reader(
            objects,
            root,
            memory=settings.cache,
            workers=self._workers,
            parallel=settings.parallel,
            is_current=is_current,
        )
        self._writer: Writer | None = None
        if writable:
            self._writer = Writer(
                objects,
                published,
                reader=self._reader,
                workers=self._workers,
                parallel=settings.parallel,
                memory=settings.cache // 2,
                grace=settings.grace,
            )
        self._view = View(
            self._reader,
            self._writer,
            block_size=root.block_size,
            parallel=settings.parallel,
        )

    # -- coming to be

    @classmethod
    def has_option(cls, name: str, option: str) -> bool:
        """See ``BlockingStorage.has_option``."""
        from underlay_storage.s3.settings import has_option

        return has_option(name.partition(":")[0], option)

    @classmethod
    def open(cls, options: StorageOpenOptions) -> Self:
        """See ``BlockingStorage.open``.

        Opening for writing changes the root, not the disk: whoever wrote it before is shut out.
        """
        from underlay_storage.s3.blocks.opening import connect

        client, prefix = connect(options.name, options.options)
        return cls.attach(client, prefix, writable=options.writable, options=options.options)

    @classmethod
    def create_open(cls, options: StorageCreateOptions) -> Self:
        """See ``BlockingStorage.create_open``."""
        from underlay_storage.s3.blocks.opening import connect

        client, prefix = connect(options.name, options.options)
        return cls.create(
            client,
            prefix,
            size=options.size,
            preallocation=options.preallocation,
            overwrite=options.overwrite,
            options=options.options,
        )

    @classmethod
    def attach(
        cls,
        client: ObjectClient,
        prefix: str,
        *,
        writable: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> Self:
        """Open the disk under a prefix of a client's bucket; ``options`` are for ``reopening``."""
        from underlay_storage.s3.blocks.opening import objects_of, take_over

        objects = objects_of(client, prefix, writable=writable)
        published = take_over(objects) if writable else objects.read_root()
        return cls(objects, published, writable=writable, options=options or {})

    @classmethod
    def create(
        cls,
        client: ObjectClient,
        prefix: str,
        *,
        size: int = 0,
        preallocation: PreallocateMode = PreallocateMode.OFF,
        overwrite: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> Self:
        """Make a disk under a prefix of a client's bucket."""
        from underlay_storage.s3.blocks.layout import Root, new_writer
        from underlay_storage.s3.blocks.opening import (
            begin,
            check_length,
            objects_of,
            refuse_reserving,
        )

        if size < 0:
            raise OptionError(f"size is {size}; it cannot be negative", option="size")
        block_size = client.settings.block_size
        objects = objects_of(client, prefix, writable=True)
        check_length(objects, size, block_size)
        if size:
            refuse_reserving(objects, preallocation)
        root = Root(
            generation=1, writer=new_writer(), size=size, block_size=block_size, segments={}
        )
        published, is_new = begin(objects, root, overwrite=overwrite)
        storage = cls(objects, published, writable=True, options=options or {})
        storage._is_new = is_new
        return storage

    # -- facts

    def size(self) -> int:
        """The disk's length in bytes."""
        return self._published.root.size if self._writer is None else self._writer.size

    def name(self) -> str:
        """``s3+blocks://bucket/prefix``."""
        return str(self._objects)

    def identity(self) -> Hashable:
        """The server, the bucket and the prefix."""
        client = self._objects.client
        server = None if client.access is None else client.access.endpoint
        return _SCHEME, server, client.location.bucket, self._objects.prefix

    def reopening(self) -> Reopening | None:
        """See ``BlockingStorage.reopening``; None while it can be written."""
        if self._writer is not None:
            return None
        root = self._root
        return Reopening(
            name=self.name(), options=self._options, state=(root.generation, root.writer)
        )

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._writer is not None

    def resolve_relative(self, name: str) -> str:
        """``b`` as seen from ``s3+blocks://bucket/folder/a`` is ``s3+blocks://bucket/folder/b``."""
        return self._objects.client.location.at(self._objects.prefix).beside(name)

    def describe(self) -> Mapping[str, object]:
        """Facts of the root: version, block size, generation, and who wrote it last."""
        from underlay_storage.s3.blocks.layout import NOBODY, VERSION

        root = self._root
        return {
            "layout-version": VERSION,
            "block-size": root.block_size,
            "generation": root.generation,
            "writer": None if root.writer == NOBODY else root.writer.hex(),
        }

    # -- reading

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """See ``BlockingStorage.readv``; missing blocks are fetched side by side."""
        self._view.read(buffers, offset)

    def try_readv(self, buffers: ReadBuffers, offset: int) -> int | None:
        """See ``BlockingStorage.try_readv``: what is in memory."""
        return self._view.read_ready(buffers, offset)

    def extent_at(self, offset: int) -> Extent:
        """See ``BlockingStorage.extent_at``: blocks that are there are data."""
        return self._view.extent_at(offset, self.size())

    def invalidate_cache(self) -> None:
        """See ``BlockingStorage.invalidate_cache``; what was opened stays the same."""
        self._reader.clear()

    # -- writing

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """See ``BlockingStorage.writev``. Blocks wait in memory, as many as there is room for."""
        from underlay_storage.s3.blocks.opening import check_length

        writer = self._need_writer()
        check_length(self._objects, offset + total(buffers), self._block_size)
        for buffer in buffers:
            view = memoryview(buffer)
            for block, start, count in self._view.pieces(offset, offset + len(view)):
                writer.write(block, start, view[:count])
                view = view[count:]
            offset += len(buffer)

    def write_zeroes(self, offset: int, length: int, allocate: bool = False) -> None:
        """See ``BlockingStorage.write_zeroes``: whole blocks are dropped; nothing is reserved."""
        self._clear(offset, length, parts=True)

    def discard(self, offset: int, length: int) -> None:
        """See ``BlockingStorage.discard``: whole blocks are dropped."""
        self._clear(offset, length, parts=False)

    def _clear(self, offset: int, length: int, *, parts: bool) -> None:
        writer = self._need_writer()
        size = self.size()
        end = min(offset + length, size)
        for block, start, count in self._view.filled(offset, end):
            at = block * self._block_size + start
            if start == 0 and (count == self._block_size or at + count == size):
                writer.drop(block)
            elif parts and writer.has(block):
                writer.write(block, start, memoryview(bytes(count)))

    def sync(self) -> None:
        """See ``BlockingStorage.sync``: all blocks, then the index, then the root.

        Raises:
            StorageChangedError: somebody else has taken over; nothing is promised any more.
            StorageError: it is not certain; the next call tries again.
        """
        if self._writer is not None:
            self._writer.sync()

    def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        """See ``BlockingStorage.resize``. A bucket reserves nothing."""
        from underlay_storage.s3.blocks.opening import check_length, refuse_reserving

        writer = self._need_writer()
        check_length(self._objects, size, self._block_size)
        if size > self.size():
            refuse_reserving(self._objects, preallocation)
        writer.resize(size)

    # -- maintenance

    def survey(self) -> Mapping[str, object]:
        """See ``Maintainable.survey``: how many blocks there are, and their bytes."""
        from underlay_storage.s3.blocks.checking import survey

        return survey(self._objects, self._root)

    def check_objects(
        self, *, read_all: bool = False, progress: StepsCallback | None = None
    ) -> ObjectsCheck:
        """See ``Maintainable.check_objects``."""
        from underlay_storage.s3.blocks.checking import check

        return check(self._objects, self._root, read_all=read_all, progress=progress)

    def collect(
        self,
        *,
        grace: float | None = None,
        take_over: bool = False,
        dry_run: bool = False,
        progress: StepsCallback | None = None,
    ) -> Collected:
        """See ``Maintainable.collect``."""
        from underlay_storage.s3.blocks.collecting import collect

        if grace is None:
            grace = self._objects.client.settings.grace
        return collect(
            self._objects, grace=grace, take_over=take_over, dry_run=dry_run, progress=progress
        )

    # -- the end

    def abandon(self) -> None:
        """See ``BlockingStorage.abandon``: a disk that this handle made is removed."""
        if self._is_new and self._writer is not None:
            self._writer.remove_all()

    def close(self) -> None:
        """Give the disk back, and remove what nobody can need. May be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            self._workers.close()
            self._reader.clear()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and self._writer is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        return f"<S3Blocks {self.name()!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an open storage cannot be pickled: send its name")

    # -- helpers

    @property
    def _root(self) -> Root:
        """What was read when it was opened, or written since."""
        return (self._published if self._writer is None else self._writer.published).root

    @property
    def _block_size(self) -> int:
        return self._published.root.block_size

    def _need_writer(self) -> Writer:
        if self._writer is None:
            raise ReadOnlyError(f"'{self.name()}' was opened read-only")
        return self._writer
