"""Where the bytes of a disk are: runs of one kind, merged as ``qemu-img map`` merges them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs

from underlay.errors import OutOfRangeError
from underlay.face import run_blocking
from underlay.gate import ImplicitOpenGate
from underlay.jobs.opened import Source, opened
from underlay.limits import Limits
from underlay.mapping import Data, DiskExtent, Special, Zero
from underlay.naming import shown_name
from underlay.reading import Reader
from underlay.recognition import RAW
from underlay.sync import SyncFormatAccess
from underlay.time_limit import check_time

__all__ = ["MapEntry", "StorageNames", "batched_extents", "entry_of", "map_image"]


_BATCH = 512


@attrs.frozen
class MapEntry:
    """One run of guest bytes; the fields are those of ``qemu-img map``."""

    #: Guest bytes.
    start: int
    length: int
    #: The image of the chain that decides: 0 is the opened one, 1 its backing image, …
    depth: int
    #: An image of the chain says something about the range; else it is zeroes for want of anything.
    present: bool
    #: The bytes read as zeroes.
    zero: bool
    #: Space is allocated for the bytes, and they are read from it.
    data: bool
    #: Host bytes in ``filename``; None where no byte there is the disk's as it stands.
    offset: int | None = None
    filename: str | None = None

    def follows(self, other: MapEntry) -> bool:
        """Whether this run goes on where ``other`` ends, in every respect."""
        if (self.depth, self.present, self.zero, self.data, self.filename) != (
            other.depth,
            other.present,
            other.zero,
            other.data,
            other.filename,
        ):
            return False
        if self.offset is None or other.offset is None:
            return self.offset is other.offset
        return self.offset == other.offset + other.length


def map_image(
    disk: Source,
    *,
    start: int = 0,
    length: int | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> Iterator[MapEntry]:
    """The runs of a disk from guest offset ``start`` on, in order and without gaps.

    Holds one run at a time, however large the disk. An empty range has no runs. ``gate``,
    ``limits`` and ``storage_options`` are for a disk that is given by its name.

    Example::

        for run in underlay.jobs.map_image("disk.qcow2"):
            if run.data:
                print(f"{run.length} bytes at {run.start}, stored at {run.offset}")

    Raises:
        OutOfRangeError: the range is negative.
        UnderlayError: the disk cannot be opened, or its tables make no sense.
    """
    with opened(disk, gate=gate, limits=limits, storage_options=storage_options) as image:
        yield from _runs(image, start, length)


def _runs(disk: SyncFormatAccess, start: int, length: int | None) -> Iterator[MapEntry]:
    names = StorageNames(disk)
    pending: MapEntry | None = None
    for extent in batched_extents(disk, start, length):
        entry = entry_of(extent, names)
        if pending is None:
            pending = entry
        elif entry.follows(pending):
            pending = attrs.evolve(pending, length=pending.length + entry.length)
        else:
            yield pending
            pending = entry
    if pending is not None:
        yield pending


def batched_extents(disk: SyncFormatAccess, start: int, length: int | None) -> Iterator[DiskExtent]:
    """As ``disk.extents()``, many at a time: entering the core for each takes most of the time."""
    if start < 0 or (length is not None and length < 0):
        raise OutOfRangeError(f"The range at {start} of length {length} is negative")
    found = Reader(disk.inner).extents(start, disk.size if length is None else length)
    batch: list[DiskExtent] = []

    async def take() -> None:
        while len(batch) < _BATCH and (extent := await anext(found, None)) is not None:
            batch.append(extent)

    try:
        while True:
            check_time()
            batch.clear()
            try:
                with disk.in_use():
                    run_blocking(take())
            finally:
                yield from batch  # before an error, too
            if len(batch) < _BATCH:
                return
    finally:
        run_blocking(found.aclose())


def entry_of(extent: DiskExtent, names: StorageNames) -> MapEntry:
    """What ``qemu-img map`` says of a run."""
    mapping, depth = extent.mapping, extent.depth
    if isinstance(mapping, Data):
        # In raw a hole is nothing. Another format has allocated it, and knows nothing of its
        # zeroes.
        return MapEntry(
            extent.start,
            extent.length,
            depth,
            present=True,
            zero=extent.hole,
            data=not extent.hole or depth not in names.raw_layers,
            offset=mapping.offset,
            filename=names.of(mapping.storage),
        )
    if isinstance(mapping, Zero):
        # Past the end of a short backing image it is the image above that has the last word.
        return MapEntry(
            extent.start,
            extent.length,
            depth - 1 if extent.past_backing else depth,
            present=mapping.explicit,
            zero=True,
            data=False,
            offset=mapping.offset,
        )
    return MapEntry(
        extent.start,
        extent.length,
        depth,
        present=True,
        zero=False,
        data=isinstance(mapping, Special),
    )


class StorageNames:
    """What the storages of a chain are called, and which of its images are raw."""

    def __init__(self, disk: SyncFormatAccess) -> None:
        self.raw_layers: set[int] = set()
        #: Of the images, the top first.
        self.images: list[str] = []
        self._names: dict[int, str] = {}
        above, below = "", None  # the name of an image, and the one that it stores for the next
        for depth, layer in enumerate(disk.chain()):
            if layer.format_name == RAW:
                self.raw_layers.add(depth)
            image = layer.info()
            name = shown_name(above, below, image.filename)
            self.images.append(name)
            metadata, *others = layer.inner.collect_storage_dependencies()
            self._names[id(metadata.storage)] = name
            for other in others:
                stored = image.description.data_file
                self._names[id(other.storage)] = shown_name(name, stored, other.name())
            above, below = name, image.description.backing_name

    def of(self, storage: object) -> str | None:
        """The name of a storage of the chain."""
        return self._names.get(id(storage))
