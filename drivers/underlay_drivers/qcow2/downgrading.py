"""From version 3 to 2, which has no feature bits and cannot say that a cluster is zero."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from underlay.errors import CorruptImageError, OptionError
from underlay.face import to_the_end
from underlay.storage import PreallocateMode
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.loading import load_table
from underlay_drivers.qcow2.snapshots import read_snapshots, snapshot_view
from underlay_drivers.qcow2.tables import Table, empty_table, packed, swap

if TYPE_CHECKING:
    from underlay.limits import Limits
    from underlay.steps import Steps
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["check_downgrade", "expand_zero_clusters"]


def check_downgrade(header: Header, *, refcount_bits: int) -> None:
    """Refuse an image that has what version 2 cannot have.

    Raises:
        OptionError: it has, and what.
    """
    if header.external_data_file:
        raise _refuse("Cannot downgrade an image with a data file")
    if refcount_bits != 1 << layout.REFCOUNT_ORDER_V2:
        raise _refuse("compat=0.10 requires refcount_bits=16")
    if header.compression_type:
        name = layout.COMPRESSION_TYPES[header.compression_type]
        raise _refuse(f"Cannot downgrade an image with the compression type {name}")
    features = header.incompatible_features & ~layout.DIRTY
    if features:
        raise _refuse(f"Cannot downgrade an image with incompatible features {features:#x} set")
    features = header.compatible_features & ~layout.LAZY_REFCOUNTS
    if features:
        raise _refuse(
            f"Cannot downgrade an image with unknown compatible features {features:#x} set"
        )
    if any(header.additional[1:]):
        raise _refuse("Cannot downgrade an image with unknown fields in its header")
    if header.extension(layout.EXTENSION_BITMAPS) is not None:
        raise _refuse("Cannot downgrade an image with bitmaps; remove them first")


def _refuse(what: str) -> OptionError:
    return OptionError(what, option="compat")


async def expand_zero_clusters(writer: ImageWriter, limits: Limits, steps: Steps) -> None:
    """Let no L2 table say "zero" any more, for one who is alone with all clusters.

    ``steps`` are the tables that the disk and its snapshots can have.

    Zero clusters become data that is zero; where nothing lies below, those without room of their
    own become unallocated. The guest sees no difference at any time.
    """
    disk, back = writer.disk, writer.back
    below = disk.header.backing_file is not None or disk.backing() is not None
    entries = await read_snapshots(disk.image, disk.header, limits)
    steps.expect(len(disk.l1) + sum(entry.l1_size for entry in entries))
    for number in range(len(disk.l1)):
        if disk.l1[number]:
            await _expand_active(writer, number, below=below)
            await back.relieve()
        steps.did()
    # From here on no snapshot shares a table that has zero clusters with the disk.
    await back.flush()
    await back.sync()
    seen: set[int] = set()
    for entry in entries:
        offset, count, _ = snapshot_view(
            entry, disk.header, file_size=disk.image.size(), image=disk.image.name()
        )
        l1 = await load_table(disk.image, offset, count, limits, what="a snapshot's L1 table")
        for word in l1:
            table = word & layout.HOST_OFFSET
            if table and table not in seen:
                seen.add(table)
                await _expand_inactive(writer, table, below=below)
            steps.did()
    await back.flush()
    await back.sync()
    steps.end()


def _is_zero(entry: int) -> bool:
    return bool(entry & layout.ZERO) and not entry & layout.COMPRESSED


def _runs(table: Table, size: int) -> Iterator[tuple[int, int]]:
    """Runs of zero clusters whose room, if they have any, is contiguous: index and how many."""
    index, end = 0, len(table)
    while index < end:
        first = table[index]
        if not _is_zero(first):
            index += 1
            continue
        count = 1
        step = size if first & layout.HOST_OFFSET else 0
        while index + count < end and table[index + count] == first + count * step:
            count += 1
        yield index, count
        index += count


async def _expand_active(writer: ImageWriter, number: int, *, below: bool) -> None:
    disk, back = writer.disk, writer.back
    geometry = disk.geometry
    size = geometry.cluster_size
    seen = await disk.l2_table(number)
    assert seen is not None
    for index, count in list(_runs(seen, size)):
        entry = seen[index]
        guest = (number << geometry.l1_shift) + index * size
        disk.entry(seen, index, guest)  # it makes sense
        host = entry & layout.HOST_OFFSET
        if host and entry & layout.COPIED:
            # Nobody else has this room, and nothing shows what is in it yet.
            await _zero_room(writer, host, count * size)
            first = entry & ~layout.ZERO
            shown = array("Q", range(first, first + count * size, size))
            disk.reach(host + count * size)
        elif below:
            await _give_room(writer, guest, guest + count * size)
            continue
        else:
            shown = array("Q", (0,)) * count
        async with back.lock:
            table = await writer.table(number)
            if not shown[0]:
                writer.let_go(*table[index : index + count])
            table[index : index + count] = shown
            back.touch_l2(number, table, index, count, shows=True)


async def _give_room(writer: ImageWriter, guest: int, end: int) -> None:
    while guest < end:
        guest += await writer.reserve(guest, end, PreallocateMode.OFF)
        await writer.back.relieve()


async def _expand_inactive(writer: ImageWriter, offset: int, *, below: bool) -> None:
    """Change a table that only snapshots use, in its place."""
    disk, back, allocator = writer.disk, writer.back, writer.allocator
    size = disk.geometry.cluster_size
    table = empty_table(size // 8)
    await disk.image.readv((memoryview(table).cast("B"),), offset)
    swap(table)
    runs = list(_runs(table, size))
    if not runs:
        return
    # As many snapshots lead to the table, and so to all that it leads to.
    times = await allocator.refcount(offset)
    new: list[int] = []
    freed: list[int] = []
    try:
        for index, count in runs:
            for at in range(index, index + count):
                host = table[at] & layout.HOST_OFFSET
                if host:
                    freed.append(host)
                table[at] = 0
                if below:
                    table[at] = await _zeroed_cluster(writer, times, new)
        await back.flush()
        await back.sync()
        await disk.image.write(packed(table), offset)
        await back.sync()
    except BaseException:
        if not back.broken:
            await to_the_end(_give_back(writer, new))
        raise
    async with back.lock:
        for host in freed:
            for _ in range(times):
                back.release(host)


async def _zeroed_cluster(writer: ImageWriter, times: int, new: list[int]) -> int:
    """Room for one cluster that is zero, and counted ``times`` times: its host offset."""
    disk, allocator = writer.disk, writer.allocator
    size = disk.geometry.cluster_size
    async with writer.back.lock:
        host, _ = await allocator.allocate(1)
        new.append(host)
        for _ in range(times - 1):
            await allocator.change(host, 1)
            new.append(host)
    await _zero_room(writer, host, size)
    return host


async def _zero_room(writer: ImageWriter, host: int, length: int) -> None:
    """Let host bytes be zeroes that nothing shows yet.

    Raises:
        CorruptImageError: there is metadata.
    """
    image = writer.disk.image
    for cluster in range(host, host + length, writer.disk.geometry.cluster_size):
        if cluster in writer.allocator.metadata:
            error = CorruptImageError(
                f"'{image.name()}': a zero cluster is said to have room at {cluster:#x}, where "
                "there is metadata; check the image",
                offset=cluster,
                field="L2 entry",
                value=cluster,
            )
            await writer.back.condemn(error)
            raise error
    size = image.size()
    if host < size:
        await image.write_zeroes(host, min(length, size - host), allocate=True)
    async with writer.back.not_flushing():
        # What is written behind it now must not be cut off again.
        if host + length > image.size():
            await image.resize(host + length, PreallocateMode.OFF)


async def _give_back(writer: ImageWriter, new: list[int]) -> None:
    async with writer.back.lock:
        for host in new:
            await writer.allocator.change(host, -1)
