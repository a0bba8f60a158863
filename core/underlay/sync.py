"""``SyncFormatAccess``: an open disk on the blocking face.

It drives the coroutines of ``FormatAccess`` without a loop or a thread, so it works anywhere: in
plain programs, in threads, inside a running event loop. Reading and rewriting plain data skip even
those.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

from underlay.access import FormatAccess
from underlay.buffers import AnyBuffer
from underlay.counted import BlockingCapability
from underlay.driver import DetectZeroes, FormatDriverInstance
from underlay.face import run_blocking
from underlay.fileobj import DiskFile
from underlay.handle import StorageStats
from underlay.info import ImageInfo
from underlay.lease import Leases
from underlay.mapping import Backing, Data, DiskExtent, Mapping
from underlay.steps import StepsCallback
from underlay.storage import AnyStorage, PreallocateMode

__all__ = ["SyncFormatAccess"]

T = TypeVar("T")


class SyncFormatAccess:
    """An open disk. All offsets and lengths are guest bytes; every method is ``FormatAccess``'s."""

    __slots__ = ("_calls", "_core", "_leases", "_life", "_locate", "_try_write", "_write_fast")

    def __init__(self, core: FormatAccess) -> None:
        self._core = core
        self._life = core._life
        self._calls = core._life.quick
        #: Where mappings never move, nobody waits for these.
        self._leases = core._driver.leases() or Leases()
        self._locate = core._driver.locate
        self._try_write = core._writer.try_write
        self._write_fast = core._driver.detect_zeroes() is DetectZeroes.OFF

    # -- reading

    def read(self, buf: AnyBuffer, offset: int) -> None:
        """Fill ``buf`` with the bytes at ``offset``; with zeroes past the end. Never short.

        Raises:
            CorruptImageError: the image is damaged here; the rest of it stays readable.
            StorageError: a storage failed.
        """
        calls = self._calls
        leases = self._leases
        lease = leases.hot
        try:
            calls.append(None)  # inside: an interrupt comes when this returns, and not before
            try:
                lease.append(None)
                while lease is not leases.hot:  # exchanged in between: nobody waits for this one
                    lease.pop()
                    lease = leases.hot
                    lease.append(None)
                if self._life.reason is not None:
                    self._life.check()
                if type(buf) is bytearray or (
                    type(buf) is memoryview and _is_flat(buf) and not buf.readonly
                ):
                    location = self._locate(offset)
                    if location is not None:
                        handle, host, run, _ = location
                        inline = handle.inline_readv
                        if inline is not None and 0 < len(buf) <= run:
                            inline((buf,), host)
                            return
                run_blocking(self._core.readv((buf,), offset))
            finally:
                lease.pop()
        finally:
            calls.pop()

    def readv(self, bufv: Iterable[AnyBuffer], offset: int) -> None:
        """Fill several buffers one after the other; see ``read``."""
        run_blocking(self._core.readv(bufv, offset))

    def read_bytes(self, offset: int, length: int) -> bytes:
        """The ``length`` bytes at ``offset``; see ``read``."""
        return run_blocking(self._core.read_bytes(offset, length))

    # -- writing

    def write(self, data: AnyBuffer, offset: int) -> None:
        """Write all of ``data`` at ``offset``.

        Raises:
            OutOfRangeError: it crosses the end of the disk; nothing was written.
            ReadOnlyError: the disk is read-only, or guarded against what this would make of it.
        """
        calls = self._calls
        leases = self._leases
        lease = leases.hot
        try:
            calls.append(None)  # inside: an interrupt comes when this returns, and not before
            try:
                lease.append(None)
                while lease is not leases.hot:  # exchanged in between: nobody waits for this one
                    lease.pop()
                    lease = leases.hot
                    lease.append(None)
                if self._life.reason is not None:
                    self._life.check()
                if self._write_fast and (
                    type(data) is bytes
                    or type(data) is bytearray
                    or (type(data) is memoryview and _is_flat(data))
                ):
                    location = self._locate(offset)
                    if location is not None:
                        handle, host, run, writable = location
                        inline = handle.inline_writev
                        if writable and inline is not None and 0 < len(data) <= run:
                            inline((data,), host)
                            return
                    done = self._try_write(data, offset, location)
                    if done:
                        if done == len(data):
                            return
                        data = memoryview(data)[done:]
                        offset += done
                run_blocking(self._core.writev((data,), offset))
            finally:
                lease.pop()
        finally:
            calls.pop()

    def writev(self, bufv: Iterable[AnyBuffer], offset: int) -> None:
        """Write several buffers one after the other; see ``write``."""
        run_blocking(self._core.writev(bufv, offset))

    def write_zeroes(self, offset: int, length: int) -> None:
        """See ``FormatAccess.write_zeroes``."""
        run_blocking(self._core.write_zeroes(offset, length))

    def discard_to_zero(self, offset: int, length: int) -> None:
        """See ``FormatAccess.discard_to_zero``."""
        run_blocking(self._core.discard_to_zero(offset, length))

    def discard_to_any(self, offset: int, length: int) -> None:
        """See ``FormatAccess.discard_to_any``."""
        run_blocking(self._core.discard_to_any(offset, length))

    def discard_to_backing(self, offset: int, length: int) -> None:
        """See ``FormatAccess.discard_to_backing``."""
        run_blocking(self._core.discard_to_backing(offset, length))

    def ensure_data_mapping(
        self, offset: int, length: int, *, overwrite: bool = False
    ) -> Data[AnyStorage]:
        """See ``FormatAccess.ensure_data_mapping``."""
        return run_blocking(self._core.ensure_data_mapping(offset, length, overwrite=overwrite))

    # -- mapping

    def get_mapping(self, offset: int, max_length: int | None = None) -> Mapping:
        """See ``FormatAccess.get_mapping``."""
        return run_blocking(self._core.get_mapping(offset, max_length))

    def get_shallow_mapping(self, offset: int, max_length: int | None = None) -> Mapping | Backing:
        """See ``FormatAccess.get_shallow_mapping``."""
        return run_blocking(self._core.get_shallow_mapping(offset, max_length))

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[DiskExtent]:
        """See ``FormatAccess.extents``."""
        return self._each(self._core.extents(offset, length))

    def _each(self, extents: AsyncGenerator[DiskExtent, None]) -> Iterator[DiskExtent]:
        async def following() -> DiskExtent | None:
            return await anext(extents, None)

        try:
            while (extent := run_blocking(following())) is not None:
                yield extent
        finally:
            run_blocking(extents.aclose())

    def lease(self) -> AbstractContextManager[None]:
        """See ``FormatAccess.lease``."""
        return self._core.lease()

    def in_use(self) -> AbstractContextManager[None]:
        """See ``FormatAccess.in_use``."""
        return self._core.in_use()

    # -- size and buffers

    def resize(
        self,
        size: int | str,
        preallocation: PreallocateMode | str = PreallocateMode.OFF,
        progress: StepsCallback | None = None,
    ) -> None:
        """See ``FormatAccess.resize``."""
        run_blocking(self._core.resize(size, preallocation, progress))

    def resize_grow(
        self,
        size: int | str,
        preallocation: PreallocateMode | str = PreallocateMode.OFF,
        progress: StepsCallback | None = None,
    ) -> None:
        """See ``FormatAccess.resize_grow``."""
        run_blocking(self._core.resize_grow(size, preallocation, progress))

    def resize_shrink(self, size: int | str, progress: StepsCallback | None = None) -> None:
        """See ``FormatAccess.resize_shrink``."""
        run_blocking(self._core.resize_shrink(size, progress))

    def flush(self) -> None:
        """See ``FormatAccess.flush``."""
        run_blocking(self._core.flush())

    def sync(self) -> None:
        """See ``FormatAccess.sync``."""
        run_blocking(self._core.sync())

    def invalidate_cache(self) -> None:
        """See ``FormatAccess.invalidate_cache``."""
        run_blocking(self._core.invalidate_cache())

    # -- facts

    @property
    def inner(self) -> FormatDriverInstance:
        """The driver."""
        return self._core.inner

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        return self._core.size

    @property
    def format_name(self) -> str:
        """The name of the disk's format."""
        return self._core.format_name

    @property
    def writable(self) -> bool:
        """Whether the disk was opened for writing."""
        return self._core.writable

    @property
    def closed(self) -> bool:
        """Whether the disk can no longer be used."""
        return self._core.closed

    @property
    def backing(self) -> SyncFormatAccess | None:
        """The backing image as a disk, or None. It closes with this one."""
        core = self._core.backing
        return None if core is None else SyncFormatAccess(core)

    def chain(self) -> list[SyncFormatAccess]:
        """This disk and its backing images, the top first."""
        return [self, *map(SyncFormatAccess, self._core.chain()[1:])]

    def collect_storage_dependencies(self) -> list[AnyStorage]:
        """See ``FormatAccess.collect_storage_dependencies``."""
        return self._core.collect_storage_dependencies()

    def req_align(self) -> int:
        """See ``FormatAccess.req_align``."""
        return self._core.req_align()

    def mem_align(self) -> int:
        """See ``FormatAccess.mem_align``."""
        return self._core.mem_align()

    def stats(self) -> dict[str, StorageStats]:
        """See ``FormatAccess.stats``."""
        return self._core.stats()

    def info(self) -> ImageInfo:
        """See ``FormatAccess.info``."""
        return run_blocking(self._core.info())

    def capability(self, kind: type[T]) -> Any:
        """The driver as a ``kind`` whose methods block and return their results, or None."""
        found = self._core._offered(kind)
        return None if found is None else BlockingCapability(found, self._life)

    def set_async_read_parallelization(self, count: int) -> None:
        """Has no effect on this face; kept for the disk's asynchronous one."""
        self._core.set_async_read_parallelization(count)

    def set_async_write_parallelization(self, count: int) -> None:
        """Has no effect on this face; kept for the disk's asynchronous one."""
        self._core.set_async_write_parallelization(count)

    # -- views and faces

    def slice(self, offset: int, length: int) -> SyncFormatAccess:
        """See ``FormatAccess.slice``."""
        return SyncFormatAccess(self._core.slice(offset, length))

    def as_file(self) -> DiskFile:
        """The disk as a file object (``io.BufferedIOBase``). Closing it leaves the disk open."""
        self._life.check()
        return DiskFile(self)

    def blocking(self) -> SyncFormatAccess:
        """This disk on the blocking face: itself."""
        return self

    def awaitable(self) -> FormatAccess:
        """This disk on the asynchronous face.

        Both faces may be used; closing one closes the disk.
        """
        return self._core

    # -- the end

    def close(self) -> None:
        """See ``FormatAccess.close``."""
        run_blocking(self._core.close())

    def abandon(self) -> None:
        """See ``FormatAccess.abandon``."""
        run_blocking(self._core.abandon())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._core).replace("FormatAccess", "SyncFormatAccess", 1)


def _is_flat(view: memoryview) -> bool:
    """Whether a view goes to the system as it is."""
    return view.format == "B" and view.ndim == 1 and view.c_contiguous
