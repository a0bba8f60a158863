"""``S3Object``: one object of a bucket, or one page of the web, as a disk's storage.

It is read through a bounded cache. What is written is kept in a local file, and ``sync`` publishes
the object whole: until then nobody sees anything of it.

Importing this is cheap: what talks to servers is imported when something is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from underlay.buffers import copy_into, fill_zero, join, split_at, total
from underlay.errors import OptionError, ReadOnlyError
from underlay.maintenance import Collected, Publishing, Sweepable
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
from underlay_storage.s3.staging import Source, Staging

if TYPE_CHECKING:
    from underlay_storage.s3.published import Published

__all__ = ["S3Object"]


class S3Object(BlockingStorage, Publishing, Sweepable):
    """A handle on one object. Storage options: ``underlay_storage.s3.settings.OPTIONS``."""

    __slots__ = ("_cache", "_dirty", "_options", "_published", "_staging", "_workers")

    schemes: ClassVar[tuple[str, ...]] = ("s3", "gs", "az", "http", "https")

    def __init__(
        self, published: Published, *, options: Mapping[str, object], writable: bool
    ) -> None:
        """``open`` and ``create_open`` are the ways in.

        Raises:
            StorageError: it is to be ``writable``, and there can be no local file.
        """
        from underlay_storage.s3.cache import Cache
        from underlay_storage.s3.workers import Workers

        settings = published.settings
        self._published = published
        self._options = options
        self._workers = Workers(settings.parallel)
        self._cache = Cache(
            published.fetch,
            size=published.facts.size,
            capacity=settings.cache,
            submit=self._workers.submit,
        )
        self._staging: Staging | None = None
        #: Whether publishing would change anything.
        self._dirty = False
        if writable:
            self._staging = Staging(
                settings.staging, name=published.name, base_size=published.facts.size
            )

    # -- coming to be

    @classmethod
    def has_option(cls, name: str, option: str) -> bool:
        """See ``BlockingStorage.has_option``."""
        from underlay_storage.s3.settings import has_option

        return has_option(name.partition(":")[0], option)

    @classmethod
    def open(cls, options: StorageOpenOptions) -> Self:
        """See ``BlockingStorage.open``. There are no locks: the later of two writers learns it."""
        from underlay_storage.s3.published import Published

        published, head = Published.find(options.name, options.options, writable=options.writable)
        storage = cls(published, options=options.options, writable=options.writable)
        if head:
            storage._cache.put(head)
        return storage

    @classmethod
    def create_open(cls, options: StorageCreateOptions) -> Self:
        """See ``BlockingStorage.create_open``. Nobody sees anything of it before ``sync``."""
        from underlay_storage.s3.published import Published

        if options.size < 0:
            raise OptionError(f"size is {options.size}; it cannot be negative", option="size")
        published = Published.begin(options.name, options.options, overwrite=options.overwrite)
        storage = cls(published, options=options.options, writable=True)
        storage.resize(options.size, options.preallocation)
        return storage

    # -- facts

    def size(self) -> int:
        """The length in bytes: of the version that was opened, with what was written since."""
        return self._published.facts.size if self._staging is None else self._staging.size

    def name(self) -> str:
        """Its URL."""
        return self._published.name

    def identity(self) -> Hashable:
        """The server, the bucket and the key."""
        return self._published.identity()

    def reopening(self) -> Reopening | None:
        """The URL and the version; None while there are changes that nobody else can see."""
        if self._dirty:
            return None
        published = self._published
        return Reopening(name=published.name, options=self._options, state=published.facts.version)

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._staging is not None

    def resolve_relative(self, name: str) -> str:
        """``b`` as seen from ``s3://bucket/folder/a`` is ``s3://bucket/folder/b``."""
        return self._published.location.beside(name)

    def describe(self) -> Mapping[str, object]:
        """``etag``: the version; ``actual-size``: every byte is stored."""
        facts = self._published.facts
        return {"etag": facts.etag, "actual-size": facts.size}

    # -- reading

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """See ``BlockingStorage.readv``."""
        rest = [memoryview(buffer) for buffer in buffers]
        end = offset + total(buffers)
        if self._staging is None:
            inside = max(min(end, self.size()) - offset, 0)
            fill_zero(self._read_object(rest, offset, inside))
        else:
            for start, stop, source in self._staging.runs(offset, end):
                if source is Source.BASE:
                    rest = self._read_object(rest, start, stop - start)
                    continue
                part, rest = split_at(rest, stop - start)
                if source is Source.LOCAL:
                    self._staging.read(part, start)
                else:
                    fill_zero(part)

    def _read_object(self, views: list[memoryview], offset: int, length: int) -> list[memoryview]:
        """Fill the first ``length`` bytes of ``views``; the rest of them."""
        end = offset + length
        while offset < end:
            step = min(end - offset, self._cache.step)
            part, views = split_at(views, step)
            _scatter(self._cache.read(offset, step), part)
            offset += step
        return views

    def try_readv(self, buffers: ReadBuffers, offset: int) -> int | None:
        """See ``BlockingStorage.try_readv``: what was fetched before."""
        end = offset + total(buffers)
        if self._staging is None:
            end = min(end, self.size())
        else:
            _, end, source = self._staging.runs(offset, end)[0]
            if source is not Source.BASE:
                return 0
        if offset >= end:
            return 0
        found = self._cache.ready(offset, end - offset)
        done = total(found)
        _scatter(found, split_at([memoryview(buffer) for buffer in buffers], done)[0])
        return done

    def extent_at(self, offset: int) -> Extent:
        """See ``BlockingStorage.extent_at``: holes are what was zeroed here."""
        if self._staging is None or offset >= self._staging.size:
            return Extent(length=max(self.size() - offset, 0), is_data=True)
        start, stop, source = self._staging.source_at(offset)
        return Extent(length=stop - start, is_data=source is not Source.ZERO)

    def invalidate_cache(self) -> None:
        """See ``BlockingStorage.invalidate_cache``; the version stays the one that was opened."""
        self._cache.clear()

    # -- writing

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """See ``BlockingStorage.writev``."""
        self._change(lambda staging: staging.write(buffers, offset))

    def write_zeroes(self, offset: int, length: int, allocate: bool = False) -> None:
        """See ``BlockingStorage.write_zeroes``: it costs no space here; there all is stored."""
        self._change(lambda staging: staging.zero(offset, offset + length))

    def discard(self, offset: int, length: int) -> None:
        """The same as zeroing."""
        self.write_zeroes(offset, length)

    def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        """See ``BlockingStorage.resize``. Every byte of an object is stored, in all modes."""
        self._change(lambda staging: staging.resize(size))

    def _change(self, change: Callable[[Staging], None]) -> None:
        if self._staging is None:
            raise ReadOnlyError(f"'{self.name()}' was opened read-only")
        # While it is published it has to stand still.
        with self._published.replacing:
            self._published.check()
            self._dirty = True
            change(self._staging)

    def sync(self) -> None:
        """See ``publish``."""
        self.publish()

    def publish(self, progress: StepsCallback | None = None) -> None:
        """Publish the object whole, if anything has changed; see ``Publishing.publish``.

        Raises:
            StorageChangedError, StorageExistsError: somebody else has written it: what they wrote
                stands, and this handle writes nothing any more.
            StorageError: it could not be published; it may be tried again.
        """
        staging = self._staging
        if staging is None:
            return
        with self._published.replacing:
            self._published.check()
            if self._dirty:
                self._published.replace(
                    self._content, size=staging.size, changes=staging.changes, progress=progress
                )
                staging.published()
                self._dirty = False

    def barrier(self) -> None:
        """Nothing: what is published is published at once."""

    def _content(self, offset: int, length: int) -> bytearray:
        """A part of what is to be published, read past the cache."""
        assert self._staging is not None
        data = bytearray(length)
        view = memoryview(data)
        runs = self._staging.runs(offset, offset + length)
        unchanged = [(start, stop) for start, stop, source in runs if source is Source.BASE]
        if unchanged:
            # In one request, whatever lies between.
            first, last = unchanged[0][0], unchanged[-1][1]
            published = self._published
            view[first - offset : last - offset] = published.fetch_exactly(
                published.facts, first, last - first
            )
        for start, stop, source in runs:
            part = view[start - offset : stop - offset]
            if source is Source.LOCAL:
                self._staging.read((part,), start)
            elif source is Source.ZERO and unchanged:
                fill_zero((part,))
        return data

    # -- maintenance

    @classmethod
    def sweep(
        cls,
        options: StorageOpenOptions,
        *,
        grace: float | None = None,
        dry_run: bool = False,
        progress: StepsCallback | None = None,
    ) -> Collected:
        """See ``Sweepable.sweep``: uploads in parts that nobody goes on with are ended."""
        from underlay_storage.s3.published import connect
        from underlay_storage.s3.sweeping import sweep

        location, client = connect(options.name, options.options, writable=True)
        if grace is None:
            grace = client.settings.grace
        return sweep(client, location.key, grace=grace, dry_run=dry_run, progress=progress)

    # -- the end

    def abandon(self) -> None:
        """See ``BlockingStorage.abandon``: what was published of a new object is removed."""
        self._published.withdraw()

    def close(self) -> None:
        """Let go of the local file, and of what was not synced. May be called again."""
        self._workers.close()
        self._cache.clear()
        if self._staging is not None:
            self._staging.close()


def _scatter(data: Sequence[memoryview], views: Sequence[memoryview]) -> None:
    """Fill ``views`` one after the other with ``data``, which is as long as they are."""
    if len(views) == 1:
        join(data, views[0])
        return
    rest = list(views)
    for piece in data:
        part, rest = split_at(rest, len(piece))
        copy_into(part, piece)
