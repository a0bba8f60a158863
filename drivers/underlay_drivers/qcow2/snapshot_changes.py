"""Taking, applying and deleting internal snapshots.

A snapshot is a copy of the L1 table; what it leads to is counted once more. The bit COPIED says in
the active tables that a count is one, so bits and counts change together, which no single write can
do: meanwhile the image is marked as dirty (version 3), and opening it after a crash mends them. The
switch itself is one write of the header's first sector.
"""

from __future__ import annotations

import struct
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from underlay.errors import LimitExceededError, OptionError, UnsupportedOperationError
from underlay.face import to_the_end
from underlay.limits import Limits
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.loading import load_l1
from underlay_drivers.qcow2.snapshots import (
    SnapshotEntry,
    find_snapshot,
    read_snapshots,
    snapshot_view,
)
from underlay_drivers.qcow2.tables import Table, empty_table, packed, swap

if TYPE_CHECKING:
    from underlay_drivers.qcow2.writeback import Freed
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["apply_snapshot", "create_snapshot", "delete_snapshot"]

#: References that are given back at a time.
_BATCH = 65536


async def create_snapshot(writer: ImageWriter, name: str, limits: Limits) -> SnapshotEntry:
    """Take a snapshot of the disk as it is now.

    Raises:
        OptionError: the name is empty or too long.
        LimitExceededError: there are too many, or a cluster cannot be counted once more.
        ConflictError: somebody holds a lease, and may write through a mapping, for too long.
    """
    stored = name.encode("utf-8", "surrogateescape")
    if not 0 < len(stored) < 1 << 16:
        raise OptionError("A snapshot's name has 1 to 65535 bytes", option="name")
    _need_internal_data(writer)
    await writer.prepare()
    async with writer.at_rest():
        disk, back = writer.disk, writer.back
        old = await read_snapshots(disk.image, disk.header, limits)
        if len(old) >= layout.SNAPSHOTS_MAX:
            raise LimitExceededError(
                f"'{disk.image.name()}' has {len(old)} snapshots; delete some first",
                limit="snapshots",
                value=len(old) + 1,
                allowed=layout.SNAPSHOTS_MAX,
            )
        await back.flush()
        await _set_dirty(writer, dirty=True)
        try:
            await _share_active(writer)
        except BaseException:
            await to_the_end(_set_dirty(writer, dirty=False))
            raise
        offset = await _new_table(writer, packed(disk.l1)) if disk.l1 else 0
        entry = _entry(old, stored, writer, offset)
        await _switch(writer, (*old, entry), dirty=False)
        return entry


async def apply_snapshot(writer: ImageWriter, wanted: str, limits: Limits) -> None:
    """Make the disk what it was at a snapshot; what it is now is gone.

    Raises:
        OptionError: there is no such snapshot.
    """
    _need_internal_data(writer)
    await writer.prepare()
    async with writer.alone():
        disk, back = writer.disk, writer.back
        header = disk.header
        name = disk.image.name()
        entries = await read_snapshots(disk.image, header, limits)
        entry = find_snapshot(entries, wanted, image=name)
        await back.flush()
        offset, count, size = snapshot_view(entry, header, file_size=disk.image.size(), image=name)
        limits.check("metadata", count * 8, what=f"'{name}': the size of the L1 table")
        l1 = await load_l1(disk.image, offset, count)
        l1.extend([0] * (-(-size >> disk.geometry.l1_shift) - count))
        for number, word in enumerate(l1):
            l1[number] = word & ~layout.COPIED
        await _count_tree(writer, l1)
        place = await _new_table(writer, packed(l1)) if l1 else 0
        former, former_offset = disk.l1, header.l1_table_offset
        await back.flush()
        await back.update_header(l1_table_offset=place, l1_size=len(l1), size=size)
        disk.show_again(disk.header, l1, size=size)
        # What was active until now goes, when nobody reads it any more.
        async for _, table_offset, table in _tables(writer, former):
            async with back.lock:
                for entry_word in table[:: disk.geometry.words]:
                    writer.let_go(entry_word)
                back.release(table_offset)
            if back.too_dirty:
                await back.flush()
                await back.sync()
        if former:
            back.release(former_offset, writer.clusters(len(former) * 8))
        await back.flush()
        await back.sync()


async def delete_snapshot(writer: ImageWriter, wanted: str, limits: Limits) -> None:
    """Remove a snapshot, and free what only it held.

    Raises:
        OptionError: there is no such snapshot.
    """
    await writer.prepare()
    async with writer.alone():
        disk, back = writer.disk, writer.back
        name = disk.image.name()
        entries = await read_snapshots(disk.image, disk.header, limits)
        entry = find_snapshot(entries, wanted, image=name)
        offset, count, _ = snapshot_view(
            entry, disk.header, file_size=disk.image.size(), image=name
        )
        limits.check("metadata", count * 8, what=f"'{name}': the size of the L1 table")
        l1 = await load_l1(disk.image, offset, count)
        await back.flush()
        await _switch(writer, tuple(e for e in entries if e is not entry), dirty=True)
        # Nothing leads there any more, durably, and no mapping of this disk ever went this way.
        freed: list[Freed] = [(offset, writer.clusters(count * 8))] if count else []
        async for _, table_offset, table in _tables(writer, l1):
            freed.append((table_offset, 1))
            for entry_word in table[:: disk.geometry.words]:
                freed += writer.clusters_of(entry_word)
            if len(freed) > _BATCH:
                await back.free(freed)
                freed = []
                await back.relieve()
        await back.free(freed)
        await _own_active(writer)
        await back.flush()
        await _set_dirty(writer, dirty=False)


def _need_internal_data(writer: ImageWriter) -> None:
    if writer.disk.geometry.external:
        raise UnsupportedOperationError(
            f"'{writer.disk.image.name()}' has an external data file, which cannot keep old data"
        )


async def _set_dirty(writer: ImageWriter, *, dirty: bool) -> None:
    """Say that counts and bits may disagree, or that they agree again; version 2 cannot."""
    header = writer.disk.header
    if header.version > 2:  # noqa: PLR2004 (a version is its own best name)
        bits = header.incompatible_features & ~layout.DIRTY
        await writer.back.update_header(incompatible_features=bits | (layout.DIRTY if dirty else 0))


# -- walking


async def _tables(writer: ImageWriter, l1: Table) -> AsyncIterator[tuple[int, int, Table]]:
    """The L2 tables of any L1 table, as they are on disk: L1 index, host offset, content."""
    image = writer.disk.image
    for number, word in enumerate(l1):
        offset = word & layout.HOST_OFFSET
        if offset:
            table = empty_table(writer.disk.geometry.cluster_size // 8)
            await image.readv((memoryview(table).cast("B"),), offset)
            swap(table)
            yield number, offset, table


async def _share_active(writer: ImageWriter) -> None:
    """Count everything that is active once more, and take the bit COPIED from it."""
    disk, back = writer.disk, writer.back
    words = disk.geometry.words
    done: list[int] = []
    try:
        for number, word in enumerate(disk.l1):
            if not word:
                continue
            table = await disk.l2_table(number)
            assert table is not None
            async with back.lock:
                await _count(writer, table, word & layout.HOST_OFFSET, 1)
                done.append(number)
                for index in range(0, len(table), words):
                    if not table[index] & layout.COMPRESSED:
                        table[index] &= ~layout.COPIED
                disk.l1[number] = word & ~layout.COPIED
                back.touch_l2(number, table, 0, disk.geometry.l2_entries, shows=True)
                back.touch_l1(number)
            await back.relieve()
    except BaseException:
        await to_the_end(_unshare(writer, done))
        raise
    await back.flush()


async def _unshare(writer: ImageWriter, numbers: Sequence[int]) -> None:
    """Undo ``_share_active`` for these L1 entries."""
    disk, back = writer.disk, writer.back
    for number in numbers:
        table = await disk.l2_table(number)
        assert table is not None
        async with back.lock:
            await _count(writer, table, disk.l1[number] & layout.HOST_OFFSET, -1)
    await _own_active(writer)
    await back.flush()


async def _count(writer: ImageWriter, table: Table, offset: int, delta: int) -> None:
    """Count an L2 table and all that it leads to up or down; all of it or nothing."""
    references = [(offset, 1)]
    for word in table[:: writer.disk.geometry.words]:
        references += writer.clusters_of(word)
    size = writer.disk.geometry.cluster_size
    done: list[int] = []
    try:
        for first, clusters in references:
            for cluster in range(first, first + clusters * size, size):
                await writer.allocator.change(cluster, delta)
                done.append(cluster)
    except BaseException:
        for cluster in done:
            await writer.allocator.change(cluster, -delta)
        raise


async def _count_tree(writer: ImageWriter, l1: Table) -> None:
    """Count all that a snapshot's L1 table leads to once more, for the disk that is to share it."""
    disk, back = writer.disk, writer.back
    words = disk.geometry.words
    done: list[tuple[int, Table]] = []
    try:
        async for _, offset, table in _tables(writer, l1):
            async with back.lock:
                await _count(writer, table, offset, 1)
            done.append((offset, table))
            owned = [
                index
                for index in range(0, len(table), words)
                if table[index] & layout.COPIED and not table[index] & layout.COMPRESSED
            ]
            if owned:
                for index in owned:
                    table[index] &= ~layout.COPIED
                await disk.image.write(packed(table), offset)
            await back.relieve()
    except BaseException:
        async with back.lock:
            for offset, table in done:
                await _count(writer, table, offset, -1)
        raise


async def _own_active(writer: ImageWriter) -> None:
    """Give the bit COPIED to whatever is active and counted once."""
    disk, back = writer.disk, writer.back
    words = disk.geometry.words
    for number, word in enumerate(disk.l1):
        if not word:
            continue
        table = await disk.l2_table(number)
        assert table is not None
        async with back.lock:
            for index in range(0, len(table), words):
                entry = table[index]
                host = entry & layout.HOST_OFFSET
                if entry & (layout.COPIED | layout.COMPRESSED) or not host:
                    continue
                if await writer.allocator.refcount(host) == 1:
                    table[index] = entry | layout.COPIED
                    back.touch_l2(number, table, index // words, 1, shows=True)
            if not word & layout.COPIED and (
                await writer.allocator.refcount(word & layout.HOST_OFFSET) == 1
            ):
                disk.l1[number] = word | layout.COPIED
                back.touch_l1(number)
        await back.relieve()


# -- the snapshot table


async def _new_table(writer: ImageWriter, data: bytes) -> int:
    """Write a table to where nothing leads yet, and return its host offset."""
    clusters = writer.clusters(len(data))
    async with writer.back.lock:
        offset = await writer.allocator.allocate_exactly(clusters)
        writer.claim_metadata(offset, clusters)
    try:
        await writer.disk.image.write(data, offset)
    except BaseException:
        await to_the_end(writer.give_back_metadata(offset, clusters))
        raise
    return offset


async def _switch(writer: ImageWriter, entries: Sequence[SnapshotEntry], *, dirty: bool) -> None:
    """Let the header lead to a new snapshot table, once that is durable; free the old one late."""
    disk, back = writer.disk, writer.back
    data = b"".join(entry.pack() for entry in entries)
    if len(data) > layout.SNAPSHOT_TABLE_BYTES_MAX:
        raise LimitExceededError(
            f"'{disk.image.name()}': the snapshot table would become larger than 64 MiB; delete "
            "some snapshots first",
            limit="snapshot table",
            value=len(data),
            allowed=layout.SNAPSHOT_TABLE_BYTES_MAX,
        )
    former = disk.header
    former_bytes = await writer.snapshot_table_bytes()
    offset = await _new_table(writer, data) if data else 0
    bits = former.incompatible_features & ~layout.DIRTY
    await back.flush()
    await back.update_header(
        nb_snapshots=len(entries),
        snapshots_offset=offset,
        incompatible_features=bits | (layout.DIRTY if dirty and former.version > 2 else 0),  # noqa: PLR2004
    )
    disk.replace_l1(disk.header, disk.l1)  # the regions that the header names have changed
    if former.nb_snapshots:
        back.release(former.snapshots_offset, writer.clusters(former_bytes))


def _entry(
    old: Sequence[SnapshotEntry], name: bytes, writer: ImageWriter, offset: int
) -> SnapshotEntry:
    """The entry of a new snapshot; its ID is the next number, as QEMU's are."""
    disk = writer.disk
    numbers = [int(entry.id) for entry in old if entry.id.isdigit()]
    now = time.time_ns()
    return SnapshotEntry(
        l1_table_offset=offset,
        l1_size=len(disk.l1),
        id=str(max(numbers, default=0) + 1).encode(),
        name=name,
        date_sec=now // 10**9 & 0xFFFF_FFFF,
        date_nsec=now % 10**9,
        vm_clock_nsec=0,
        vm_state_size_short=0,
        extra=struct.pack(">QQQ", 0, disk.size(), layout.NO_ICOUNT),
    )
