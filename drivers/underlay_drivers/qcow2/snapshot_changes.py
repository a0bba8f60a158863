"""Taking, applying and deleting internal snapshots.

A snapshot is an L1 table of its own, and whatever it leads to is counted for it. The bit COPIED
says in the active tables that a count is one, so bits and counts have to change together. They do:
what changes is written to new places, counts included, and one write of the header's first sector
shows all of it. A crash leaves the image with the snapshot or without it, and leaks at worst.

What ``progress`` is told counts guest bytes, as often as a step goes over them.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs

from underlay.errors import (
    CorruptImageError,
    LimitExceededError,
    OptionError,
    UnsupportedOperationError,
)
from underlay.face import to_the_end
from underlay.steps import Steps, StepsCallback
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.loading import load_table
from underlay_drivers.qcow2.snapshots import (
    SnapshotEntry,
    find_snapshot,
    read_snapshots,
    snapshot_view,
)
from underlay_drivers.qcow2.tables import Table, empty_table, packed, swap
from underlay_drivers.qcow2.writeback import HeaderSwitch

if TYPE_CHECKING:
    from underlay.limits import Limits
    from underlay_drivers.qcow2.dirty import Freed
    from underlay_drivers.qcow2.header import Header
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["apply_snapshot", "create_snapshot", "delete_snapshot"]

_NAME_MAX: Final = (1 << 16) - 1


async def create_snapshot(
    writer: ImageWriter, name: str, limits: Limits, progress: StepsCallback | None = None
) -> SnapshotEntry:
    """Take a snapshot of the disk as it is now.

    Raises:
        OptionError: the name is empty or too long.
        LimitExceededError: there are too many, or a cluster cannot be counted once more.
        ConflictError: somebody holds a lease, and may write through a mapping, for too long.
    """
    stored = name.encode("utf-8", "surrogateescape")
    if not 0 < len(stored) <= _NAME_MAX:
        raise OptionError(f"A snapshot's name has 1 to {_NAME_MAX} bytes", option="name")
    disk = writer.disk
    if disk.geometry.external:
        raise UnsupportedOperationError(
            f"'{disk.image.name()}' has an external data file, which cannot keep old data"
        )
    await writer.prepare()
    async with writer.at_rest(), _all_or_nothing(writer):
        entries = await read_snapshots(disk.image, disk.header, limits)
        entry = _new_entry(writer, entries, stored)
        steps = Steps(progress, _covered(writer, disk.l1))
        # The snapshot gets the tables that there are, and the disk copies of them.
        l1 = array("Q", bytes(8 * len(disk.l1)))
        for number, word in enumerate(disk.l1):
            steps.did(1 << disk.geometry.l1_shift)
            if word:
                table = await _active_table(writer, number)
                await _share(writer, table, number << disk.geometry.l1_shift)
                l1[number] = await _write_new(writer, packed(table)) | layout.COPIED
        place = await _write_new(writer, packed(l1))
        fields, freed = await _write_entries(writer, entries, (*entries, entry))
        await _switch(writer, l1, freed, l1_table_offset=place, **fields)
    steps.end()
    return entry


async def apply_snapshot(
    writer: ImageWriter, wanted: str, limits: Limits, progress: StepsCallback | None = None
) -> None:
    """Make the disk what it was at a snapshot; what it is now is gone.

    Raises:
        OptionError: there is no such snapshot.
    """
    disk, back = writer.disk, writer.back
    await writer.prepare()
    async with writer.alone():
        entries, entry = await _find(writer, wanted, limits)
        offset, count, size = _view(writer, entry)
        async with _all_or_nothing(writer):
            l1 = await _load(writer, offset, count, limits, entries)
            steps = Steps(progress, 2 * _covered(writer, disk.l1) + _covered(writer, l1))
            await writer.make_ready()
            if writer.tracking is not None and size != disk.size():
                await writer.tracking.take_all()
            # What was active until now goes when nobody reads it any more.
            freed = await _let_go_of_all(writer, disk.l1, disk.header.l1_table_offset, steps)
            # Both share all of it from now on, and so nothing is counted once.
            async for number, offset, table in _tables(writer, l1, steps):
                l1[number] = offset
                await _count_shared(writer, offset, table)
            l1.extend([0] * (-(-size >> disk.geometry.l1_shift) - len(l1)))
            place = await _write_new(writer, packed(l1))
            if writer.tracking is not None:
                # All of the disk is about to change.
                writer.tracking.mark(0, max(size, disk.size()))
            await _switch(writer, l1, freed, l1_table_offset=place, size=size)
        await back.free_all(steps)
    steps.end()


async def delete_snapshot(
    writer: ImageWriter, wanted: str, limits: Limits, progress: StepsCallback | None = None
) -> None:
    """Remove a snapshot, and free what only it held.

    Raises:
        OptionError: there is no such snapshot.
    """
    disk, back = writer.disk, writer.back
    await writer.prepare()
    async with writer.alone():
        entries, entry = await _find(writer, wanted, limits)
        offset, count, _ = _view(writer, entry)
        async with _all_or_nothing(writer):
            snapshot_l1 = await _load(writer, offset, count, limits, entries)
            steps = Steps(progress, 2 * _covered(writer, snapshot_l1) + _covered(writer, disk.l1))
            freed = await _let_go_of_all(writer, snapshot_l1, entry.l1_table_offset, steps)
            former, place = disk.l1, disk.header.l1_table_offset
            l1 = await _own_active(writer, freed, steps)
            if l1 != former:
                freed.append((place, writer.clusters(len(former) * 8)))
                place = await _write_new(writer, packed(l1))
            left = tuple(other for other in entries if other != entry)
            fields, gone = await _write_entries(writer, entries, left)
            await _switch(writer, l1, freed + gone, l1_table_offset=place, **fields)
        await back.free_all(steps)
    steps.end()


@asynccontextmanager
async def _all_or_nothing(writer: ImageWriter) -> AsyncGenerator[None]:
    """Changes to counts that go to disk with one switch; a failure before that undoes them."""
    async with writer.back.condemning(), writer.back.all_at_once():
        try:
            yield
        except BaseException:
            if not writer.back.broken:
                # In memory nothing is left of it but what the disk says.
                await to_the_end(writer.look_around())
            raise


async def _switch(writer: ImageWriter, l1: Table, freed: Sequence[Freed], **fields: int) -> None:
    """Let the header lead to all that is new, and the disk map through this L1 table."""

    def change(header: Header) -> Header:
        return attrs.evolve(header, l1_size=len(l1), **fields)  # type: ignore[arg-type]

    await writer.back.switch_all(HeaderSwitch(change=change, l1=l1, freed=freed))


async def _write_entries(
    writer: ImageWriter, former: Sequence[SnapshotEntry], entries: Sequence[SnapshotEntry]
) -> tuple[dict[str, int], list[Freed]]:
    """Write a table of ``entries``: the header's fields for it, and what held the former ones.

    Raises:
        LimitExceededError: there are too many.
    """
    disk = writer.disk
    data = b"".join(entry.pack() for entry in entries)
    if len(data) > layout.SNAPSHOT_TABLE_BYTES_MAX or len(entries) > layout.SNAPSHOTS_MAX:
        raise LimitExceededError(
            f"'{disk.image.name()}' has {len(former)} snapshots, and there is no room for more; "
            "delete some first",
            limit="snapshots",
            value=len(entries),
            allowed=layout.SNAPSHOTS_MAX,
        )
    old_bytes = sum(len(entry.pack()) for entry in former)
    freed = [(disk.header.snapshots_offset, writer.clusters(old_bytes))] if former else []
    place = await _write_new(writer, data)
    return {"nb_snapshots": len(entries), "snapshots_offset": place}, freed


def _new_entry(writer: ImageWriter, others: Sequence[SnapshotEntry], name: bytes) -> SnapshotEntry:
    """The entry of a new snapshot; its ID is the next number, as QEMU's are."""
    disk = writer.disk
    numbers = [int(entry.id) for entry in others if entry.id.isdigit()]
    now = time.time_ns()
    return SnapshotEntry(
        l1_table_offset=disk.header.l1_table_offset,
        l1_size=len(disk.l1),
        id=str(max(numbers, default=0) + 1).encode(),
        name=name,
        date_sec=now // 10**9 & 0xFFFF_FFFF,
        date_nsec=now % 10**9,
        vm_clock_nsec=0,
        vm_state_size_short=0,
        # No instruction was executed: that is what qemu-img writes, too.
        extra=layout.SNAPSHOT_EXTRA.pack(0, disk.size(), 0),
    )


# -- tables


async def _find(
    writer: ImageWriter, wanted: str, limits: Limits
) -> tuple[Sequence[SnapshotEntry], SnapshotEntry]:
    """The entries of all snapshots, and that of the wanted one."""
    disk = writer.disk
    entries = await read_snapshots(disk.image, disk.header, limits)
    return entries, find_snapshot(entries, wanted, image=disk.image.name())


def _view(writer: ImageWriter, entry: SnapshotEntry) -> tuple[int, int, int]:
    """See ``snapshot_view``.

    Raises:
        CorruptImageError: the entry makes no sense; so far that is all that is wrong.
    """
    image = writer.disk.image
    return snapshot_view(entry, writer.disk.header, file_size=image.size(), image=image.name())


async def _load(
    writer: ImageWriter, offset: int, count: int, limits: Limits, entries: Sequence[SnapshotEntry]
) -> Table:
    """A snapshot's L1 table, when it is sure that all it leads to may be let go, or shared."""
    disk, allocator = writer.disk, writer.allocator
    async with writer.back.lock:
        # Counts of what others use too are changed before the tables that lead there are.
        await allocator.believe()
    l1 = await load_table(disk.image, offset, count, limits, what="the snapshot's L1 table")
    await _check_tables(writer, l1, entries)
    return l1


async def _check_tables(writer: ImageWriter, l1: Table, entries: Sequence[SnapshotEntry]) -> None:
    """Refuse a snapshot's L1 table that leads to what must not be freed with the snapshot."""
    disk, allocator = writer.disk, writer.allocator
    active = {word & layout.HOST_OFFSET for word in disk.l1}
    others = allocator.blocks() | {entry.l1_table_offset for entry in entries}
    for word in l1:
        offset = word & layout.HOST_OFFSET
        alone = offset in active and await allocator.refcount(offset) == 1
        if offset and (alone or offset in others):
            raise CorruptImageError(
                f"'{disk.image.name()}': the snapshot has an L2 table at {offset:#x}, where there "
                "is other metadata; check the image",
                offset=offset,
                field="L1 entry",
                value=word,
            )


def _covered(writer: ImageWriter, l1: Table) -> int:
    """The guest bytes that an L1 table has entries for."""
    return len(l1) << writer.disk.geometry.l1_shift


async def _tables(
    writer: ImageWriter, l1: Table, steps: Steps
) -> AsyncIterator[tuple[int, int, Table]]:
    """The L2 tables behind any L1 table, as they are on disk: L1 index, host offset, table.

    ``steps`` are the guest bytes that it covers.

    Raises:
        CorruptImageError: an L1 entry makes no sense.
    """
    disk = writer.disk
    foundation = {
        offset
        for region in disk.regions
        for offset in range(
            region.offset, region.offset + region.length, disk.geometry.cluster_size
        )
    }
    for number, word in enumerate(l1):
        if word:
            fault = disk.geometry.l1_fault(word, file_size=disk.image.size(), metadata=foundation)
            if fault is not None:
                raise CorruptImageError(
                    f"'{disk.image.name()}': the L1 entry {word:#x} of guest offset "
                    f"{number << disk.geometry.l1_shift:#x} {fault}; check the image",
                    field="L1 entry",
                    value=word,
                )
            offset = word & layout.HOST_OFFSET
            yield number, offset, await _read_table(writer, offset)
        steps.did(1 << disk.geometry.l1_shift)


async def _read_table(writer: ImageWriter, offset: int) -> Table:
    table = empty_table(writer.disk.geometry.cluster_size // 8)
    await writer.disk.image.readv((memoryview(table).cast("B"),), offset)
    swap(table)
    return table


async def _active_table(writer: ImageWriter, number: int) -> Table:
    """A copy of the L2 table behind an active L1 entry."""
    table = await writer.disk.l2_table(number)
    assert table is not None
    return table[:]


async def _write_new(writer: ImageWriter, data: bytes) -> int:
    """Write a table to where nothing leads yet: its host offset, 0 for an empty one."""
    if not data:
        return 0
    clusters = writer.clusters(len(data))
    async with writer.back.lock:
        offset = await writer.allocator.allocate_exactly(clusters)
        writer.claim_metadata(offset, clusters)
    await writer.disk.image.write(data, offset)
    return offset


# -- counts


async def _count(writer: ImageWriter, references: Sequence[Freed], delta: int) -> None:
    size = writer.disk.geometry.cluster_size
    for offset, clusters in references:
        for cluster in range(offset, offset + clusters * size, size):
            if await writer.allocator.change(cluster, delta) <= delta:
                raise CorruptImageError(
                    f"'{writer.disk.image.name()}': the cluster at {cluster:#x} is in use, and its "
                    "reference count says that it is free; repair the image",
                    offset=cluster,
                    field="refcount",
                    value=0,
                )


async def _share(writer: ImageWriter, table: Table, guest: int) -> None:
    """Count all that an active L2 table leads to once more, so that nobody owns it.

    Raises:
        CorruptImageError: an entry, of clusters from offset ``guest`` on, makes no sense.
    """
    disk = writer.disk
    words, size = disk.geometry.words, disk.geometry.cluster_size
    for index in range(disk.geometry.l2_entries):
        entry, _ = disk.entry(table, index, guest + index * size)
        if entry:
            await _count(writer, writer.clusters_of(entry), 1)
            if not entry & layout.COMPRESSED:
                table[index * words] = entry & ~layout.COPIED


async def _count_shared(writer: ImageWriter, offset: int, table: Table) -> None:
    """Count an L2 table of a snapshot once more, with all it leads to, which nobody owns then."""
    words = writer.disk.geometry.words
    async with writer.back.lock:
        await _count(writer, [(offset, 1)], 1)
        for word in table[::words]:
            await _count(writer, writer.clusters_of(word), 1)
    owned = [
        index
        for index in range(0, len(table), words)
        if table[index] & layout.COPIED and not table[index] & layout.COMPRESSED
    ]
    if owned:
        # In an inactive table the bit says nothing, so it may go in place, and early.
        for index in owned:
            table[index] &= ~layout.COPIED
        await writer.disk.image.write(packed(table), offset)


async def _let_go_of_all(
    writer: ImageWriter, l1: Table, l1_offset: int, steps: Steps
) -> list[Freed]:
    """Let go of an L1 table and of all it leads to; what is to be freed late."""
    freed: list[Freed] = []
    if l1:
        freed.append((l1_offset, writer.clusters(len(l1) * 8)))
    async for _, offset, table in _tables(writer, l1, steps):
        for word in table[:: writer.disk.geometry.words]:
            await _let_go(writer, writer.clusters_of(word), freed)
        await _let_go(writer, [(offset, 1)], freed)
    return freed


async def _let_go(writer: ImageWriter, references: Sequence[Freed], freed: list[Freed]) -> None:
    """Count down what others use too; the last reference goes late, and into ``freed``."""
    size = writer.disk.geometry.cluster_size
    for offset, clusters in references:
        for cluster in range(offset, offset + clusters * size, size):
            count = await writer.allocator.refcount(cluster)
            if count != 1:  # 0 makes no sense, as this says
                await writer.allocator.change(cluster, -1)
                continue
            start, length = freed[-1] if freed else (0, 0)
            if cluster == start + length * size:
                freed[-1] = start, length + 1
            else:
                freed.append((cluster, 1))


async def _own_active(writer: ImageWriter, freed: list[Freed], steps: Steps) -> Table:
    """The active L1 table with the bit COPIED wherever a count is one now.

    L2 tables that need it too are copied; the old ones go into ``freed``.
    """
    disk, allocator = writer.disk, writer.allocator
    words = disk.geometry.words
    l1 = array("Q", disk.l1)
    for number, word in enumerate(l1):
        steps.did(1 << disk.geometry.l1_shift)
        if not word:
            continue
        offset = word & layout.HOST_OFFSET
        if await allocator.refcount(offset) > 1:
            continue  # what a shared table leads to is shared
        table = await _active_table(writer, number)
        owned = False
        for index in range(0, len(table), words):
            entry = table[index]
            host = entry & layout.HOST_OFFSET
            if (
                host
                and not entry & (layout.COPIED | layout.COMPRESSED)
                and await allocator.refcount(host) == 1
            ):
                table[index] = entry | layout.COPIED
                owned = True
        if owned:
            freed.append((offset, 1))
            offset = await _write_new(writer, packed(table))
        l1[number] = offset | layout.COPIED
    return l1
