"""Lies in the bitmaps: classes 70 to 81.

None of them harms the disk itself. A writer that cannot keep the bitmaps right clears the bit that
says that they are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from underlay_drivers.qcow2 import layout

from .editing import Image
from .recipe import HARMLESS, Recipe, Rule, Writing

__all__ = ["RECIPES"]

Damage = Callable[[Image], object]

#: What cannot be known to be only the bitmaps' own is not written over.
_UNWRITABLE = Rule(writing=Writing.REFUSED)
#: Where the fields of a directory entry are.
_TABLE_SIZE, _FLAGS, _TYPE, _GRANULARITY, _NAME_SIZE = 8, 12, 16, 17, 18


def _extension(image: Image) -> int:
    """Where the content of the bitmaps extension is: count, reserved, size, offset."""
    at = image.header.header_length
    while True:
        kind, length = struct.unpack_from(">II", image.data, at)
        if kind == layout.EXTENSION_BITMAPS:
            return int(at + 8)
        assert kind != layout.EXTENSION_END, "no bitmaps"
        at += 8 + length + -length % 8


def _declared(offset: int, form: str, value: int) -> Damage:
    """Change a field of the extension."""
    return lambda image: image.put(_extension(image) + offset, form, value)


def _directory(image: Image) -> int:
    """Where the bitmap directory lies."""
    return image.word(_extension(image) + 16)


def _entry(offset: int, form: str, value: int) -> Damage:
    """Change a field of the first bitmap's entry."""
    return lambda image: image.put(_directory(image) + offset, form, value)


def _recipe(number: int, name: str, lie: str, damage: Damage, *, rule: Rule = HARMLESS) -> Recipe:
    return Recipe(number=number, name=name, lie=lie, base="bitmaps", damage=damage, rule=rule)


RECIPES: list[Recipe] = [
    _recipe(
        70,
        "bitmaps-23-bytes",
        "the bitmaps extension has 23 bytes",
        lambda image: image.put(_extension(image) - 4, "I", 23),
    ),
    _recipe(71, "bitmaps-none", "the bitmaps extension tells of no bitmap", _declared(0, "I", 0)),
    _recipe(
        72,
        "bitmaps-65536",
        "the bitmaps extension tells of 65,536 bitmaps",
        _declared(0, "I", 65_536),
    ),
    _recipe(
        73,
        "bitmaps-reserved",
        "a reserved field of the bitmaps extension is set",
        _declared(4, "I", 1),
    ),
    _recipe(
        74,
        "bitmaps-unaligned",
        "the bitmap directory starts inside a cluster",
        lambda image: image.put(_extension(image) + 16, "Q", _directory(image) + 512),
    ),
    _recipe(
        75,
        "bitmaps-2-40",
        "the bitmap directory has 2^40 bytes",
        _declared(8, "Q", 1 << 40),
        rule=Rule(writing=Writing.EITHER),
    ),
    _recipe(
        76,
        "bitmaps-past-end",
        "the bitmap directory is past the end of the file",
        _declared(16, "Q", 1 << 40),
    ),
    _recipe(
        76,
        "bitmaps-in-refcounts",
        "the bitmap directory is the refcount table",
        _declared(16, "Q", 0x10000),
        rule=_UNWRITABLE,
    ),
    _recipe(
        77, "bitmap-granularity-64", "a bitmap's granularity is 2^64", _entry(_GRANULARITY, "B", 64)
    ),
    _recipe(78, "bitmap-type-9", "a bitmap's type is 9, which is none", _entry(_TYPE, "B", 9)),
    _recipe(
        79,
        "bitmap-name-65535",
        "a bitmap's name has 65,535 bytes",
        _entry(_NAME_SIZE, "H", 65_535),
    ),
    _recipe(
        80,
        "bitmap-table-2-32",
        "a bitmap's table has 2^32 - 1 entries",
        _entry(_TABLE_SIZE, "I", 2**32 - 1),
    ),
    _recipe(
        81,
        "bitmap-reserved-flag",
        "a reserved flag of a bitmap is set",
        _entry(_FLAGS, "I", 1 << 31),
    ),
    _recipe(
        81,
        "bitmap-table-in-header",
        "a bitmap's table is the header",
        _entry(0, "Q", 0),
        rule=_UNWRITABLE,
    ),
]
