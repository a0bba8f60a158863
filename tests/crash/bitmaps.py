"""Dirty bitmaps: an image that has one, and what each must say after whatever a guest has done."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import attrs

__all__ = ["GRANULE", "Kept", "Seen", "changed_granules", "untrue", "with_bitmap"]

#: Bytes of one bit, of all bitmaps here.
GRANULE = 512
_EXTENSION = 0x23852875
_NAME = b"dirty"


@attrs.frozen
class Kept:
    """A bitmap as the guest's history has it: what is dirty, and since when writes are recorded."""

    #: Numbers of granules that are dirty whatever came since.
    dirty: frozenset[int] = frozenset()
    #: What the disk held when recording began; None where nothing is recorded.
    since: bytes | None = None

    def now(self, content: bytes) -> frozenset[int]:
        """What is dirty at least, when the disk holds this."""
        return self.dirty | changed_granules(self.since, content)


@attrs.frozen
class Seen:
    """A bitmap that an image says is up to date."""

    enabled: bool
    granularity: int
    bits: bytes

    def dirty(self, granule: int) -> bool:
        """Whether it calls a granule of the model's dirty."""
        bit = granule * GRANULE // self.granularity
        return bit // 8 < len(self.bits) and bool(self.bits[bit // 8] >> bit % 8 & 1)


def changed_granules(before: bytes | None, now: bytes) -> frozenset[int]:
    """What has changed; bytes that were not there before are zeroes to a backup too."""
    if before is None:
        return frozenset()
    before = before.ljust(len(now), b"\0")
    return frozenset(
        at // GRANULE
        for at in range(0, len(now), GRANULE)
        if before[at : at + GRANULE] != now[at : at + GRANULE]
    )


def untrue(
    seen: Mapping[str, Seen], names: set[str], kept: Mapping[str, Kept], content: bytes
) -> str | None:
    """What is wrong with what an image says of its bitmaps, at one moment of its history.

    ``names`` are all that it has, those that are in use included. More may be dirty than must be.
    """
    if names != set(kept):
        return f"it has the bitmaps {sorted(names)} and not {sorted(kept)}"
    for name, bitmap in seen.items():
        model = kept[name]
        if bitmap.enabled != (model.since is not None):
            return f"the bitmap {name} records guest writes: {bitmap.enabled}"
        last = -(-len(content) // GRANULE)
        missing = [n for n in model.now(content) if n < last and not bitmap.dirty(n)]
        if missing:
            return f"the bitmap {name} misses changes of granules {missing[:5]}"
    return None


def with_bitmap(image: bytes) -> bytes:
    """The image with an enabled bitmap whose first granule is dirty.

    It lies at the end: a directory, a table, and a cluster of bits. Refcounts have 16 bits.
    """
    (bits,) = struct.unpack_from(">I", image, 20)
    cluster = 1 << bits
    edited = bytearray(image.ljust(-(-len(image) // cluster) * cluster, b"\0"))
    first = len(edited) // cluster
    directory, table, data = (cluster * number for number in range(first, first + 3))
    granularity_bits = GRANULE.bit_length() - 1
    entry = struct.pack(">QIIBBHI", table, 1, 2, 1, granularity_bits, len(_NAME), 0) + _NAME
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
    return bytes(edited)
