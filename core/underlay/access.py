"""``FormatAccess``: an open disk, on the asynchronous face.

It owns the logic of both faces; ``SyncFormatAccess`` (``underlay.sync``) drives the same coroutines
without a loop. What is no matter of its bytes is in ``open_disk``, and the work itself in
``reading`` and ``writing``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import TYPE_CHECKING

import attrs

from underlay.buffers import AnyBuffer, flat, flat_writable, total
from underlay.driver import FormatDriverInstance
from underlay.errors import OutOfRangeError, ReadOnlyError
from underlay.handle import INLINE_MOST
from underlay.mapping import Backing, Data, DiskExtent, Eof, Mapping
from underlay.open_disk import OpenDisk, Resources, flush_driver
from underlay.reading import Reader, bare, resolve
from underlay.steps import StepsCallback
from underlay.storage import AnyStorage, PreallocateMode
from underlay.units import parse_size
from underlay.writing import Writer

if TYPE_CHECKING:
    from underlay.fileobj import DiskFile
    from underlay.sync import SyncFormatAccess

__all__ = ["FormatAccess", "Resources"]


class FormatAccess(OpenDisk):
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
        super().__init__(driver, resources=resources, view_of=view_of)
        self._reader = Reader(driver)
        self._writer = Writer(driver, self._reader)
        self._read_parallel = 1
        self._write_parallel = 1

    def set_async_read_parallelization(self, count: int) -> None:
        """How many parts of one read to fetch at a time (default 1)."""
        self._read_parallel = max(1, count)

    def set_async_write_parallelization(self, count: int) -> None:
        """How many parts of one write to store at a time (default 1)."""
        self._write_parallel = max(1, count)

    # -- reading

    async def read(self, buf: AnyBuffer, offset: int) -> None:
        """Fill ``buf`` with the bytes at ``offset``; with zeroes past the end. Never short.

        Raises:
            CorruptImageError: the image is damaged here; the rest of it stays readable.
            StorageError: a storage failed.
        """
        life = self._life
        try:
            life.quick.append(None)
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
            life.quick.pop()
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
            await flush_driver(self._driver)

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
