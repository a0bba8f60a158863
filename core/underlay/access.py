"""``FormatAccess``: an open disk, on the asynchronous face.

It owns the logic of both faces; ``SyncFormatAccess`` (``underlay.sync``) drives the same coroutines
without a loop. The work itself is in ``reading`` and ``writing``.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractContextManager, aclosing, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import attrs

from underlay.buffers import AnyBuffer, flat, flat_writable, total
from underlay.capabilities import offers
from underlay.counted import CountedCapability
from underlay.driver import FormatDriverInstance
from underlay.errors import OutOfRangeError, ReadOnlyError
from underlay.face import to_the_end
from underlay.handle import INLINE_MOST, StorageHandle, StorageStats
from underlay.info import ImageInfo, describe_image
from underlay.lifecycle import Lifecycle
from underlay.mapping import Backing, Data, DiskExtent, Eof, Mapping
from underlay.reading import Reader, bare, resolve
from underlay.steps import StepsCallback
from underlay.storage import AnyStorage, PreallocateMode
from underlay.units import parse_size
from underlay.writing import Writer

if TYPE_CHECKING:
    from underlay.fileobj import DiskFile
    from underlay.sync import SyncFormatAccess

__all__ = ["FormatAccess", "Resources"]

T = TypeVar("T")


@attrs.define
class Resources:
    """What an open disk closes: images from the top down, and the handles of their storages."""

    drivers: list[FormatDriverInstance] = attrs.field(factory=list[FormatDriverInstance])
    handles: list[StorageHandle] = attrs.field(factory=list[StorageHandle])
    #: Disks of the caller that this one reads through; it does not close them.
    lent: list[FormatAccess] = attrs.field(factory=list["FormatAccess"])

    async def close(self, *, abandon: bool = False) -> None:
        """Close everything, however many of them fail; the first error is raised at the end.

        With ``abandon`` objects that were created for the disk are removed.
        """
        first: BaseException | None = None
        closers = [driver.close for driver in self.drivers]
        closers += [handle.abandon if abandon else handle.close for handle in self.handles]
        self.drivers.clear()
        self.handles.clear()
        for close in closers:
            try:
                await to_the_end(close())
            except BaseException as error:  # noqa: BLE001 - raised when all is closed
                first = first or error
        if first is not None:
            raise first


class FormatAccess:
    """An open disk. All offsets and lengths are guest bytes.

    ``FormatAccess(driver)`` takes a driver over and closes it in the end; a storage that the caller
    gave to the driver stays the caller's.
    """

    def __init__(
        self,
        driver: FormatDriverInstance,
        *,
        resources: Resources | None = None,
        view_of: FormatAccess | None = None,
    ) -> None:
        self._resources: Resources | None = None
        self._driver = driver
        self._life: Lifecycle = Lifecycle() if view_of is None else view_of._life
        self._is_view = view_of is not None
        for disk in resources.lent if resources is not None else ():
            disk._life.serve(self._life)  # one that is closed is an error, and this disk none
        if resources is None and view_of is None:
            resources = Resources(drivers=[driver])
        self._resources = resources
        self._reader = Reader(driver)
        self._writer = Writer(driver, self._reader)
        self._read_parallel = 1
        self._write_parallel = 1

    # -- facts

    @property
    def inner(self) -> FormatDriverInstance:
        """The driver."""
        return self._driver

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        self._life.check()
        return self._driver.size()

    @property
    def format_name(self) -> str:
        """The name of the disk's format."""
        return self._driver.format_name

    @property
    def writable(self) -> bool:
        """Whether the disk was opened for writing."""
        return self._driver.writable()

    @property
    def closed(self) -> bool:
        """Whether the disk can no longer be used."""
        return self._life.reason is not None

    @property
    def backing(self) -> FormatAccess | None:
        """The backing image as a disk, or None. It closes with this one."""
        driver = self._driver.backing()
        return None if driver is None else FormatAccess(driver, view_of=self)

    def chain(self) -> list[FormatAccess]:
        """This disk and its backing images, the top first."""
        found: list[FormatAccess] = [self]
        while (below := found[-1].backing) is not None:
            found.append(below)
        return found

    def collect_storage_dependencies(self) -> list[AnyStorage]:
        """Every storage that the disk uses, those of its backing images included."""
        return [handle.storage for handle in self._handles()]

    def req_align(self) -> int:
        """The alignment of offsets and lengths that needs no bounce buffer."""
        return max((handle.req_align for handle in self._handles()), default=1)

    def mem_align(self) -> int:
        """The alignment of buffers that needs no bounce buffer; see ``aligned_buffer``."""
        return max((handle.mem_align for handle in self._handles()), default=1)

    def stats(self) -> dict[str, StorageStats]:
        """What went through each storage, by its name."""
        return {handle.name(): handle.stats for handle in self._handles()}

    def capability(self, kind: type[T]) -> T | None:
        """The driver as a ``kind`` (``underlay.capabilities``), or None if it is none.

        Its calls count as the disk's own: closing waits for them.
        """
        found = self._offered(kind)
        return None if found is None else cast("T", CountedCapability(found, self._life))

    def _offered(self, kind: type[T]) -> T | None:
        """The driver itself, for who counts its calls."""
        self._life.check()
        return self._driver if offers(self._driver, kind) else None

    async def info(self) -> ImageInfo:
        """What the image tells of itself; opens nothing further."""
        with self._life.call():
            return await describe_image(self._driver)

    def set_async_read_parallelization(self, count: int) -> None:
        """How many parts of one read to fetch at a time (default 1)."""
        self._read_parallel = max(1, count)

    def set_async_write_parallelization(self, count: int) -> None:
        """How many parts of one write to store at a time (default 1)."""
        self._write_parallel = max(1, count)

    def _handles(self) -> list[StorageHandle]:
        found: list[StorageHandle] = []
        layer: FormatDriverInstance | None = self._driver
        while layer is not None:
            found += [h for h in layer.collect_storage_dependencies() if h not in found]
            layer = layer.backing()
        return found

    # -- reading

    async def read(self, buf: AnyBuffer, offset: int) -> None:
        """Fill ``buf`` with the bytes at ``offset``; with zeroes past the end. Never short.

        Raises:
            CorruptImageError: the image is damaged here; the rest of it stays readable.
            StorageError: a storage failed.
        """
        life = self._life
        life.calls.append(None)
        try:
            if life.reason is not None:
                life.check()
            location = self._driver.locate(offset)
            if location is not None and type(buf) is bytearray:
                handle, host, run, _ = location
                try_readv = handle.try_readv
                length = len(buf)
                if (
                    try_readv is not None
                    and 0 < length <= min(run, INLINE_MOST)
                    and self._driver.leases() is None
                    and try_readv((buf,), host) == length
                ):
                    return
        finally:
            life.calls.pop()
        await self.readv((buf,), offset)

    async def readv(self, bufv: Iterable[AnyBuffer], offset: int) -> None:
        """Fill several buffers one after the other; see ``read``."""
        views = [view for view in map(flat_writable, bufv) if view.nbytes]
        if offset < 0:
            raise OutOfRangeError(f"The offset {offset} is negative")
        with self._life.call(), self.lease():
            await self._reader.readv(views, offset, parallel=self._read_parallel)

    async def read_bytes(self, offset: int, length: int) -> bytes:
        """The ``length`` bytes at ``offset``; see ``read``."""
        if length < 0:
            raise OutOfRangeError(f"The length {length} is negative")
        out = bytearray(length)
        await self.readv((out,), offset)
        return bytes(out)

    # -- mapping

    async def get_mapping(self, offset: int, max_length: int | None = None) -> Mapping:
        """What lies at ``offset``, through all backing images.

        ``mapping.length`` bytes from ``offset`` on are mapped so, at most ``max_length``. On a
        writable disk, hold a ``lease()`` while you use it.
        """
        with self._life.call():
            length = self._mapping_length(offset, max_length)
            return bare((await resolve(self._driver, offset, length))[0]) if length else Eof()

    async def get_shallow_mapping(
        self, offset: int, max_length: int | None = None
    ) -> Mapping | Backing:
        """As ``get_mapping``, but ``Backing`` stays as it is."""
        with self._life.call():
            length = self._mapping_length(offset, max_length)
            if not length:
                return Eof()
            mapping = await self._driver.get_mapping(offset, length)
            if mapping.length > length:
                mapping = attrs.evolve(mapping, length=length)
            return mapping if isinstance(mapping, Backing) else bare(mapping)

    def extents(
        self, offset: int = 0, length: int | None = None
    ) -> AsyncGenerator[DiskExtent, None]:
        """The disk run by run, in order and without gaps, through all backing images."""
        self._life.check()
        return self._extents(offset, self._mapping_length(offset, length))

    async def _extents(self, offset: int, length: int) -> AsyncGenerator[DiskExtent, None]:
        extents = self._reader.extents(offset, length)
        async with aclosing(extents):
            while True:
                # Between two of them no call is in flight: whoever iterates may close the disk.
                with self._life.call():
                    extent = await anext(extents, None)
                if extent is None:
                    return
                yield extent

    def lease(self) -> AbstractContextManager[None]:
        """While held, mappings got from this disk stay good, whatever is written meanwhile."""
        leases = self._driver.leases()
        return nullcontext() if leases is None else leases.hold()

    def in_use(self) -> AbstractContextManager[None]:
        """While held, closing the disk waits: for those who go to its storages directly."""
        return self._life.call()

    def _mapping_length(self, offset: int, max_length: int | None) -> int:
        if offset < 0 or (max_length is not None and max_length < 0):
            raise OutOfRangeError(f"The range at {offset} of length {max_length} is negative")
        left = max(0, self._driver.size() - offset)
        return left if max_length is None else min(left, max_length)

    # -- writing

    async def write(self, data: AnyBuffer, offset: int) -> None:
        """Write all of ``data`` at ``offset``.

        Raises:
            OutOfRangeError: it crosses the end of the disk; nothing was written.
            ReadOnlyError: the disk is read-only, or guarded against what this would make of it.
        """
        await self.writev((data,), offset)

    async def writev(self, bufv: Iterable[AnyBuffer], offset: int) -> None:
        """Write several buffers one after the other; see ``write``."""
        views = [view for view in map(flat, bufv) if view.nbytes]
        with self._life.call():
            self._check_change(offset, total(views))
            await self._writer.writev(views, offset, parallel=self._write_parallel)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Make exactly the range read as zeroes; frees nothing. Raises as ``write`` does."""
        with self._life.call():
            self._check_change(offset, length)
            await self._writer.zero(offset, length, self._driver.ensure_zero_mapping)

    async def discard_to_zero(self, offset: int, length: int) -> None:
        """As ``write_zeroes``, and give back the space of whatever can be freed."""
        with self._life.call():
            self._check_change(offset, length)
            await self._writer.zero(offset, length, self._driver.discard_to_zero)

    async def discard_to_any(self, offset: int, length: int) -> None:
        """Give space back; each byte of the range then has its old value or is zero.

        Raises:
            UnsupportedOperationError: the format cannot discard.
        """
        with self._life.call():
            self._check_change(offset, length)
            await self._writer.discard(offset, length, self._driver.discard_to_any)

    async def discard_to_backing(self, offset: int, length: int) -> None:
        """Give space back and let the backing image show through; raises as ``discard_to_any``."""
        with self._life.call():
            self._check_change(offset, length)
            await self._writer.discard(offset, length, self._driver.discard_to_backing)

    async def ensure_data_mapping(
        self, offset: int, length: int, *, overwrite: bool = False
    ) -> Data[AnyStorage]:
        """Map the start of the range to plain data that may be written through the storage itself.

        Hold a ``lease()`` around this and the writing. With ``overwrite`` the old content need not
        be kept.
        """
        with self._life.call():
            if length <= 0:
                raise OutOfRangeError("An empty range cannot be mapped")
            self._check_change(offset, length)
            storage, host, mapped = await self._driver.ensure_data_mapping(
                offset, length, overwrite
            )
            if not storage.bypassable:
                raise ReadOnlyError(
                    "This disk was guessed to be raw, and writing past it cannot be guarded; "
                    "open it with format='raw'"
                )
            return Data(storage.storage, host, min(mapped, length), writable=True)

    def _check_change(self, offset: int, length: int) -> None:
        if not self._driver.writable():
            raise ReadOnlyError(
                f"This {self.format_name} disk is open read-only; open it with writable=True"
            )
        size = self._driver.size()
        if offset < 0 or length < 0 or offset + length > size:
            raise OutOfRangeError(
                f"The range of {length} bytes at {offset} is not inside the disk of {size} bytes; "
                f"nothing was written"
            )

    # -- size and buffers

    async def resize(
        self,
        size: int | str,
        preallocation: PreallocateMode | str = PreallocateMode.OFF,
        progress: StepsCallback | None = None,
    ) -> None:
        """Make the disk ``size`` bytes long; new bytes are zeroes, cut bytes never come back.

        ``progress`` is told how many bytes of how many are dealt with (see ``underlay.steps``).
        """
        mode = PreallocateMode.parse(preallocation)
        if parse_size(size) < self.size:
            await self.resize_shrink(size, progress)
        else:
            await self.resize_grow(size, mode, progress)

    async def resize_grow(
        self,
        size: int | str,
        preallocation: PreallocateMode | str = PreallocateMode.OFF,
        progress: StepsCallback | None = None,
    ) -> None:
        """Grow to ``size``; nothing happens if the disk is that large already."""
        wanted = parse_size(size)
        mode = PreallocateMode.parse(preallocation)
        with self._life.call():
            self._check_change(0, 0)
            if wanted > self._driver.size():
                await self._driver.resize_grow(wanted, mode, progress)

    async def resize_shrink(self, size: int | str, progress: StepsCallback | None = None) -> None:
        """Shrink to ``size``; nothing happens if the disk is that small already."""
        wanted = parse_size(size)
        with self._life.call():
            self._check_change(0, 0)
            if wanted < self._driver.size():
                await self._driver.resize_shrink(wanted, progress)

    async def flush(self) -> None:
        """Write internal buffers to the storages. Durable is what was flushed and then synced."""
        with self._life.call():
            await self._flush()

    async def _flush(self) -> None:
        await _flush(self._driver)

    async def sync(self) -> None:
        """Make what was flushed durable."""
        with self._life.call():
            await self._driver.sync()

    async def invalidate_cache(self) -> None:
        """Drop buffers without writing them, and look at the image anew."""
        with self._life.call():
            self._reader.forget()
            await self._driver.invalidate_cache()

    # -- views and faces

    def slice(self, offset: int, length: int) -> FormatAccess:
        """A part of this disk as a disk of its own. It closes with this one.

        Raises:
            OutOfRangeError: the range is not inside the disk.
        """
        from underlay.slicing import SliceDriver

        self._life.check()
        part = SliceDriver(self._driver, offset=offset, length=length)
        return FormatAccess(part, view_of=self)

    def as_file(self) -> DiskFile:
        """The disk as a file object (``io.BufferedIOBase``), which blocks.

        Closing it leaves the disk.
        """
        return self.blocking().as_file()

    def blocking(self) -> SyncFormatAccess:
        """This disk on the blocking face. Both faces may be used; closing one closes the disk."""
        from underlay.sync import SyncFormatAccess

        return SyncFormatAccess(self)

    def awaitable(self) -> FormatAccess:
        """This disk on the asynchronous face: itself."""
        return self

    # -- the end

    async def close(self) -> None:
        """Wait for calls in flight, flush and sync what is writable, and close what was opened.

        A storage that the caller gave stays open. Closing twice is allowed; closing a view (a
        slice, a backing image) does nothing, since it closes with its disk.
        """
        if not self._is_view and await self._life.end():
            await to_the_end(self._close())

    async def _close(self) -> None:
        resources, self._resources = self._resources, None
        own = [] if resources is None else [d for d in resources.drivers if d is not self._driver]
        try:
            # An image below is writable too where a job writes to it.
            for driver in (*reversed(own), self._driver):
                if driver.writable():
                    await _flush(driver)
                    await driver.sync()
        finally:
            if resources is not None:
                await resources.close()

    async def abandon(self) -> None:
        """Close a disk that was created in vain: nothing is flushed, and what is new is removed.

        An object that was there before its creation stays, with whatever it holds by now.
        """
        if not self._is_view and await self._life.end():
            resources, self._resources = self._resources, None
            if resources is not None:
                await to_the_end(resources.close(abandon=True))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        # An __init__ that raised may have set nothing yet.
        open_ = getattr(self, "_resources", None) is not None
        if open_ and not self._life.ended and not self._life.forked:
            _warn(f"unclosed disk {self!r}", ResourceWarning, source=self)

    def __repr__(self) -> str:
        names = [handle.name() for handle in self._driver.collect_storage_dependencies()[:1]]
        state = "closed" if self.closed else "writable" if self.writable else "read-only"
        return f"<{type(self).__name__} {self.format_name} {names[0] if names else ''} {state}>"


async def _flush(driver: FormatDriverInstance) -> None:
    """Write what a driver has buffered to its storages, and what these have to the system."""
    await driver.flush()
    for handle in driver.collect_storage_dependencies():
        if handle.writable():
            await handle.flush()
