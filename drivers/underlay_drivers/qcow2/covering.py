"""What a write finds in the clusters that it touches, and what has to be filled around it.

Copy on write: a cluster that becomes data becomes so as a whole (with extended L2 entries: the
subclusters that are touched do). What the write itself does not cover is filled with what the disk
holds there. Nothing here changes anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from underlay.errors import CorruptImageError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.tables import (
    COMPRESSED,
    DATA,
    MIXED,
    NOWHERE,
    UNALLOCATED,
    ZERO,
    Geometry,
    Table,
)

if TYPE_CHECKING:
    from underlay_drivers.qcow2.allocation import Allocator
    from underlay_drivers.qcow2.dependencies import Dependencies

__all__ = [
    "IN_PLACE",
    "NO_ROOM",
    "RESERVED",
    "fill_from",
    "fill_to",
    "find",
    "references",
    "touched",
]

# What a write finds in a cluster.
#: All that it touches is data that may be written where it lies.
IN_PLACE: Final = 0
#: There is room of its own, which does not show (all of) what it touches.
RESERVED: Final = 1
#: There is none: unallocated, compressed, or shared with a snapshot.
NO_ROOM: Final = 2


def find(
    disk: Dependencies, allocator: Allocator, table: Table, offset: int, end: int
) -> tuple[int, int, int]:
    """What a write of guest bytes ``offset`` to ``end`` finds, in one table: kind, host, clusters.

    The clusters, one or more from the first on, are all of that kind, and if they have room it lies
    in a row from the host offset on.

    Raises:
        CorruptImageError: an entry makes no sense, or leads to metadata.
    """
    geometry = disk.geometry
    size, bits = geometry.cluster_size, geometry.cluster_bits
    guest = offset & -size
    index = (offset >> bits) & geometry.l2_entries - 1
    most = (end - guest + size - 1) >> bits
    if geometry.words == 1 and not table[index]:
        # By far the most common case: nothing is there.
        return NO_ROOM, NOWHERE, _empty_run(table, index, most)
    kind, host = _look(disk, allocator, table, offset, end)
    count = 1
    while count < most:
        there = guest + count * size
        further, next_host = _look(disk, allocator, table, there, end)
        if further != kind or (kind != NO_ROOM and next_host != host + count * size):
            break
        count += 1
    return kind, host, count


def _empty_run(table: Table, index: int, most: int) -> int:
    """How many entries from ``index`` on are zero, one at least."""
    if most > 1:
        run = table[index : index + most]
        if any(run):
            return next(count for count, entry in enumerate(run) if entry)
    return most


def _look(
    disk: Dependencies, allocator: Allocator, table: Table, offset: int, end: int
) -> tuple[int, int]:
    """What a write of ``offset`` to ``end`` finds in the first cluster of these, and its room."""
    geometry = disk.geometry
    guest = offset & -geometry.cluster_size
    index = (offset >> geometry.cluster_bits) & geometry.l2_entries - 1
    entry, bitmap = disk.entry(table, index, guest)
    kind, host = geometry.decode(entry, bitmap)
    references(disk, allocator, entry)  # what is written over, or let go, is no metadata
    if kind == COMPRESSED or host == NOWHERE:
        return NO_ROOM, NOWHERE
    if not geometry.external and entry < layout.COPIED:
        return NO_ROOM, NOWHERE
    if kind in {MIXED, UNALLOCATED}:
        asked = touched(geometry, offset - guest, end - guest)
        return (RESERVED if asked & ~bitmap else IN_PLACE), host
    return (IN_PLACE if kind == DATA else RESERVED), host


def references(disk: Dependencies, allocator: Allocator, entry: int) -> list[tuple[int, int]]:
    """What an L2 entry holds a reference to: host offset and clusters, of the image file.

    Raises:
        CorruptImageError: that is no place for data: letting go of it would free metadata.
    """
    geometry = disk.geometry
    size = geometry.cluster_size
    if entry & layout.COMPRESSED:
        start, length = geometry.compressed(entry)
        offset = start & -size
        clusters = (start + length - offset + size - 1) >> geometry.cluster_bits
    else:
        offset, clusters = entry & layout.HOST_OFFSET, 1
        if geometry.external or not offset:
            return []
    metadata, limit = allocator.metadata, allocator.limit
    for cluster in range(offset, offset + clusters * size, size):
        if cluster in metadata or cluster & size - 1 or cluster >= limit:
            raise CorruptImageError(
                f"'{disk.image.name()}': an L2 entry leads to {cluster:#x}, where there is "
                "metadata, or no cluster starts, or nothing was ever put; check the image",
                offset=cluster,
                field="L2 entry",
                value=entry,
            )
    return [(offset, clusters)]


def touched(geometry: Geometry, start: int, end: int) -> int:
    """The bits of the subclusters that bytes ``start`` to ``end`` of a cluster touch."""
    size = geometry.subcluster_size
    first = max(start, 0) // size
    last = (min(end, geometry.cluster_size) - 1) // size
    return (1 << last + 1) - (1 << first)


def fill_from(disk: Dependencies, table: Table, kind: int, offset: int, *, clean: bool) -> int:
    """From which guest offset on new room has to be filled for a write that starts at ``offset``.

    ``clean``: the room was never written and reads as zeroes.
    """
    unit = _unit(disk, table, kind, offset)
    if clean and offset % unit and _reads_zero(disk, table, offset):
        return offset
    return offset - offset % unit


def fill_to(disk: Dependencies, table: Table, kind: int, stop: int, *, clean: bool) -> int:
    """Up to which guest offset new room has to be filled for a write that ends at ``stop``."""
    unit = _unit(disk, table, kind, stop - 1)
    if clean and stop % unit and _reads_zero(disk, table, stop - 1):
        # Whole sectors: a later write to the same one must not depend on growth.
        unit = layout.SECTOR
    return stop + -stop % unit


def _unit(disk: Dependencies, table: Table, kind: int, at: int) -> int:
    """The block around guest offset ``at`` that becomes data as a whole; 1 if it is already."""
    geometry = disk.geometry
    size = geometry.cluster_size
    if not geometry.extended:
        return size
    entry, bitmap = disk.entry(
        table, (at >> geometry.cluster_bits) % geometry.l2_entries, at & -size
    )
    allocated = bitmap & layout.ALL_ALLOCATED
    if kind == NO_ROOM:
        # What has data elsewhere is copied whole; else subclusters may stay as they are.
        elsewhere = allocated or entry & layout.COMPRESSED
        return size if elsewhere else geometry.subcluster_size
    if allocated >> (at & size - 1) // geometry.subcluster_size & 1:
        return 1
    return geometry.subcluster_size


def _reads_zero(disk: Dependencies, table: Table, at: int) -> bool:
    """Whether the cluster at ``at`` is known to read as zeroes; one without subclusters."""
    geometry = disk.geometry
    if geometry.extended:
        return False
    index = (at >> geometry.cluster_bits) % geometry.l2_entries
    if not table[index]:
        return disk.nothing_reads_zero()
    kind, _ = geometry.decode(*disk.entry(table, index, at & -geometry.cluster_size))
    return kind == ZERO or (kind == UNALLOCATED and disk.nothing_reads_zero())
