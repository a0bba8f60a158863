"""raw: the disk's bytes are the storage's bytes, or a part of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import ClassVar, Self

from underlay.capabilities import Bitmap, Measurable, Measurement
from underlay.driver import (
    FormatCreateOptions,
    FormatDriverInstance,
    FormatOpenOptions,
    Location,
    OptionSpec,
)
from underlay.errors import (
    OptionError,
    ReadOnlyError,
    UnsupportedFeatureError,
    UnsupportedOperationError,
)
from underlay.handle import StorageHandle
from underlay.hookspecs import hookimpl
from underlay.mapping import Data, Eof, ShallowMapping
from underlay.steps import Steps, StepsCallback
from underlay.storage import PreallocateMode

__all__ = ["Raw"]


class Raw(FormatDriverInstance, Measurable):
    """A raw image. ``offset`` and ``size`` show a part of the storage, a partition say.

    It never claims an image when probed: raw is what an object is when no format claims it.
    """

    format_name: ClassVar[str] = "raw"
    open_options: ClassVar[Mapping[str, OptionSpec]] = {
        "offset": OptionSpec("Where the disk begins in the storage", type="size", default="0"),
        "size": OptionSpec("How long the disk is", type="size", default="to the end"),
    }
    create_options: ClassVar[Mapping[str, OptionSpec]] = {
        "preallocation": OptionSpec("Preallocation mode (off, falloc, full)", default="off"),
    }

    __slots__ = ("_fixed", "_offset", "_size", "_storage", "_writable")

    def __init__(
        self, storage: StorageHandle, *, offset: int, size: int, fixed: bool, writable: bool
    ) -> None:
        self._storage = storage
        self._offset = offset
        self._size = size
        #: Whether the disk is a part of the storage, so that its size is not the storage's.
        self._fixed = fixed
        self._writable = writable

    @classmethod
    def measure(
        cls,
        size: int,
        options: Mapping[str, object],
        data: Iterable[tuple[int, int]] | None = None,
        bitmaps: Sequence[Bitmap] | None = None,
    ) -> Measurement:
        """See ``Measurable.measure``. As QEMU has it, holes are not counted on."""
        return Measurement(required=size, fully_allocated=size)

    @classmethod
    async def open(cls, options: FormatOpenOptions) -> Self:
        if options.snapshot is not None:
            raise UnsupportedFeatureError(
                "raw images have no internal snapshots", feature="internal snapshots"
            )
        storage = options.storage
        offset = options.options.get("offset", 0)
        size = options.options.get("size")
        assert isinstance(offset, int)
        present = storage.size()
        if offset > present or (isinstance(size, int) and offset + size > present):
            wanted = f"offset={offset}" + (f", size={size}" if size is not None else "")
            raise OptionError(
                f"'{storage.name()}' has {present} bytes, too few for {wanted}",
                option="offset" if size is None else "size",
            )
        return cls(
            storage,
            offset=offset,
            size=size if isinstance(size, int) else present - offset,
            fixed=size is not None,
            writable=options.writable,
        )

    @classmethod
    def check_create(cls, options: FormatCreateOptions) -> None:
        if options.preallocation is PreallocateMode.METADATA:
            raise OptionError(
                "raw images have no metadata to preallocate; use off, falloc or full",
                option="preallocation",
            )

    @classmethod
    async def create(cls, options: FormatCreateOptions) -> None:
        cls.check_create(options)
        assert options.storage is not None
        steps = Steps(options.progress, options.size)
        await options.storage.resize(options.size, options.preallocation, steps)
        steps.end()

    # -- facts

    def size(self) -> int:
        return self._size

    def writable(self) -> bool:
        return self._writable

    def collect_storage_dependencies(self) -> Sequence[StorageHandle]:
        return (self._storage,)

    async def sparse_data(self) -> bool:
        return True

    # -- mapping

    def locate(self, offset: int) -> Location | None:
        left = self._size - offset
        if offset < 0 or left <= 0:
            return None
        return self._storage, self._offset + offset, left, self._writable

    async def get_mapping(self, offset: int, max_length: int) -> ShallowMapping:
        left = self._size - offset
        if left <= 0:
            return Eof()
        return Data(self._storage, self._offset + offset, left, self._writable)

    async def iter_mappings(self, offset: int, length: int) -> AsyncIterator[ShallowMapping]:
        length = min(length, self._size - offset)
        if length > 0:
            yield Data(self._storage, self._offset + offset, length, self._writable)

    # -- writing: all of the disk is mapped for ever, so no write needs a ticket

    async def ensure_data_mapping(
        self, offset: int, length: int, overwrite: bool
    ) -> tuple[StorageHandle, int, int]:
        self._need_writable()
        return self._storage, self._offset + offset, min(length, self._size - offset)

    async def ensure_zero_mapping(self, offset: int, length: int) -> tuple[int, int]:
        self._need_writable()
        await self._storage.write_zeroes(self._offset + offset, length, allocate=True)
        return offset, length

    async def discard_to_zero(self, offset: int, length: int) -> tuple[int, int]:
        self._need_writable()
        await self._storage.write_zeroes(self._offset + offset, length)
        return offset, length

    async def discard_to_any(self, offset: int, length: int) -> tuple[int, int]:
        # A discarded storage range may read as anything at all; zeroed without allocation it gives
        # its space back just as well, and each byte is its old value or zero as promised.
        return await self.discard_to_zero(offset, length)

    async def discard_to_backing(self, offset: int, length: int) -> tuple[int, int]:
        return await self.discard_to_zero(offset, length)

    async def resize_grow(
        self, size: int, preallocation: PreallocateMode, progress: StepsCallback | None = None
    ) -> None:
        await self._resize(size, preallocation, progress)

    async def resize_shrink(self, size: int, progress: StepsCallback | None = None) -> None:
        await self._resize(size, PreallocateMode.OFF, progress)

    async def _resize(
        self, size: int, preallocation: PreallocateMode, progress: StepsCallback | None
    ) -> None:
        self._need_writable()
        if self._fixed:
            raise UnsupportedOperationError(
                f"This disk is a part of '{self._storage.name()}' (size=…) and cannot be resized"
            )
        if preallocation is PreallocateMode.METADATA:
            raise UnsupportedOperationError(
                "raw images have no metadata to preallocate; use off, falloc or full"
            )
        steps = Steps(progress, abs(size - self._size))
        await self._storage.resize(self._offset + size, preallocation, steps)
        self._size = size
        steps.end()

    async def invalidate_cache(self) -> None:
        await self._storage.invalidate_cache()
        if not self._fixed:
            self._size = max(0, self._storage.size() - self._offset)

    def _need_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyError(f"'{self._storage.name()}' is open read-only")


@hookimpl
def underlay_format_drivers() -> Iterable[type[FormatDriverInstance]]:
    return (Raw,)
