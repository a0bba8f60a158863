"""Giving the clusters of a growing disk their places beforehand, where QEMU puts them."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from underlay.face import to_the_end
from underlay.storage import PreallocateMode
from underlay_drivers.qcow2 import layout

if TYPE_CHECKING:
    from underlay.steps import Steps
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["preallocate"]

#: QEMU looks at L2 tables in pieces of so many entries, and so allocates for one piece at a time.
_SLICE: Final = 512


async def preallocate(
    writer: ImageWriter, old: int, size: int, mode: PreallocateMode, steps: Steps
) -> None:
    """Give every cluster of guest bytes ``old`` to ``size`` a place, which reads as zeroes.

    ``steps`` are these bytes, and those that the host is to reserve in one piece. For one who is
    alone with all clusters; nothing shows through them.
    """
    disk = writer.disk
    cluster = disk.geometry.cluster_size
    at = old + -old % cluster
    end = size + -size % cluster
    on_host = PreallocateMode.OFF if mode is PreallocateMode.METADATA else mode
    if on_host is PreallocateMode.OFF or disk.geometry.external or any(disk.l1):
        while at < end:
            taken = await _reserve(writer, at, min(end, _end_of_slice(writer, at)), on_host)
            at += taken
            await writer.back.relieve()
            steps.did(taken)
    else:
        await _fill_empty(writer, at, end, mode, steps)


async def _fill_empty(
    writer: ImageWriter, at: int, end: int, mode: PreallocateMode, steps: Steps
) -> None:
    """Give a disk without any data yet all its places in one piece."""
    cluster = writer.disk.geometry.cluster_size
    room = await _lay_out(writer, (end - at) // cluster, mode, steps)
    try:
        while at < end:
            taken = await _place(writer, at, min(end, _end_of_slice(writer, at)), room=room)
            at += taken
            room += taken
            await writer.back.relieve()
            steps.did(taken)
    except BaseException:
        await to_the_end(_give_back(writer, room, (end - at) // cluster))
        raise


def _end_of_slice(writer: ImageWriter, guest: int) -> int:
    """The guest offset behind the last cluster of the same piece of an L2 table."""
    geometry = writer.disk.geometry
    covered = min(_SLICE, geometry.l2_entries) * geometry.cluster_size
    return guest - guest % covered + covered


async def _lay_out(writer: ImageWriter, clusters: int, mode: PreallocateMode, steps: Steps) -> int:
    """Make room for the data of an empty disk in one piece: its host offset.

    The reference counts come first, for the data and for the L2 tables that follow.
    """
    disk, back, allocator = writer.disk, writer.back, writer.allocator
    geometry = disk.geometry
    tables = -(-clusters // geometry.l2_entries) + 1
    async with back.lock:
        start = await allocator.end_of_use()
        room = await allocator.lay_out_counts(start, clusters + tables)
    # The old refcount table is free before anything else is allocated.
    await back.flush()
    await back.sync()
    async with back.lock:
        await allocator.take_at(room, clusters)
    try:
        end = room + clusters * geometry.cluster_size
        if mode.reserves:
            steps.expect(clusters * geometry.cluster_size)
        async with back.not_flushing():
            await disk.image.resize(end, mode, steps)
    except BaseException:
        await to_the_end(_give_back(writer, room, clusters))
        raise
    disk.reach(end)
    return room


async def _reserve(writer: ImageWriter, guest: int, stop: int, mode: PreallocateMode) -> int:
    """Give clusters of one piece of a table a place: how many bytes have one now."""
    disk, back = writer.disk, writer.back
    geometry = disk.geometry
    size = geometry.cluster_size
    count = (stop - guest) // size
    async with back.lock:
        table = await writer.table(guest >> geometry.l1_shift)
        index = (guest >> geometry.cluster_bits) % geometry.l2_entries
        words = geometry.words
        empty = not any(table[index * words : (index + count) * words])
        host = guest
        if empty and not geometry.external:
            host = await writer.allocator.allocate_exactly(count)
    if not empty:
        return await writer.reserve(guest, stop, mode)
    if geometry.external:
        return await _place(writer, guest, stop, room=host)
    try:
        await _make_room(writer, host, host + count * size, mode)
        return await _place(writer, guest, stop, room=host)
    except BaseException:
        await to_the_end(_give_back(writer, host, count))
        raise


async def _make_room(writer: ImageWriter, host: int, end: int, mode: PreallocateMode) -> None:
    """Let host bytes read as zeroes."""
    image = writer.disk.image
    size = image.size()
    if host < size:
        await image.write_zeroes(host, min(end, size) - host, allocate=True)
    async with writer.back.not_flushing():
        # A table that is written behind it now must not be cut off again.
        if end > image.size():
            await image.resize(end, mode)
    writer.disk.reach(end)


async def _place(writer: ImageWriter, guest: int, stop: int, *, room: int) -> int:
    """Let entries of one piece of a table, which lead nowhere, lead to ``room``: the bytes."""
    disk, back = writer.disk, writer.back
    geometry = disk.geometry
    size, words = geometry.cluster_size, geometry.words
    count = (stop - guest) // size
    number = guest >> geometry.l1_shift
    index = (guest >> geometry.cluster_bits) % geometry.l2_entries
    first = room | layout.COPIED
    async with back.lock:
        table = await writer.table(number)
        # With subclusters none of them is data yet.
        table[index * words : (index + count) * words : words] = array(
            "Q", range(first, first + count * size, size)
        )
        back.touch_l2(number, table, index, count, shows=True)
    return count * size


async def _give_back(writer: ImageWriter, host: int, count: int) -> None:
    async with writer.back.lock:
        if not writer.back.broken:
            await writer.allocator.lower(host, count)
