"""Gives an image a dirty bitmap, as the specification has it: we read bitmaps, and write none."""

from __future__ import annotations

import struct

__all__ = ["with_bitmap"]

_EXTENSION = 0x23852875
_NAME = b"dirty"


def with_bitmap(image: bytes) -> tuple[bytes, range]:
    """The image with a bitmap that is up to date; and the numbers of the clusters it takes.

    They lie at the end: a directory, a table, and a cluster of bits. Refcounts have 16 bits.
    """
    (bits,) = struct.unpack_from(">I", image, 20)
    cluster = 1 << bits
    edited = bytearray(image.ljust(-(-len(image) // cluster) * cluster, b"\0"))
    first = len(edited) // cluster
    directory, table, data = (cluster * number for number in range(first, first + 3))
    entry = struct.pack(">QIIBBHI", table, 1, 0, 1, 16, len(_NAME), 0) + _NAME
    entry += bytes(-len(entry) % 8)
    edited += entry.ljust(cluster, b"\0")
    edited += struct.pack(">Q", data).ljust(cluster, b"\0")
    edited += b"\1".ljust(cluster, b"\0")

    (length,) = struct.unpack_from(">I", edited, 100)
    at = length
    while struct.unpack_from(">I", edited, at)[0]:
        (size,) = struct.unpack_from(">I", edited, at + 4)
        at += 8 + size + -size % 8
    struct.pack_into(">IIIIQQII", edited, at, _EXTENSION, 24, 1, 0, len(entry), directory, 0, 0)
    assert at + 40 <= cluster
    struct.pack_into(">Q", edited, 88, 1)

    (counts,) = struct.unpack_from(">Q", edited, 48)
    (block,) = struct.unpack_from(">Q", edited, counts)
    assert first + 3 <= cluster // 2, "the first refcount block counts all of them"
    for number in range(first, first + 3):
        assert struct.unpack_from(">H", edited, block + 2 * number) == (0,)
        struct.pack_into(">H", edited, block + 2 * number, 1)
    return bytes(edited), range(first, first + 3)
