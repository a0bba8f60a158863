"""The qcow2 driver: what the core sees. The work is in the modules around it.

What only some images or programs need is imported there: starting up is to be quick.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar, Self

from underlay.capabilities import (
    Amendable,
    Bitmap,
    BitmapStore,
    CheckResult,
    CompressedWriter,
    Describable,
    DirtyRanges,
    Emptiable,
    Finding,
    ImageDescription,
    Inspectable,
    Inspection,
    Measurable,
    Measurement,
    Repair,
    Repairable,
    Snapshot,
    Snapshottable,
)
from underlay.driver import FormatCreateOptions, FormatOpenOptions, OptionSpec
from underlay.errors import (
    ConflictError,
    CorruptImageError,
    LimitExceededError,
    OptionError,
    ReadOnlyError,
    StorageChangedError,
    UnderlayError,
)
from underlay.face import run_blocking, to_the_end
from underlay.handle import StorageHandle
from underlay.limits import Limits
from underlay.probing import Match, NoMatch, ProbeVerdict, ProbeView
from underlay.steps import Steps, StepsCallback
from underlay.storage import AnyStorage
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.compressed import ClusterDecoder
from underlay_drivers.qcow2.create_options import AMEND_OPTIONS, CREATE_OPTIONS
from underlay_drivers.qcow2.description import bitmap_warnings, describe, flagged_damage
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.loading import load_header, load_table
from underlay_drivers.qcow2.validation import check_limits, write_obstacles
from underlay_drivers.qcow2.writable import Writable

if TYPE_CHECKING:
    from underlay_drivers.qcow2.builder import Qcow2OpenBuilder
    from underlay_drivers.qcow2.create_builder import Qcow2CreateBuilder
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["Qcow2"]

_DEFAULT_CACHE_SIZE = 32 << 20
_DEFAULT_REFCOUNT_CACHE_SIZE = 8 << 20


class Qcow2(
    Writable,
    Describable,
    Snapshottable,
    BitmapStore,
    Inspectable,
    Repairable,
    CompressedWriter,
    Amendable,
    Emptiable,
    Measurable,
):
    """An open qcow2 image: the driver, and the public class for programs that need no more.

    ``open_image`` and ``open_path`` open the image alone; ``builder`` and ``builder_path`` also
    what it needs. Offsets and lengths are guest bytes.
    """

    __slots__ = ("_decoder", "_options", "_snapshot", "_sparse")

    format_name: ClassVar[str] = "qcow2"
    open_options: ClassVar[Mapping[str, OptionSpec]] = {
        "cache_size": OptionSpec(
            help="Bytes of L2 tables to keep in memory", type="size", default="32M"
        ),
        "refcount_cache_size": OptionSpec(
            help="Bytes of refcount blocks to keep in memory", type="size", default="8M"
        ),
        "discard": OptionSpec(
            help="Whether discarding gives space back (unmap) or does nothing (ignore)",
            default="unmap",
        ),
        "detect_zeroes": OptionSpec(
            help="What to do with written zeroes: write them (off), mark them (on), or mark them "
            "and give space back (unmap)",
            default="off",
        ),
    }

    create_options: ClassVar[Mapping[str, OptionSpec]] = CREATE_OPTIONS
    amend_options: ClassVar[Mapping[str, OptionSpec]] = AMEND_OPTIONS

    def __init__(self, options: FormatOpenOptions, header: Header) -> None:
        super().__init__(
            options, header, cache_size=_size_option(options, "cache_size", _DEFAULT_CACHE_SIZE)
        )
        self._options = options
        self._snapshot = options.snapshot
        self._decoder = ClusterDecoder(
            header.compression_type, options.storage.name(), options.limits
        )
        #: Whether data may lie in holes; None until somebody wants to know.
        self._sparse: bool | None = None

    # -- coming to be

    @classmethod
    def probe(cls, view: ProbeView) -> ProbeVerdict:
        """See ``FormatDriverInstance.probe``. Of an unknown version it is qcow2 all the same."""
        version = int.from_bytes(view.head[4:8], "big")
        if view.head[:4] != layout.MAGIC or version < layout.VERSIONS[0]:
            return NoMatch()
        return Match(f"magic 'QFI\\xfb', version {version}")

    @classmethod
    async def open(cls, options: FormatOpenOptions) -> Self:
        """See ``FormatDriverInstance.open``."""
        header = await load_header(options.storage, to_check=options.to_check)
        disk = cls(options, header)
        await disk._load(header)
        if options.writable and not options.to_check:
            disk._refuse_writing()
            disk._prepare_writing()
        return disk

    def _prepare_writing(self) -> None:
        self._start_writing(
            cache_size=_size_option(self._options, "cache_size", _DEFAULT_CACHE_SIZE),
            refcount_cache_size=_size_option(
                self._options, "refcount_cache_size", _DEFAULT_REFCOUNT_CACHE_SIZE
            ),
        )

    @classmethod
    def check_create(cls, options: FormatCreateOptions) -> None:
        """See ``FormatDriverInstance.check_create``."""
        from underlay_drivers.qcow2.create import new_image

        new_image(options).check_size(options.size)

    @classmethod
    def creation_facts(cls, options: FormatCreateOptions) -> Mapping[str, object]:
        """See ``FormatDriverInstance.creation_facts``."""
        from underlay_drivers.qcow2.create import creation_facts

        return creation_facts(options)

    @classmethod
    def measure(
        cls,
        size: int,
        options: Mapping[str, object],
        data: Iterable[tuple[int, int]] | None = None,
        bitmaps: Sequence[Bitmap] | None = None,
    ) -> Measurement:
        """See ``Measurable.measure``."""
        from underlay_drivers.qcow2.measuring import measure_image

        return measure_image(size, options, data, bitmaps)

    @classmethod
    async def create(cls, options: FormatCreateOptions) -> None:
        """See ``FormatDriverInstance.create``."""
        from underlay_drivers.qcow2.create import create_image

        await create_image(cls, options)

    @classmethod
    def builder(cls, image: AnyStorage | StorageHandle) -> Qcow2OpenBuilder:
        """Open the image in this storage, which stays the caller's, step by step."""
        from underlay_drivers.qcow2.builder import Qcow2OpenBuilder

        return Qcow2OpenBuilder(cls, image)

    @classmethod
    def builder_path(cls, image_path: str | os.PathLike[str]) -> Qcow2OpenBuilder:
        """Open the image at this path step by step."""
        from underlay_drivers.qcow2.builder import Qcow2OpenBuilder

        return Qcow2OpenBuilder(cls, image_path)

    @classmethod
    def create_builder(cls, image: AnyStorage | StorageHandle) -> Qcow2CreateBuilder:
        """Format this storage, which stays the caller's, step by step."""
        from underlay_drivers.qcow2.create_builder import Qcow2CreateBuilder

        return Qcow2CreateBuilder(cls, image)

    @classmethod
    async def open_image(cls, metadata: AnyStorage | StorageHandle, writable: bool = False) -> Self:
        """Open the image in this storage, which stays the caller's, and nothing that it names."""
        image = metadata
        if not isinstance(image, StorageHandle):
            image = StorageHandle(image, owned=False)
        return await cls.open(FormatOpenOptions(storage=image, writable=writable))

    @classmethod
    async def open_path(cls, path: str | os.PathLike[str], writable: bool = False) -> Self:
        """Open the image at this path, and nothing that it names. Close it with ``close``."""
        from underlay.access import Resources
        from underlay.targets import open_storage

        image = await open_storage(path, writable=writable)
        resources = Resources(handles=[image])
        try:
            disk = await cls.open(FormatOpenOptions(storage=image, writable=writable))
        except BaseException:
            await resources.close()
            raise
        disk.adopt(resources)
        return disk

    @classmethod
    def open_image_sync(cls, metadata: AnyStorage | StorageHandle, writable: bool = False) -> Self:
        """``open_image`` on the blocking face."""
        return run_blocking(cls.open_image(metadata, writable))

    @classmethod
    def open_path_sync(cls, path: str | os.PathLike[str], writable: bool = False) -> Self:
        """``open_path`` on the blocking face."""
        return run_blocking(cls.open_path(path, writable))

    async def _load(self, header: Header) -> None:
        """Find the L1 table that is asked for, and read it."""
        name = self.image.name()
        offset, entries, size = header.l1_table_offset, header.l1_size, header.size
        if self._snapshot is not None:
            from underlay_drivers.qcow2.snapshots import (
                find_snapshot,
                read_snapshots,
                snapshot_view,
            )

            table = await read_snapshots(self.image, header, self._limits)
            entry = find_snapshot(table, self._snapshot, image=name)
            offset, entries, size = snapshot_view(
                entry, header, file_size=self.image.size(), image=name
            )
        self._limits.check("virtual_size", size, what=f"'{name}': the virtual size")
        check_limits(header, self._limits, name=name)
        l1 = await load_table(self.image, offset, entries, self._limits, what="the L1 table")
        self.header = header
        self._sparse = None
        self.show(header, l1, l1_offset=offset, size=size)

    def _refuse_writing(self) -> None:
        name = self.image.name()
        if self._snapshot is not None:
            raise ReadOnlyError(
                f"'{name}': the snapshot '{self._snapshot}' can only be opened read-only; "
                "apply it to go on from there"
            )
        for obstacle in write_obstacles(self.header, file_size=self.image.size(), name=name):
            raise obstacle

    @classmethod
    async def inspect(cls, storage: StorageHandle, limits: Limits) -> Inspection:
        """See ``Inspectable.inspect``."""
        from underlay_drivers.qcow2.inspection import inspect_image

        return await inspect_image(storage, limits)

    # -- reading

    async def sparse_data(self) -> bool:
        """Whether holes lie under data: by QEMU's own rule, so that ``map`` agrees with it."""
        if self._sparse is None:
            from underlay_drivers.qcow2.refcounts import looks_preallocated

            self._sparse = await looks_preallocated(self.image, self.header)
        return self._sparse

    def decode(self, host_length: int, raw: memoryview, out: memoryview) -> None:
        """See ``FormatDriverInstance.decode``."""
        self._decoder.decode(host_length, raw, out)

    def decoder(self) -> ClusterDecoder:
        """See ``FormatDriverInstance.decoder``."""
        return self._decoder

    async def invalidate_cache(self) -> None:
        """See ``FormatDriverInstance.invalidate_cache``.

        Raises:
            StorageChangedError: it is another image now, not the same one changed.
        """
        async with nullcontext() if self._writer is None else self._writer.forgetting():
            for storage in self.collect_storage_dependencies():
                await storage.invalidate_cache()
            await self.reload()

    async def reload(self) -> None:
        """See ``Writable.reload``.

        Raises:
            StorageChangedError: it is another image now, not the same one changed.
        """
        header = await load_header(self.image)
        if _essence(header) != _essence(self.header):
            raise StorageChangedError(
                f"'{self.image.name()}' has become another image; close it and open it anew"
            )
        await self._load(header)

    # -- what it tells of itself

    async def describe(self) -> ImageDescription:
        """See ``Describable.describe``. Damage to what is listed becomes a warning."""
        warnings = flagged_damage(self.header) + bitmap_warnings(self.header)
        snapshots: Sequence[Snapshot] = ()
        bitmaps: Sequence[Bitmap] = ()
        try:
            snapshots = await self.snapshots()
        except (CorruptImageError, LimitExceededError) as error:
            warnings.append(str(error))
        try:
            bitmaps = await self.bitmaps()
        except (CorruptImageError, LimitExceededError) as error:
            warnings.append(str(error))
        return describe(self.header, snapshots=snapshots, bitmaps=bitmaps, warnings=warnings)

    async def snapshots(self) -> Sequence[Snapshot]:
        """See ``Snapshottable.snapshots``."""
        if not self.header.nb_snapshots:
            return []
        from underlay_drivers.qcow2.snapshots import read_snapshots

        entries = await read_snapshots(self.image, self.header, self._limits)
        return [entry.public(disk_size=self.header.size) for entry in entries]

    async def bitmaps(self) -> Sequence[Bitmap]:
        """See ``BitmapStore.bitmaps``."""
        if self.header.extension(layout.EXTENSION_BITMAPS) is None:
            return []
        while True:
            tracking = None if self._writer is None else self._writer.tracking
            entries = (await self.directory.read(self)).entries
            if self._writer is None or self._writer.tracking is tracking:
                shown = entries if tracking is None else tracking.shown(entries)
                return [entry.public() for entry in shown]

    def can_have_bitmaps(self) -> bool:
        """See ``BitmapStore.can_have_bitmaps``."""
        return self.header.version > 2  # noqa: PLR2004 (a version is its own best name)

    async def dirty_ranges(self, name: str, offset: int = 0) -> DirtyRanges:
        """See ``BitmapStore.dirty_ranges``."""
        if self._writer is None:
            return await self._stored_ranges(name, offset)
        while True:
            tracking = self._writer.tracking
            # What another call lets go meanwhile stays until this one has read it.
            with self._writer.back.leases.hold():
                found = None if tracking is None else await tracking.dirty_ranges(name, offset)
                if found is not None:
                    return found
                try:
                    return await self._stored_ranges(name, offset)
                except ConflictError:
                    if self._writer.tracking is tracking:
                        raise  # not in use by another call of ours

    async def _stored_ranges(self, name: str, offset: int) -> DirtyRanges:
        """The same, of a bitmap that is what the image says."""
        from underlay_drivers.qcow2.bitmap_data import read_dirty_ranges

        directory = await self.directory.read(self)
        entry = directory.entries[directory.find(name)].usable()
        return await read_dirty_ranges(self.image, self.header, self._limits, entry, offset)

    async def merge_bitmap(
        self,
        name: str,
        source: str,
        store: BitmapStore | None = None,
        progress: StepsCallback | None = None,
    ) -> None:
        """See ``BitmapStore.merge_bitmap``."""
        from underlay_drivers.qcow2.bitmap_changes import merge_bitmap

        await merge_bitmap(
            self.writer, self._limits, name, source, store or self, progress=progress
        )

    # -- whether it is sound

    async def check(
        self,
        progress: StepsCallback | None = None,
        *,
        report: Callable[[Finding], None] | None = None,
    ) -> CheckResult:
        """See ``Checkable.check``. What is written meanwhile may be seen in part.

        Clusters of a disk that is written to show as leaks while they wait to be freed.
        """
        from underlay_drivers.qcow2.check import check_image
        from underlay_drivers.qcow2.findings import Report

        if self.writable():
            await self.flush()
        header = await load_header(self.image, to_check=True)
        return await check_image(
            self.image, header, self._limits, Report(report), progress=progress
        )

    async def repair(
        self,
        *,
        leaks_only: bool,
        dry_run: bool = False,
        report: Callable[[Finding | Repair], None] | None = None,
        progress: StepsCallback | None = None,
    ) -> CheckResult:
        """See ``Repairable.repair``. Nothing else may use the disk meanwhile."""
        from underlay_drivers.qcow2.repair import repair_image

        writer = self._writer
        if not dry_run and not self._options.writable:
            raise ReadOnlyError(
                f"'{self.image.name()}' is open read-only; open it writable to repair it"
            )
        if writer is not None:
            await self.flush()
            await self.sync()
            if writer.tracking is not None:
                async with writer.bitmaps_at_rest():
                    pass
            await writer.back.finish()
        steps = Steps(progress)
        try:
            result = await repair_image(
                self.image,
                await load_header(self.image, to_check=True),
                self._limits,
                leaks_only=leaks_only,
                dry_run=dry_run,
                report=report,
                steps=steps,
            )
        finally:
            if not dry_run:
                await to_the_end(self._begin_anew(writer))
        steps.end()
        return result

    async def _begin_anew(self, writer: ImageWriter | None) -> None:
        """Read what a repair has changed; what ``writer`` knew of the tables is out of date."""
        self.forbid_writing()
        try:
            await self._load(await load_header(self.image, to_check=True))
        except UnderlayError as error:
            if writer is not None:
                writer.back.give_up("it could not be read after its repair", error)
            raise
        if writer is not None:
            # Whoever holds a lease holds it still.
            self._prepare_writing()
            self.writer.back.leases = writer.back.leases


def _size_option(options: FormatOpenOptions, name: str, default: int) -> int:
    size = options.options.get(name, default)
    if size is None:
        return default
    if not isinstance(size, int) or size < 0:
        raise OptionError(f"{name} is {size!r}, and must be a number of bytes", option=name)
    return size


def _essence(header: Header) -> tuple[object, ...]:
    """What must not change under an open image."""
    return (
        header.version,
        header.cluster_bits,
        header.incompatible_features & ~(layout.DIRTY | layout.CORRUPT),
        header.compression_type,
        header.backing_file,
        header.backing_format,
        header.data_file,
    )
