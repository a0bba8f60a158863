"""The part of the driver that changes the image: what the core calls, handed to who does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from underlay.capabilities import Bitmap
from underlay.driver import DetectZeroes, FormatOpenOptions, WriteTicket
from underlay.errors import OptionError, ReadOnlyError, UnsupportedOperationError
from underlay.steps import Steps, StepsCallback
from underlay_drivers.qcow2.bitmaps import KeptDirectory
from underlay_drivers.qcow2.dependencies import Dependencies
from underlay_drivers.qcow2.header import Header

if TYPE_CHECKING:
    from underlay.capabilities import BitmapStore, Snapshot
    from underlay.handle import StorageHandle
    from underlay.lease import Leases
    from underlay.storage import PreallocateMode
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["Writable"]


class Writable(Dependencies):
    """An image that may have a writing side; one that is open read-only has none."""

    __slots__ = ("_detect_zeroes", "_discards", "_writer", "directory")

    def __init__(self, options: FormatOpenOptions, header: Header, *, cache_size: int) -> None:
        super().__init__(options.storage, header, limits=options.limits, cache_size=cache_size)
        self._writer: ImageWriter | None = None
        #: Which bitmaps there are.
        self.directory = KeptDirectory(options.limits)
        #: Whether a discard gives space back, or is ignored.
        self._discards = _choice(options, "discard", ("unmap", "ignore")) == "unmap"
        self._detect_zeroes = DetectZeroes(
            _choice(options, "detect_zeroes", [mode.value for mode in DetectZeroes])
        )

    def _start_writing(self, *, cache_size: int, refcount_cache_size: int) -> None:
        from underlay_drivers.qcow2.writing import ImageWriter

        self._writer = ImageWriter(
            self,
            limits=self._limits,
            cache_size=cache_size,
            refcount_cache_size=refcount_cache_size,
        )

    async def reload(self) -> None:
        """Read the header and the L1 table anew."""
        raise NotImplementedError

    @property
    def writer(self) -> ImageWriter:
        """The writing side.

        Raises:
            ReadOnlyError: there is none.
        """
        if self._writer is None:
            raise ReadOnlyError(
                f"'{self.image.name()}' is open read-only; open it with writable=True"
            )
        return self._writer

    def writable(self) -> bool:
        """See ``FormatDriverInstance.writable``."""
        return self._writer is not None

    def leases(self) -> Leases | None:
        """See ``FormatDriverInstance.leases``.

        In an external data file nothing ever moves; but changes of bitmaps, and emptying, wait for
        those who use it.
        """
        return None if self._writer is None else self._writer.back.leases

    def detect_zeroes(self) -> DetectZeroes:
        """See ``FormatDriverInstance.detect_zeroes``."""
        return self._detect_zeroes

    def zero_granularity(self) -> int | None:
        """See ``FormatDriverInstance.zero_granularity``."""
        return self.geometry.subcluster_size if self.header.version > 2 else None  # noqa: PLR2004

    async def begin_write(self, offset: int, length: int) -> WriteTicket:
        """See ``FormatDriverInstance.begin_write``."""
        return await self.writer.begin(offset, length)

    def try_begin_write(self, offset: int, length: int) -> WriteTicket | None:
        """See ``FormatDriverInstance.try_begin_write``."""
        return None if self._writer is None else self._writer.try_begin(offset, length)

    def try_commit_write(self, ticket: WriteTicket) -> bool:
        """See ``FormatDriverInstance.try_commit_write``."""
        return self._writer is not None and self._writer.try_commit(ticket)

    async def commit_write(self, ticket: WriteTicket) -> None:
        """See ``FormatDriverInstance.commit_write``."""
        await self.writer.commit(ticket)

    async def abort_write(self, ticket: WriteTicket) -> None:
        """See ``FormatDriverInstance.abort_write``."""
        await self.writer.abort(ticket)

    async def ensure_data_mapping(
        self, offset: int, length: int, overwrite: bool
    ) -> tuple[StorageHandle, int, int]:
        """See ``FormatDriverInstance.ensure_data_mapping``."""
        return await self.writer.ensure_data(offset, length)

    async def ensure_zero_mapping(self, offset: int, length: int) -> tuple[int, int]:
        """See ``FormatDriverInstance.ensure_zero_mapping``."""
        return await self._change(offset, length, "ZERO")

    async def discard_to_zero(self, offset: int, length: int) -> tuple[int, int]:
        """See ``FormatDriverInstance.discard_to_zero``."""
        return await self._change(offset, length, "FREED" if self._discards else "ZERO")

    async def discard_to_any(self, offset: int, length: int) -> tuple[int, int]:
        """See ``FormatDriverInstance.discard_to_any``."""
        if self._discards and not self.lacks_backing():
            with suppress(UnsupportedOperationError):
                return await self._change(offset, length, "FREED")
        return offset, length  # each byte has its old value

    async def discard_to_backing(self, offset: int, length: int) -> tuple[int, int]:
        """See ``FormatDriverInstance.discard_to_backing``."""
        return await self._change(offset, length, "BACKING")

    async def _change(self, offset: int, length: int, goal: str) -> tuple[int, int]:
        from underlay_drivers.qcow2.zeroing import Goal, change_range

        return await change_range(self.writer, offset, length, Goal[goal])

    async def resize_grow(
        self, size: int, preallocation: PreallocateMode, progress: StepsCallback | None = None
    ) -> None:
        """See ``FormatDriverInstance.resize_grow``."""
        from underlay_drivers.qcow2.resizing import grow

        self._limits.check("virtual_size", size, what=f"'{self.image.name()}': the virtual size")
        await grow(self.writer, size, preallocation, progress)

    async def resize_shrink(self, size: int, progress: StepsCallback | None = None) -> None:
        """See ``FormatDriverInstance.resize_shrink``."""
        from underlay_drivers.qcow2.resizing import shrink

        await shrink(self.writer, size, progress)

    def encoded_unit(self) -> int:
        """See ``CompressedWriter.encoded_unit``: a cluster."""
        return self.geometry.cluster_size

    def encoder(self, level: int | None = None) -> Callable[[memoryview], bytes | None]:
        """See ``CompressedWriter.encoder``."""
        from underlay_drivers.qcow2.compressed import encoder
        from underlay_drivers.qcow2.compressed_writing import check_possible

        check_possible(self)
        return encoder(self.header.compression_type, level)

    def encode(self, data: memoryview) -> bytes | None:
        """See ``CompressedWriter.encode``.

        Raises:
            ValueError: ``data`` is not one cluster.
        """
        from underlay_drivers.qcow2.compressed import compress

        if len(data) != self.geometry.cluster_size:
            raise ValueError(
                f"{len(data)} bytes are not one cluster of {self.geometry.cluster_size}"
            )
        return compress(self.header.compression_type, data)

    async def write_encoded_units(self, units: Sequence[tuple[int, bytes]]) -> None:
        """See ``CompressedWriter.write_encoded_units``."""
        from underlay_drivers.qcow2.compressed_writing import write_encoded

        await write_encoded(self.writer, units)

    async def write_encoded(self, offset: int, encoded: bytes) -> None:
        """See ``CompressedWriter.write_encoded``."""
        await self.write_encoded_units([(offset, encoded)])

    async def make_empty(self) -> None:
        """See ``Emptiable.make_empty``."""
        from underlay_drivers.qcow2.emptying import make_empty

        await make_empty(self.writer, self._limits)

    async def create_snapshot(self, name: str, progress: StepsCallback | None = None) -> Snapshot:
        """See ``Snapshottable.create_snapshot``."""
        from underlay_drivers.qcow2.snapshot_changes import create_snapshot

        entry = await create_snapshot(self.writer, name, self._limits, progress)
        return entry.public(disk_size=self.size())

    async def apply_snapshot(self, id_or_name: str, progress: StepsCallback | None = None) -> None:
        """See ``Snapshottable.apply_snapshot``."""
        from underlay_drivers.qcow2.snapshot_changes import apply_snapshot

        await apply_snapshot(self.writer, id_or_name, self._limits, progress)

    async def delete_snapshot(self, id_or_name: str, progress: StepsCallback | None = None) -> None:
        """See ``Snapshottable.delete_snapshot``."""
        from underlay_drivers.qcow2.snapshot_changes import delete_snapshot

        await delete_snapshot(self.writer, id_or_name, self._limits, progress)

    async def add_bitmap(
        self,
        name: str,
        *,
        granularity: int | None = None,
        enabled: bool = True,
        progress: StepsCallback | None = None,
    ) -> Bitmap:
        """See ``BitmapStore.add_bitmap``."""
        from underlay_drivers.qcow2.bitmap_changes import add_bitmaps, default_granularity

        size = granularity or default_granularity(self.geometry.cluster_size)
        bitmap = Bitmap(name=name, granularity=size, in_use=False, auto=enabled)
        steps = Steps(progress, self.size())
        await add_bitmaps(self.writer, self._limits, [bitmap])
        steps.end()
        return bitmap

    async def copy_bitmaps(
        self,
        store: BitmapStore,
        bitmaps: Sequence[Bitmap],
        progress: StepsCallback | None = None,
    ) -> None:
        """See ``BitmapStore.copy_bitmaps``."""
        from underlay_drivers.qcow2.bitmap_changes import add_bitmaps

        if bitmaps:
            await add_bitmaps(self.writer, self._limits, bitmaps, store, progress)

    async def remove_bitmap(self, name: str, progress: StepsCallback | None = None) -> None:
        """See ``BitmapStore.remove_bitmap``."""
        from underlay_drivers.qcow2.bitmap_changes import remove_bitmap

        await remove_bitmap(self.writer, self._limits, name, progress)

    async def clear_bitmap(self, name: str, progress: StepsCallback | None = None) -> None:
        """See ``BitmapStore.clear_bitmap``."""
        from underlay_drivers.qcow2.bitmap_changes import clear_bitmap

        await clear_bitmap(self.writer, self._limits, name, progress)

    async def enable_bitmap(self, name: str) -> None:
        """See ``BitmapStore.enable_bitmap``."""
        from underlay_drivers.qcow2.bitmap_changes import enable_bitmap

        await enable_bitmap(self.writer, self._limits, name, enabled=True)

    async def disable_bitmap(self, name: str) -> None:
        """See ``BitmapStore.disable_bitmap``."""
        from underlay_drivers.qcow2.bitmap_changes import enable_bitmap

        await enable_bitmap(self.writer, self._limits, name, enabled=False)

    async def amend(
        self,
        options: Mapping[str, object],
        progress: StepsCallback | None = None,
    ) -> None:
        """See ``Amendable.amend``."""
        from underlay_drivers.qcow2.amending import Amendment, amend

        await amend(self.writer, Amendment.of(options), self._limits, progress)

    async def flush(self) -> None:
        """See ``FormatDriverInstance.flush``; the order is in ``writeback``."""
        if self._writer is not None:
            await self._writer.back.flush()

    async def sync(self) -> None:
        """See ``FormatDriverInstance.sync``."""
        if self._writer is not None:
            await self._writer.back.sync()

    async def close(self) -> None:
        """See ``FormatDriverInstance.close``. What was freed and still waits is freed now."""
        try:
            if self._writer is not None:
                if self._writer.back.at_peace:
                    await self._writer.store_bitmaps()
                await self._writer.back.finish()
        finally:
            await super().close()


def _choice(options: FormatOpenOptions, name: str, known: Sequence[str]) -> str:
    """The option's value, the first of ``known`` by default."""
    value = options.options.get(name, known[0])
    if value not in known:
        raise OptionError(f"'{value}' is no {name}; known: {', '.join(known)}", option=name)
    return str(value)
