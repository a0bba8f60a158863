"""Growing and shrinking a disk.

What lies beyond the end of a disk reads as zeroes should it ever grow there: growing makes sure of
that itself, whoever shrank the disk before, and over a longer backing image too.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import attrs

from underlay.errors import LimitExceededError, UnsupportedOperationError
from underlay.face import to_the_end
from underlay.steps import Steps, StepsCallback
from underlay.storage import PreallocateMode
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.preallocating import preallocate
from underlay_drivers.qcow2.tables import UNALLOCATED, ZERO, Table, packed
from underlay_drivers.qcow2.writeback import HeaderSwitch
from underlay_drivers.qcow2.zeroing import Goal, change_entries

if TYPE_CHECKING:
    from underlay.handle import StorageHandle
    from underlay_drivers.qcow2.dependencies import Dependencies
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["grow", "shrink"]

#: Further than any guest offset.
_FAR: Final = 1 << 64


async def grow(
    writer: ImageWriter,
    size: int,
    preallocation: PreallocateMode,
    progress: StepsCallback | None = None,
) -> None:
    """Let the disk have ``size`` bytes, more than it has.

    ``progress`` counts the new bytes: twice where the host reserves their space beforehand, and
    once more what hides a longer backing image. What fails gives all of that space back.

    Raises:
        LimitExceededError: the L1 table would become too large.
        UnsupportedOperationError: there are snapshots, in version 2.
    """
    disk = writer.disk
    _check_snapshots(writer)
    await writer.prepare()
    async with writer.alone(), writer.back.condemning():
        old = disk.size()
        if size <= old:
            return
        await writer.make_ready()
        raw = disk.header.autoclear_features & layout.RAW_EXTERNAL_DATA
        if raw and preallocation is PreallocateMode.OFF:
            # What others write to the raw file itself is to be seen.
            preallocation = PreallocateMode.METADATA
        entries = -(-size >> disk.geometry.l1_shift)
        if entries * 8 > layout.L1_BYTES_MAX:
            raise LimitExceededError(
                f"A disk of {size} bytes needs an L1 table of more than {layout.L1_BYTES_MAX} "
                "bytes; use larger clusters",
                limit="L1 table",
                value=entries * 8,
                allowed=layout.L1_BYTES_MAX,
            )
        if entries > len(disk.l1):
            table = array("Q", disk.l1)
            table.extend([0] * (entries - len(table)))
            await writer.back.flush()
            await _move_l1(writer, table)
        await _clear_beyond(writer, old)
        steps = Steps(progress, size - old)
        try:
            await _fill_growth(writer, old, size, preallocation, steps)
            await writer.back.flush()
            await _publish(writer, size)
        except BaseException:
            if not writer.back.broken:
                await to_the_end(_clear_beyond(writer, disk.size()))
            raise
        steps.end()


async def _fill_growth(
    writer: ImageWriter, old: int, size: int, preallocation: PreallocateMode, steps: Steps
) -> None:
    """Make bytes ``old`` to ``size``, which nobody sees yet, what they are to be."""
    disk = writer.disk
    if disk.geometry.external:
        await _grow_data_file(disk.data_storage(), old, size, preallocation, steps)
    await _zero_growth(writer, old, size, steps)
    if preallocation is not PreallocateMode.OFF:
        await preallocate(writer, old, size, preallocation, steps)


async def shrink(writer: ImageWriter, size: int, progress: StepsCallback | None = None) -> None:
    """Let the disk have ``size`` bytes, fewer than it has.

    ``progress`` counts the bytes that go: once for what leads to them, once for their space.

    Raises:
        UnsupportedOperationError: there are snapshots in version 2.
    """
    disk = writer.disk
    _check_snapshots(writer)
    await writer.prepare()
    async with writer.alone(), writer.back.condemning():
        if size >= disk.size():
            return
        await writer.make_ready()
        steps = Steps(progress, 2 * (disk.size() - size))
        async with writer.back.lock:
            if not await writer.allocator.believe():
                await _look_beyond(writer, size)  # before its size is another
        # What is beyond the end no longer counts; only then it is taken away.
        await writer.back.flush()
        await _publish(writer, size)
        await _clear_beyond(writer, size, steps)
        await _zero_tail(writer, size)
        await writer.back.free_all(steps)
        if disk.geometry.external:
            await disk.data_storage().resize(size)
        steps.end()


def _check_snapshots(writer: ImageWriter) -> None:
    """A snapshot of version 2 need not say how large the disk was: it must stay so."""
    header = writer.disk.header
    if header.nb_snapshots and header.version == 2:  # noqa: PLR2004 (its own best name)
        raise UnsupportedOperationError(
            f"'{writer.disk.image.name()}' is of version 2 and has snapshots, so its size cannot "
            "change; delete them, or amend it to version 3"
        )


async def _publish(writer: ImageWriter, size: int) -> None:
    """Write the disk's size into the header, durably, and let it be the disk's."""
    if writer.tracking is not None:
        await writer.tracking.take_all()

    await writer.back.switch_header(HeaderSwitch(change=lambda old: attrs.evolve(old, size=size)))


async def _move_l1(writer: ImageWriter, table: Table) -> None:
    """Let the disk have this L1 table, in a new place; nothing may be dirty.

    The table is whole and durable before the header leads to it; the old one is freed late.
    """
    disk, back = writer.disk, writer.back
    cluster = disk.geometry.cluster_size
    old_offset, old_entries = disk.header.l1_table_offset, disk.header.l1_size
    clusters = -(-len(table) * 8 // cluster)
    async with back.lock:
        offset = await writer.allocator.allocate_exactly(clusters)
        writer.claim_metadata(offset, clusters)
    try:
        await back.flush()
        await disk.image.write(packed(table), offset)
    except BaseException:
        await to_the_end(writer.give_back_metadata(offset, clusters))
        raise

    await back.switch_header(
        HeaderSwitch(
            change=lambda old: attrs.evolve(old, l1_table_offset=offset, l1_size=len(table)),
            l1=table,
            freed=[(old_offset, -(-old_entries * 8 // cluster))] if old_entries else (),
        )
    )


async def _clear_beyond(writer: ImageWriter, size: int, steps: Steps | None = None) -> None:
    """Let go of all clusters that lie wholly beyond ``size``; ``steps`` are the bytes there."""
    disk = writer.disk
    geometry = disk.geometry
    end = size + -size % geometry.cluster_size
    first = end >> geometry.l1_shift
    for number in range(first, len(disk.l1)):
        if not disk.l1[number]:
            continue
        async with writer.back.lock:
            index = 0
            if number == first:
                index = (end >> geometry.cluster_bits) % geometry.l2_entries
            await _clear_table(writer, number, index)
        await writer.back.relieve()
        if steps is not None:
            steps.reach((number + 1 << geometry.l1_shift) - size)


async def _look_beyond(writer: ImageWriter, size: int) -> None:
    """Make sure that all that lies wholly beyond ``size`` can be let go; under the lock.

    Raises:
        CorruptImageError: it cannot.
    """
    disk = writer.disk
    geometry = disk.geometry
    guest = size + -size % geometry.cluster_size
    for number in range(guest >> geometry.l1_shift, len(disk.l1)):
        table = await disk.l2_table(number)
        end = number + 1 << geometry.l1_shift
        while table is not None and guest < end:
            index = (guest >> geometry.cluster_bits) % geometry.l2_entries
            entry, _ = disk.entry(table, index, guest)
            writer.clusters_of(entry)
            guest += geometry.cluster_size
        guest = end


async def _clear_table(writer: ImageWriter, number: int, index: int) -> None:
    """Let go of what an L2 table leads to from entry ``index`` on; of a whole one itself."""
    disk = writer.disk
    words = disk.geometry.words
    table = await disk.l2_table(number)
    assert table is not None
    if not any(table[index * words :]):
        if index:
            return
    elif index:
        table = await writer.table(number)
    held = [run for entry in table[index * words :: words] for run in writer.clusters_of(entry)]
    # Interrupted in here, it leaks; the other way round, entries would lead to what is free.
    if index:
        count = disk.geometry.l2_entries - index
        table[index * words :] = array("Q", [0]) * (count * words)
        writer.back.touch_l2(number, table, index, count, shows=False)
    else:
        writer.back.unlink_l2(number)
    for offset, clusters in held:
        writer.back.release(offset, clusters)


async def _zero_tail(writer: ImageWriter, size: int) -> None:
    """Zero what the last cluster holds, or lets show through, beyond ``size``."""
    disk = writer.disk
    geometry = disk.geometry
    end = size + -size % geometry.cluster_size
    if size == end:
        return
    table = await disk.l2_table(size >> geometry.l1_shift)
    index = (size >> geometry.cluster_bits) % geometry.l2_entries
    entry, bitmap = (
        (0, 0) if table is None else disk.entry(table, index, end - geometry.cluster_size)
    )
    kind, _ = geometry.decode(entry, bitmap)
    shows = kind == UNALLOCATED and _end_below(disk) > size
    if kind not in {UNALLOCATED, ZERO} or shows:
        await writer.write_zeroes(size, end)


async def _grow_data_file(
    data: StorageHandle, old: int, size: int, preallocation: PreallocateMode, steps: Steps
) -> None:
    """Let the data file have ``size`` bytes, zeroes from ``old`` on, whatever was there."""
    there = data.size()
    if there > old:
        await data.write_zeroes(old, min(there, size) - old)
    if there < size:
        if preallocation.reserves:
            steps.expect(size - there)
        await data.resize(size, _on_host(preallocation), steps)


async def _zero_growth(writer: ImageWriter, old: int, size: int, steps: Steps) -> None:
    """Let bytes ``old`` to ``size`` read as zeroes, whatever shows through there."""
    disk = writer.disk
    geometry = disk.geometry
    await _zero_tail(writer, old)
    if not old and disk.backing() is None:
        return  # the image is just being created
    start = old + -old % geometry.cluster_size
    end = min(size, _end_below(disk))
    end += -end % geometry.cluster_size
    if start >= end:
        return
    steps.expect(end - start)
    while start < end:
        stop = min(end, (start >> geometry.l1_shift) + 1 << geometry.l1_shift)
        if disk.header.version == 2:  # noqa: PLR2004 (a version is its own best name)
            await writer.write_zeroes(start, stop)
        else:
            async with writer.back.lock:
                await change_entries(writer, start, stop, Goal.ZERO)
            await writer.back.relieve()
        steps.did(stop - start)
        start = stop


def _end_below(disk: Dependencies) -> int:
    """The guest offset up to which something may show through what is unallocated."""
    backing = disk.backing()
    if backing is not None:
        return backing.size()
    # The backing image may have been declined this time, and then its length is unknown.
    return 0 if disk.nothing_stays_zero() else _FAR


def _on_host(preallocation: PreallocateMode) -> PreallocateMode:
    """How the host's file is to grow."""
    if preallocation is PreallocateMode.METADATA:
        return PreallocateMode.OFF
    return preallocation
