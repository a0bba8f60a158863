"""Reference counts, as far as reading needs them: how much of the file is in use."""

from __future__ import annotations

import functools
import os
from array import array
from typing import TYPE_CHECKING

from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.tables import Table, empty_table, swap

if TYPE_CHECKING:
    from underlay.handle import StorageHandle

__all__ = ["looks_preallocated", "used_clusters", "used_in_block"]

#: Array type codes by the bytes of one reference count.
_TYPE_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


def used_in_block(block: bytes | bytearray | memoryview, refcount_bits: int, count: int) -> int:
    """How many of the first ``count`` reference counts of a block are not zero."""
    if refcount_bits >= 8:  # noqa: PLR2004 (bits in a byte)
        width = refcount_bits // 8
        # Zero looks the same in either byte order.
        counts = array(_TYPE_CODES[width], bytes(block[: count * width]))
        return count - counts.count(0)
    in_byte = 8 // refcount_bits
    whole = bytes(block[: count // in_byte])
    used = sum(whole.translate(_nonzero_fields(refcount_bits)))
    rest = count % in_byte
    if rest:
        # Bit 0 is the first field: the fields in question are the low ones.
        last = block[count // in_byte] & (1 << rest * refcount_bits) - 1
        used += _nonzero_fields(refcount_bits)[last]
    return used


@functools.cache
def _nonzero_fields(bits: int) -> bytes:
    """For each value of a byte, how many of its fields of ``bits`` bits are not zero."""
    mask = (1 << bits) - 1
    return bytes(
        sum(1 for shift in range(0, 8, bits) if value >> shift & mask) for value in range(256)
    )


async def used_clusters(image: StorageHandle, header: Header, *, enough: int) -> int | None:
    """How many clusters of the file are referenced, counted until there are ``enough``.

    None if the tables are damaged: whoever asks only wants an estimate.
    """
    file_size = image.size()
    cluster = header.cluster_size
    in_block = cluster * 8 // header.refcount_bits
    left = -(-file_size // cluster)
    entries = min(-(-left // in_block), header.refcount_table_clusters * cluster // 8)
    start = header.refcount_table_offset
    if not start or start + entries * 8 > file_size:
        return None
    table: Table = empty_table(entries)
    await image.readv((memoryview(table).cast("B"),), start)
    swap(table)
    used = 0
    block = bytearray(cluster)
    for entry in table:
        if used >= enough:
            break
        count = min(left, in_block)
        left -= count
        offset = entry & layout.REFCOUNT_BLOCK_OFFSET
        if offset:
            if offset % cluster or offset >= file_size:
                return None
            await image.readv((block,), offset)
            used += used_in_block(block, header.refcount_bits, count)
    return used


async def looks_preallocated(image: StorageHandle, header: Header) -> bool:
    """Whether much more of the image is referenced than stored: it was laid out beforehand.

    QEMU's rule: a tenth more than what is stored, and at least two clusters.
    """
    stored = _stored_bytes(image)
    if stored is None:
        return False
    clusters = stored // header.cluster_size
    enough = max(clusters * 10 // 9, clusters + 2)
    used = await used_clusters(image, header, enough=enough)
    return used is not None and used >= enough


def _stored_bytes(image: StorageHandle) -> int | None:
    descriptor = image.descriptor()
    if descriptor is not None:
        return os.fstat(descriptor).st_blocks * 512
    told = image.describe().get("actual-size")
    return told if isinstance(told, int) else None
