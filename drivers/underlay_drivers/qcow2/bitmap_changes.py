"""Adding, removing and changing dirty bitmaps, each as one change of the image."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import attrs

from underlay.capabilities import Bitmap
from underlay.errors import (
    ConflictError,
    LimitExceededError,
    OptionError,
    UnsupportedOperationError,
)
from underlay.steps import Steps, StepsCallback
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.bitmap_data import BitmapShape
from underlay_drivers.qcow2.bitmap_merging import Merge
from underlay_drivers.qcow2.bitmap_writing import BitmapChange, changing
from underlay_drivers.qcow2.bitmaps import BitmapEntry
from underlay_drivers.qcow2.header import Header, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from underlay.capabilities import BitmapStore
    from underlay.limits import Limits
    from underlay_drivers.qcow2.dependencies import Dependencies
    from underlay_drivers.qcow2.tables import Table
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = [
    "add_bitmaps",
    "clear_bitmap",
    "default_granularity",
    "enable_bitmap",
    "merge_bitmap",
    "remove_bitmap",
]

#: Where the granularity is chosen by us: a cluster, but neither less nor more than these.
_GRANULARITY: Final = (4096, 65536)


def default_granularity(cluster_size: int) -> int:
    """For a bitmap for which nobody has chosen one, in bytes."""
    low, high = _GRANULARITY
    return min(max(cluster_size, low), high)


async def add_bitmaps(
    writer: ImageWriter,
    limits: Limits,
    bitmaps: Sequence[Bitmap],
    store: BitmapStore | None = None,
    progress: StepsCallback | None = None,
) -> None:
    """Add bitmaps: such that say what those of these names in ``store`` do, or else nothing.

    One new directory shows all of them, so that many cost little more than one; in memory there is
    an entry for each, and the bits of one cluster. ``progress`` counts bits. Raises as
    ``BitmapStore.add_bitmap`` and ``copy_bitmaps`` do.
    """
    async with changing(writer, limits) as change:
        new = [_entry(writer.disk.header, bitmap) for bitmap in bitmaps]
        _check_room(writer.disk, change.directory.entries, new)
        steps = Steps(progress, sum(_shape(writer.disk.header, entry).bits for entry in new))
        for number, entry in enumerate(new):
            table = await _content(change, entry, store, steps)
            place = await change.write_table(table)
            new[number] = attrs.evolve(entry, bitmap_table_offset=place)
        await change.list((*change.directory.entries, *new))
    steps.end()


def _shape(header: Header, entry: BitmapEntry) -> BitmapShape:
    return BitmapShape.of(header, entry.granularity_bits)


def _entry(header: Header, bitmap: Bitmap) -> BitmapEntry:
    """An entry that does not lead to a table yet."""
    name = bitmap.name.encode("utf-8", "surrogateescape")
    if not name:
        raise OptionError("Bitmap name cannot be empty", option="name")
    bits = bitmap.granularity.bit_length() - 1
    if bitmap.granularity.bit_count() != 1 or bits not in layout.GRANULARITY_BITS:
        raise OptionError("Granularity must be power of 2 and at least 512", option="granularity")
    return BitmapEntry(
        bitmap_table_offset=0,
        bitmap_table_size=BitmapShape.of(header, bits).entries,
        flags=layout.BITMAP_AUTO if bitmap.auto else 0,
        type=layout.DIRTY_TRACKING,
        granularity_bits=bits,
        extra=b"",
        name=name,
    )


async def _content(
    change: BitmapChange, entry: BitmapEntry, store: BitmapStore | None, steps: Steps
) -> Table:
    """The table of a new bitmap, when the bits behind it are written."""
    shape = _shape(change.writer.disk.header, entry)
    table = array("Q", bytes(8 * shape.entries))
    before = steps.done
    if store is not None:
        merge = Merge(change, shape, table)
        await merge.take_over(
            store,
            text(entry.name),
            lambda reached: steps.reach(before + (reached >> shape.granularity_bits)),
        )
    steps.reach(before + shape.bits)
    return table


def _check_room(
    disk: Dependencies, listed: Sequence[BitmapEntry], new: Sequence[BitmapEntry]
) -> None:
    """Refuse ``new`` bitmaps that cannot be stored beside those that are ``listed``."""
    seen = {entry.name for entry in listed}
    for number, entry in enumerate(new, len(seen) + 1):
        if entry.name in seen:
            raise ConflictError(f"Bitmap already exists: {text(entry.name)}")
        seen.add(entry.name)
        _check_storable(disk, entry, number)
    size = sum(entry.packed_size for entry in (*listed, *new))
    if size > layout.BITMAP_DIRECTORY_BYTES_MAX:
        raise LimitExceededError(
            f"'{disk.image.name()}': there is no room for another bitmap; remove some first",
            limit="bitmap directory",
            value=size,
            allowed=layout.BITMAP_DIRECTORY_BYTES_MAX,
        )


def _check_storable(disk: Dependencies, entry: BitmapEntry, count: int) -> None:
    """Refuse a bitmap that this image cannot have, as its only one or as one of ``count``."""
    shape = _shape(disk.header, entry)

    def refuse(why: str) -> str:
        name = text(entry.name)
        return f"Can't make bitmap '{name}' persistent in '{disk.image.name()}': {why}"

    if disk.header.version == 2:  # noqa: PLR2004 (a version is its own best name)
        raise UnsupportedOperationError(refuse("Cannot store dirty bitmaps in qcow2 v2 files"))
    if not shape.bits:
        raise UnsupportedOperationError(refuse("The disk has no bytes, and so its bitmap no bits"))
    if len(entry.name) > layout.BITMAP_NAME_MAX:
        most = layout.BITMAP_NAME_MAX
        raise OptionError(refuse(f"Name length exceeds maximum ({most} characters)"), option="name")
    if shape.length > layout.BITMAP_BYTES_MAX:
        raise OptionError(
            refuse("Too much space will be occupied by the bitmap. Use larger granularity"),
            option="granularity",
        )
    if count > layout.BITMAPS_MAX:
        raise LimitExceededError(
            refuse("Maximum number of persistent bitmaps is already reached"),
            limit="bitmaps",
            value=count,
            allowed=layout.BITMAPS_MAX,
        )


async def remove_bitmap(
    writer: ImageWriter, limits: Limits, name: str, progress: StepsCallback | None = None
) -> None:
    """See ``BitmapStore.remove_bitmap``."""
    steps = Steps(progress, writer.disk.size())
    async with changing(writer, limits) as change:
        at = change.directory.find(name)
        _, freed = await change.load(change.directory.entries[at], steps)
        entries = change.directory.entries
        await change.list((*entries[:at], *entries[at + 1 :]), freed)
    steps.end()


async def enable_bitmap(writer: ImageWriter, limits: Limits, name: str, *, enabled: bool) -> None:
    """See ``BitmapStore.enable_bitmap`` and ``disable_bitmap``."""
    async with changing(writer, limits) as change:
        at = change.directory.find(name)
        entry = change.directory.entries[at].usable()
        flags = entry.flags & ~layout.BITMAP_AUTO | (layout.BITMAP_AUTO if enabled else 0)
        if flags != entry.flags:
            await change.overwrite(at, "flags", flags)


async def clear_bitmap(
    writer: ImageWriter, limits: Limits, name: str, progress: StepsCallback | None = None
) -> None:
    """See ``BitmapStore.clear_bitmap``."""
    steps = Steps(progress, writer.disk.size())
    async with changing(writer, limits) as change:
        at = change.directory.find(name)
        entry = change.directory.entries[at].usable()
        table, freed = await change.load(entry, steps)
        if any(table):
            place = await change.write_table(array("Q", bytes(8 * len(table))))
            await change.overwrite(at, "bitmap_table_offset", place, freed)
    steps.end()


async def merge_bitmap(
    writer: ImageWriter,
    limits: Limits,
    name: str,
    source: str,
    store: BitmapStore,
    *,
    progress: StepsCallback | None = None,
) -> None:
    """See ``BitmapStore.merge_bitmap``."""
    steps = Steps(progress, writer.disk.size())
    async with changing(writer, limits) as change:
        at = change.directory.find(name)
        entry = change.directory.entries[at].usable()
        table, _ = await change.load(entry)
        shape = BitmapShape.of(writer.disk.header, entry.granularity_bits)
        shape.check(writer.disk.image, entry)
        merge = Merge(change, shape, table)
        await merge.take_over(store, source, steps.reach)
        if merge.changed:
            place = await change.write_table(table)
            old = (entry.bitmap_table_offset, writer.clusters(len(table) * 8))
            await change.overwrite(at, "bitmap_table_offset", place, [old, *merge.freed])
    steps.end()
