"""Zeroing and discarding: entries change, data does not move.

Only whole clusters (with extended L2 entries: subclusters) can be changed so; the core writes what
is left at the ends. What an entry lets go is freed late, as everything is.
"""

from __future__ import annotations

import enum
from array import array
from typing import TYPE_CHECKING

from underlay.errors import CorruptImageError, UnsupportedOperationError
from underlay_drivers.qcow2 import layout

if TYPE_CHECKING:
    from underlay_drivers.qcow2.tables import Table
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["Goal", "change_entries", "change_range"]


class Goal(enum.Enum):
    """What a range is to become."""

    #: Zeroes; room that it has stays reserved.
    ZERO = "zero"
    #: Zeroes, and its room is freed.
    FREED = "freed"
    #: What the backing image has there, and its room is freed.
    BACKING = "backing"


async def change_range(
    writer: ImageWriter, offset: int, length: int, goal: Goal
) -> tuple[int, int]:
    """Change what can be changed of guest bytes ``offset`` on, up to the end of one L2 table.

    The offset and the length that were changed; with a length of 0, where to go on. Where the
    backing image was declined, zeroes that no entry can say become data: left as they are they
    would show it another time.

    Raises:
        UnsupportedOperationError: version 2 cannot say "zero" where that hides something.
    """
    disk = writer.disk
    geometry = disk.geometry
    unit = geometry.subcluster_size
    end = offset + length
    start = offset + -offset % unit
    end = end + -end % unit if end >= disk.size() else end - end % unit
    if goal is not Goal.BACKING and disk.lacks_backing():
        version_2 = disk.header.version == 2  # noqa: PLR2004 (a version is its own best name)
        if version_2 or offset < start or start >= end:
            up_to = offset + length if version_2 or offset == start else start
            return await _write_zeroes(writer, offset, min(offset + length, up_to))
    if start >= end:
        return start, 0
    if goal is not Goal.BACKING and not _can_say_zero(writer, goal):
        raise UnsupportedOperationError(
            f"'{disk.image.name()}' is of version 2, which cannot mark clusters as zero"
        )
    await writer.prepare()
    await writer.back.relieve()
    bits, shift = geometry.cluster_bits, geometry.l1_shift
    end = min(end, (start >> shift) + 1 << shift)
    holder = await writer.tickets.acquire(start >> bits, (end - 1 >> bits) + 1, exclusive=True)
    try:
        await writer.make_ready()
        if writer.tracking is not None:
            writer.tracking.mark(start, end)
        if geometry.external and (goal is Goal.FREED or _is_raw(writer)):
            # Host and guest offset are the same for ever: this is a write like any other.
            await disk.data_storage().write_zeroes(start, end - start)
        async with writer.back.lock:
            writer.back.check()
            reached = await change_entries(writer, start, end, goal)
            if reached == start:
                # A compressed cluster changes as a whole or not at all; what follows it may.
                return start - start % geometry.cluster_size + geometry.cluster_size, 0
            return start, reached - start
    except CorruptImageError as error:
        await writer.back.condemn(error)
        raise
    finally:
        writer.tickets.release(holder)


async def _write_zeroes(writer: ImageWriter, start: int, end: int) -> tuple[int, int]:
    """Write zeroes as data, up to the end of one L2 table; what that was."""
    geometry = writer.disk.geometry
    bits, shift = geometry.cluster_bits, geometry.l1_shift
    end = min(end, (start >> shift) + 1 << shift)
    await writer.prepare()
    clusters = start >> bits, (end - 1 >> bits) + 1
    async with writer.back.condemning(), writer.tickets.hold(*clusters, exclusive=True):
        await writer.make_ready()
        if writer.tracking is not None:
            writer.tracking.mark(start, end)
        await writer.write_zeroes(start, end)
    return start, end - start


def _can_say_zero(writer: ImageWriter, goal: Goal) -> bool:
    disk = writer.disk
    if disk.header.version > 2:  # noqa: PLR2004 (a version is its own best name)
        return True
    return goal is Goal.FREED and disk.nothing_stays_zero()


def _is_raw(writer: ImageWriter) -> bool:
    return bool(writer.disk.header.autoclear_features & layout.RAW_EXTERNAL_DATA)


async def change_entries(writer: ImageWriter, start: int, end: int, goal: Goal) -> int:
    """Change entries of one table, and return the guest offset up to which that went.

    Under the lock, by one who has the clusters to himself.
    """
    disk = writer.disk
    geometry = disk.geometry
    number = start >> geometry.l1_shift
    shown_already = goal is Goal.BACKING or disk.nothing_stays_zero()
    if not disk.l1[number] and shown_already:
        return end
    size = geometry.cluster_size
    first = (start >> geometry.cluster_bits) % geometry.l2_entries
    last = (end - 1 >> geometry.cluster_bits) % geometry.l2_entries
    table = await writer.table(number)
    guest = start & ~(size - 1)
    index = first
    while index <= last:
        count = 1
        entry, bitmap = disk.entry(table, index, guest)
        if geometry.extended:
            mask = _whole_subclusters(writer, guest, start, end)
            new = _new_subclusters(writer, entry, bitmap, mask, goal)
            if new is None:  # compressed, and not all of it
                end = guest
                break
            changed = new != (entry, bitmap)
        else:
            new = _new_entry(writer, entry, goal), 0
            changed = new[0] != entry
            if entry in {0, layout.ZERO}:  # of which there may be very many
                count = _alike(table, index, last + 1)
        if changed:
            if entry & (layout.HOST_OFFSET | layout.COMPRESSED) != new[0] & (
                layout.HOST_OFFSET | layout.COMPRESSED
            ):
                await writer.allocator.believe()
                writer.let_go(entry)
            words = geometry.words
            table[index * words : (index + count) * words] = array("Q", new[:words]) * count
            # At once: should a later entry make no sense, what was let go must be written as gone.
            writer.back.touch_l2(number, table, index, count, shows=False)
        index += count
        guest += count * size
    return max(start, end)


def _alike(table: Table, index: int, end: int) -> int:
    """How many entries from ``index`` on are surely the same; there may be more."""
    entry, count = table[index], 1
    while index + count < end:
        further = table[index + count : min(index + 2 * count, end)]
        if further.count(entry) < len(further):
            break
        count += len(further)
    return count


def _new_entry(writer: ImageWriter, entry: int, goal: Goal) -> int:
    """What the entry of a whole cluster becomes."""
    disk = writer.disk
    version_2 = disk.header.version == 2  # noqa: PLR2004
    if goal is Goal.BACKING:
        if _is_raw(writer):
            return entry
        return 0
    if not entry and disk.nothing_stays_zero():
        return 0
    if disk.geometry.external and entry & layout.COPIED:
        # Its place stays its own; what is to be freed has been zeroed there.
        keep_data = goal is Goal.FREED or _is_raw(writer)
        return entry if keep_data else entry | layout.ZERO
    if version_2:
        return 0
    own = entry & layout.COPIED and not entry & layout.COMPRESSED
    if goal is Goal.ZERO and own:
        return entry | layout.ZERO
    return layout.ZERO


def _whole_subclusters(writer: ImageWriter, guest: int, start: int, end: int) -> int:
    """The bits of the subclusters of the cluster at ``guest`` that lie in ``start`` to ``end``."""
    size = writer.disk.geometry.subcluster_size
    first = max(0, start - guest) // size
    last = min(layout.SUBCLUSTERS, (end - guest) // size)
    return (1 << last) - (1 << first)


def _new_subclusters(
    writer: ImageWriter, entry: int, bitmap: int, mask: int, goal: Goal
) -> tuple[int, int] | None:
    """What an extended entry becomes; None if it cannot change in these subclusters alone."""
    disk = writer.disk
    whole = mask == layout.ALL_ALLOCATED
    if entry & layout.COMPRESSED:
        if not whole:
            return None
        entry, bitmap = 0, 0
    external = disk.geometry.external
    if external and entry & layout.COPIED and goal is not Goal.ZERO:
        in_place = bitmap & mask
        if goal is Goal.FREED or _is_raw(writer):
            # What is data was zeroed in its place; the rest of it is marked.
            rest = mask & ~in_place
            return entry, bitmap | rest << layout.SUBCLUSTERS
    zero = 0 if goal is Goal.BACKING else mask
    if not entry and not bitmap and goal is not Goal.BACKING and disk.nothing_stays_zero():
        zero = 0
    bitmap = bitmap & ~(mask | mask << layout.SUBCLUSTERS) | zero << layout.SUBCLUSTERS
    own = entry & layout.COPIED
    unused = not bitmap & layout.ALL_ALLOCATED
    if unused and not external and not (own and goal is Goal.ZERO):
        entry = 0
    return entry, bitmap
