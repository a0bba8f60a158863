"""Storing clusters that were encoded: one after the other, several in a cluster of the host."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from underlay.errors import (
    CorruptImageError,
    LimitExceededError,
    OutOfRangeError,
    UnsupportedOperationError,
)
from underlay.face import to_the_end
from underlay_drivers.qcow2 import layout

if TYPE_CHECKING:
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["write_encoded"]


async def write_encoded(writer: ImageWriter, offset: int, encoded: bytes) -> None:
    """Store one encoded cluster as the guest bytes at ``offset``, whatever was there before.

    Raises:
        OutOfRangeError: ``offset`` starts no cluster of the disk.
        UnsupportedOperationError: an external data file holds nothing compressed.
        LimitExceededError: the image file has become so large that entries cannot say where.
    """
    disk, back = writer.disk, writer.back
    geometry = disk.geometry
    size = geometry.cluster_size
    if geometry.external:
        raise UnsupportedOperationError(
            f"'{disk.image.name()}' has an external data file, which holds nothing compressed"
        )
    if offset % size or not 0 <= offset < disk.size() or not 0 < len(encoded) < size:
        raise OutOfRangeError(
            f"{len(encoded)} encoded bytes at {offset} are no cluster of this disk; nothing was "
            "written"
        )
    await writer.prepare()
    await back.relieve()
    number = offset >> geometry.cluster_bits
    async with writer.tickets.hold(number, number + 1, exclusive=True):
        try:
            async with back.lock:
                back.check()
                table = await writer.table(offset >> geometry.l1_shift)
                writer.clusters_of(table[number % geometry.l2_entries * geometry.words])
                host = await writer.allocator.pack(len(encoded))
        except CorruptImageError as error:
            await back.condemn(error)
            raise
        try:
            _check_end(writer, host + len(encoded))
            await disk.image.write(encoded, host)
        except BaseException:
            await to_the_end(_give_back(writer, host, len(encoded)))
            raise
        await to_the_end(_show(writer, offset, host, len(encoded)))


def _check_end(writer: ImageWriter, end: int) -> None:
    """Refuse a host offset for which a compressed cluster's descriptor has no bits."""
    allowed = 1 << writer.disk.geometry.compressed_shift
    if end > allowed:
        raise LimitExceededError(
            f"'{writer.disk.image.name()}' is too large for compressed clusters; write plain ones",
            limit="host offset",
            value=end,
            allowed=allowed,
        )


async def _show(writer: ImageWriter, offset: int, host: int, length: int) -> None:
    disk, back = writer.disk, writer.back
    geometry = disk.geometry
    sectors = (host + length - 1) // layout.SECTOR - host // layout.SECTOR
    entry = layout.COMPRESSED | sectors << geometry.compressed_shift | host
    number = offset >> geometry.l1_shift
    index = (offset >> geometry.cluster_bits) % geometry.l2_entries
    async with back.lock:
        try:
            table = await writer.table(number)
            old = table[index * geometry.words]
            writer.let_go(old)
        except BaseException:
            await _free(writer, host, length)
            raise
        if geometry.words == 1:
            table[index] = entry
        else:
            table[index * 2 : index * 2 + 2] = array("Q", (entry, 0))
        disk.reach(host + length)
        back.touch_l2(number, table, index, 1, shows=True)


async def _give_back(writer: ImageWriter, host: int, length: int) -> None:
    async with writer.back.lock:
        await _free(writer, host, length)


async def _free(writer: ImageWriter, host: int, length: int) -> None:
    """Free at once what was never shown; under the lock."""
    size = writer.disk.geometry.cluster_size
    first = host - host % size
    writer.allocator.stop_packing((first, first + size))
    await writer.allocator.lower(first, writer.clusters(host + length - first))
