"""Storing clusters that were encoded: one after the other, several in a cluster of the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
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
    from underlay_drivers.qcow2.dependencies import Dependencies
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["check_possible", "write_encoded"]


def check_possible(disk: Dependencies) -> None:
    """Refuse an image that can hold nothing compressed.

    Raises:
        UnsupportedOperationError: it has an external data file.
    """
    if disk.geometry.external:
        raise UnsupportedOperationError(
            f"'{disk.image.name()}' has an external data file, which holds nothing compressed"
        )


async def write_encoded(writer: ImageWriter, units: Sequence[tuple[int, bytes]]) -> None:
    """Store encoded clusters, each as the guest bytes at its offset, whatever was there before.

    Raises:
        OutOfRangeError: an offset starts no cluster of the disk, or they do not rise.
        UnsupportedOperationError: an external data file holds nothing compressed.
        LimitExceededError: the image file has become so large that entries cannot say where.
    """
    if not units:
        return
    disk, back = writer.disk, writer.back
    check_possible(disk)
    _check_units(disk, units)
    await writer.prepare()
    await back.relieve()
    bits = disk.geometry.cluster_bits
    async with writer.tickets.hold(units[0][0] >> bits, (units[-1][0] >> bits) + 1, exclusive=True):
        await writer.make_ready()
        if writer.tracking is not None:
            for offset, _ in units:
                writer.tracking.mark(offset, offset + disk.geometry.cluster_size)
        try:
            async with back.lock:
                back.check()
                await _look_over(writer, units)
                hosts = await writer.allocator.pack_all([len(encoded) for _, encoded in units])
        except CorruptImageError as error:
            await back.condemn(error)
            raise
        try:
            _check_end(writer, max(hosts) + len(units[hosts.index(max(hosts))][1]))
            for host, pieces in _in_a_row(hosts, units):
                await disk.image.writev(pieces, host)
        except BaseException:
            await to_the_end(_give_back(writer, hosts, units))
            raise
        await to_the_end(_show(writer, hosts, units))


def _check_units(disk: Dependencies, units: Sequence[tuple[int, bytes]]) -> None:
    size = disk.geometry.cluster_size
    previous = -1
    for offset, encoded in units:
        if offset % size or not previous < offset < disk.size() or not 0 < len(encoded) < size:
            raise OutOfRangeError(
                f"{len(encoded)} encoded bytes at {offset} are no cluster of this disk; nothing "
                "was written"
            )
        previous = offset


async def _look_over(writer: ImageWriter, units: Sequence[tuple[int, bytes]]) -> None:
    """See to it that there are tables, and that nothing is wrong with what is to be let go."""
    disk = writer.disk
    for number, group in _by_table(writer, range(len(units)), units):
        table = await writer.table(number)
        for at in group:
            word = _word(writer, units[at][0])
            entry, _ = disk.entry(table, word // disk.geometry.words, units[at][0])
            if entry:
                writer.clusters_of(entry)
                await writer.allocator.believe()


def _by_table(
    writer: ImageWriter, which: Sequence[int], units: Sequence[tuple[int, bytes]]
) -> Iterator[tuple[int, list[int]]]:
    """Indexes of units, by the L1 entry behind which they are."""
    shift = writer.disk.geometry.l1_shift
    for number, group in groupby(which, key=lambda at: units[at][0] >> shift):
        yield number, list(group)


def _word(writer: ImageWriter, offset: int) -> int:
    """Where in its table the entry of guest ``offset`` is."""
    geometry = writer.disk.geometry
    return (offset >> geometry.cluster_bits) % geometry.l2_entries * geometry.words


def _in_a_row(
    hosts: Sequence[int], units: Sequence[tuple[int, bytes]]
) -> Iterator[tuple[int, list[bytes]]]:
    """What is written at once: host offset and bytes of all that follows there."""
    start = end = 0
    pieces: list[bytes] = []
    for host, (_, encoded) in zip(hosts, units, strict=True):
        if pieces and host != end:
            yield start, pieces
            pieces = []
        if not pieces:
            start = host
        pieces.append(encoded)
        end = host + len(encoded)
    yield start, pieces


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


async def _show(
    writer: ImageWriter, hosts: Sequence[int], units: Sequence[tuple[int, bytes]]
) -> None:
    disk, back = writer.disk, writer.back
    words, shift = disk.geometry.words, disk.geometry.compressed_shift
    done = 0
    async with back.lock:
        try:
            for number, group in _by_table(writer, range(len(units)), units):
                table = await writer.table(number)
                first, last = _word(writer, units[group[0]][0]), _word(writer, units[group[-1]][0])
                count = (last - first) // words + 1
                back.touch_l2(number, table, first // words, count, shows=True)
                for at in group:
                    offset, encoded = units[at]
                    host, end = hosts[at], hosts[at] + len(encoded)
                    sectors = (end - 1) // layout.SECTOR - host // layout.SECTOR
                    word = _word(writer, offset)
                    if table[word]:
                        writer.let_go(table[word])
                    table[word] = layout.COMPRESSED | sectors << shift | host
                    if words > 1:
                        table[word + 1] = 0
                    disk.reach(end)
                    done = at + 1
        except BaseException:
            # What was shown stays: it is whole.
            for host, (_, encoded) in zip(hosts[done:], units[done:], strict=True):
                await _free(writer, host, len(encoded))
            raise


async def _give_back(
    writer: ImageWriter, hosts: Sequence[int], units: Sequence[tuple[int, bytes]]
) -> None:
    async with writer.back.lock:
        for host, (_, encoded) in zip(hosts, units, strict=True):
            await _free(writer, host, len(encoded))


async def _free(writer: ImageWriter, host: int, length: int) -> None:
    """Free at once what was never shown; under the lock."""
    size = writer.disk.geometry.cluster_size
    first = host - host % size
    writer.allocator.stop_packing((first, first + size))
    await writer.allocator.lower(first, writer.clusters(host + length - first))
