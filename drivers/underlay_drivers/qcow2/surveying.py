"""Where all metadata lies: looked up before the first write, so that none overwrites it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from underlay.errors import CorruptImageError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.validation import Region

if TYPE_CHECKING:
    from underlay.handle import StorageHandle
    from underlay.limits import Limits
    from underlay_drivers.qcow2.dependencies import Dependencies

__all__ = ["survey"]

#: Memory for the offset of one cluster in the set.
_REMEMBERED_BYTES: Final = 96


async def survey(disk: Dependencies, limits: Limits) -> set[int]:
    """The host offsets of all metadata, but for refcount blocks and inactive L2 tables.

    Raises:
        CorruptImageError: two things claim one cluster, or a table lies past the end of the file.
        LimitExceededError: there is more than ``limits.metadata`` bytes can remember.
    """
    header = disk.header
    found: set[int] = set()
    regions = await _directories(disk.image, header, limits)
    clusters = sum(-(-region.length // header.cluster_size) for region in regions)
    clusters += len(disk.l1) - disk.l1.count(0)
    what = f"'{disk.image.name()}': what is remembered of where its tables lie"
    limits.check("metadata", clusters * _REMEMBERED_BYTES, what=what)
    for region in disk.regions:
        _claim(found, region, header, disk.image)
    shared: set[int] = set()
    for number, entry in enumerate(disk.l1):
        if entry:
            offset = disk.l2_offset(number)
            if entry & layout.COPIED or offset not in shared:
                _claim(found, Region("L2 table", offset, header.cluster_size), header, disk.image)
            if not entry & layout.COPIED:
                shared.add(offset)  # it is copied before it is written, for each of its entries
    for region in regions:
        _claim(found, region, header, disk.image)
    return found


async def _directories(image: StorageHandle, header: Header, limits: Limits) -> list[Region]:
    """The L1 tables of snapshots, and the bitmap directory with its tables."""
    regions: list[Region] = []
    if header.nb_snapshots:
        from underlay_drivers.qcow2.snapshots import read_snapshots

        entries = await read_snapshots(image, header, limits)
        table = sum(len(entry.pack()) for entry in entries)
        known = header.nb_snapshots * layout.SNAPSHOT.size
        known += -known % header.cluster_size
        if table > known:  # the header alone says how many entries there are, not how long
            rest = Region("snapshot table", header.snapshots_offset + known, table - known)
            regions.append(rest)
        for entry in entries:
            offset, size = entry.l1_table_offset, entry.l1_size * 8
            if size and (offset % header.cluster_size or offset + size > image.size()):
                raise CorruptImageError(
                    f"'{image.name()}': the L1 table of a snapshot at {offset:#x} ({size} bytes) "
                    "starts no cluster, or lies past the end of the file; repair the image before "
                    "writing to it",
                    offset=offset,
                    field="snapshot's L1 table",
                    value=offset,
                )
            if size:
                regions.append(Region("snapshot's L1 table", offset, size))
    if header.autoclear_features & layout.BITMAPS_CONSISTENT:
        from underlay_drivers.qcow2.bitmaps import read_bitmaps

        extension = header.bitmaps
        if extension is not None:
            offset, size = extension.directory_offset, extension.directory_size
            if offset + size <= image.size():  # else there is none
                regions.append(Region("bitmap directory", offset, size))
        with suppress(CorruptImageError):  # they go out of date with the first write anyway
            tables = [
                Region("bitmap table", entry.bitmap_table_offset, entry.bitmap_table_size * 8)
                for entry in await read_bitmaps(image, header, limits)
            ]
            regions += [table for table in tables if table.offset + table.length <= image.size()]
    return regions


def _claim(found: set[int], region: Region, header: Header, image: StorageHandle) -> None:
    size = header.cluster_size
    for offset in range(region.offset, region.offset + region.length, size):
        if offset in found:
            raise CorruptImageError(
                f"'{image.name()}': the cluster at {offset:#x} belongs to a {region.what} and to "
                "other metadata; repair the image before writing to it",
                offset=offset,
                field=region.what,
                value=offset,
            )
        found.add(offset)
