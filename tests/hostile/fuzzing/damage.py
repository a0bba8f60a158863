"""Damages an image as dice say: the same dice, the same damage.

Structure-aware: most damage puts a value from the borders of what a field can hold, or one that
would mean something elsewhere, into a field. The rest is what a bad medium does: bits that flip,
clusters that swap, ends that are missing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence

import attrs

from .fields import Field, Group, fields

__all__ = ["Damage", "border_value", "damage", "damaged", "plan"]

_SECTOR = 512


@attrs.frozen
class Damage:
    """One thing that is done to an image."""

    what: str
    offset: int
    #: What stands there afterwards. Where ``cut`` is set, the file ends there.
    content: bytes = b""
    cut: bool = False

    def apply(self, data: bytearray) -> None:
        """Do it."""
        if self.cut:
            del data[self.offset :]
            return
        there = data[self.offset : self.offset + len(self.content)]
        data[self.offset : self.offset + len(there)] = self.content[: len(there)]

    def __str__(self) -> str:
        if self.cut:
            return f"the file ends at {self.offset:#x}"
        shown = self.content[:16].hex(" ") + (" …" if len(self.content) > 16 else "")
        return f"{self.what} at {self.offset:#x}: {shown}"


def damage(
    data: bytes, chance: random.Random, groups: Collection[Group] = tuple(Group)
) -> tuple[bytearray, list[Damage]]:
    """The image with some damage to these groups of its fields, and what it is."""
    done = plan(data, chance, [field for field in fields(data) if field.group in groups])
    return damaged(data, done), done


def damaged(data: bytes, done: Sequence[Damage]) -> bytearray:
    """The image with this damage."""
    image = bytearray(data)
    for one in done:
        one.apply(image)
    return image


def plan(data: bytes, chance: random.Random, places: Sequence[Field]) -> list[Damage]:
    """Choose what to do: mostly one thing, sometimes many."""
    count = chance.choices((1, 2, 3, 5, 16, 64), (50, 20, 12, 10, 6, 2))[0]
    return [_one(data, chance, places) for _ in range(count)]


def _one(data: bytes, chance: random.Random, places: Sequence[Field]) -> Damage:
    if places and chance.random() < 0.8:
        # By group first, lest the many refcounts drown the header.
        group = chance.choice(sorted({field.group for field in places}, key=lambda one: one.value))
        field = chance.choice([one for one in places if one.group is group])
        return _to_field(data, chance, field, places)
    return chance.choice(_ROUGH)(data, chance)


def _to_field(data: bytes, chance: random.Random, field: Field, places: Sequence[Field]) -> Damage:
    there = data[field.offset : field.offset + field.width]
    if field.width not in {1, 2, 4, 8}:
        return Damage(field.name, field.offset, _text(there, chance))
    if chance.random() < 0.15:
        # What stands in another field of this kind: two entries that share a cluster.
        other = chance.choice([one for one in places if one.name == field.name])
        return Damage(field.name, field.offset, data[other.offset : other.offset + other.width])
    old = int.from_bytes(there, "big")
    if field.width == 8 and chance.random() < 0.35:
        value = _pointer(data, old, chance)
    else:
        value = border_value(old, field.width, chance)
    return Damage(field.name, field.offset, value.to_bytes(field.width, "big"))


def border_value(old: int, width: int, chance: random.Random) -> int:
    """A number of ``width`` bytes from where mistakes are made."""
    top = (1 << 8 * width) - 1
    power = 1 << chance.randrange(8 * width)
    borders = (0, 1, power, power - 1, top // 4, top // 2 - 1, top // 2, top // 2 + 1, top - 1, top)
    near = (old + 1, old - 1, old ^ power, old * 2, old // 2, top - old)
    masks = (chance.getrandbits(8 * width), old ^ chance.getrandbits(8 * width))
    return chance.choice((*borders, *near, *masks)) & top


def _pointer(data: bytes, old: int, chance: random.Random) -> int:
    """An offset that leads somewhere, with or without the flags that were there."""
    cluster = 1 << min(max(int.from_bytes(data[20:24], "big"), 9), 21)
    end = -(-len(data) // cluster)
    target = chance.choice((0, 1, end - 1, end, end + 1, chance.randrange(end + 1))) * cluster
    target += chance.choice((0, 0, 0, 0, _SECTOR, 1, cluster // 2))
    flags = old & ~0x00FF_FFFF_FFFF_FE00
    kept = chance.choice((0, flags, flags, 1 << 63, 1 << 62, 1))
    return (target | kept) & (2**64 - 1)


def _text(there: bytes, chance: random.Random) -> bytes:
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: chance.randbytes(len(there)),
        lambda: bytes(len(there)),
        lambda: b"\xff" * len(there),
        lambda: (b"%s%n../\n\x1b[2J\xff\xfe" * (len(there) // 16 + 1))[: len(there)],
        lambda: there[::-1],
    )
    cut = chance.randrange(len(there) + 1) if there else 0
    if chance.random() < 0.5:
        return chance.choice(kinds)()
    # The beginning is as it was.
    return there[:cut] + chance.choice(kinds)()[cut:]


# -- what knows nothing of fields


def _flip(data: bytes, chance: random.Random) -> Damage:
    at = chance.randrange(len(data))
    return Damage("a bit flips", at, bytes([data[at] ^ 1 << chance.randrange(8)]))


def _noise(data: bytes, chance: random.Random) -> Damage:
    # Headers and tables are where a file begins.
    at = chance.choice((chance.randrange(min(len(data), 4096)), chance.randrange(len(data))))
    length = min(chance.randrange(1, 65), len(data) - at)
    return Damage("noise", at, chance.randbytes(length))


def _block(data: bytes, chance: random.Random) -> tuple[int, int]:
    """Where a block is, and its length: a sector, or a cluster."""
    bits = min(max(int.from_bytes(data[20:24], "big"), 9), 21)
    size = min(chance.choice((_SECTOR, 1 << bits, 1 << bits)), len(data))
    return chance.randrange(max(len(data) // size, 1)) * size, size


def _copy(data: bytes, chance: random.Random) -> Damage:
    at, size = _block(data, chance)
    start = chance.randrange(len(data) // size) * size
    return Damage("a block from elsewhere", at, data[start : start + size][: len(data) - at])


def _fill(data: bytes, chance: random.Random) -> Damage:
    at, size = _block(data, chance)
    content = chance.choice((b"\0", b"\0", b"\xff", chance.randbytes(1))) * size
    return Damage("a block of one byte", at, content[: len(data) - at])


def _cut(data: bytes, chance: random.Random) -> Damage:
    return Damage("cut", chance.randrange(-(-len(data) // _SECTOR)) * _SECTOR, cut=True)


_ROUGH: tuple[Callable[[bytes, random.Random], Damage], ...] = (
    _flip,
    _flip,
    _noise,
    _noise,
    _copy,
    _fill,
    _cut,
)
