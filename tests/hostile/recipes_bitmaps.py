"""Lies in the bitmaps: classes 70 to 81.

None of them harms the disk itself. A writer that cannot keep the bitmaps right clears the bit that
says that they are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from underlay_drivers.qcow2 import layout

from .editing import Image
from .recipe import HARMLESS, Recipe

__all__ = ["RECIPES"]

Damage = Callable[[Image], object]

_CLUSTER = 64 << 10
#: Where the fields of a directory entry are.
_TABLE_SIZE, _FLAGS, _TYPE, _GRANULARITY, _NAME_SIZE = 8, 12, 16, 17, 18


def _declared(*fields: int) -> Damage:
    """A bitmaps extension in an image without bitmaps: count, reserved, size, offset."""
    return lambda image: image.extensions(
        (layout.EXTENSION_BITMAPS, layout.BITMAPS.pack(*fields))
    ).set_bit(layout.AUTOCLEAR_FEATURES_OFFSET, 0)


def _directory(image: Image) -> int:
    """Where the bitmap directory lies: what the extension says at its end."""
    at = image.header.header_length
    while True:
        kind, length = struct.unpack_from(">II", image.data, at)
        if kind == layout.EXTENSION_BITMAPS:
            return image.word(at + 8 + 16)
        assert kind != layout.EXTENSION_END, "no bitmaps"
        at += 8 + length + -length % 8


def _entry(offset: int, form: str, value: int) -> Damage:
    """Change a field of the first bitmap's entry."""
    return lambda image: image.put(_directory(image) + offset, form, value)


def _recipe(number: int, name: str, lie: str, damage: Damage, *, base: str = "plain") -> Recipe:
    return Recipe(number=number, name=name, lie=lie, base=base, damage=damage, rule=HARMLESS)


RECIPES: list[Recipe] = [
    _recipe(
        70,
        "bitmaps-23-bytes",
        "the bitmaps extension has 23 bytes",
        lambda image: image.extensions((layout.EXTENSION_BITMAPS, bytes(23))).set_bit(
            layout.AUTOCLEAR_FEATURES_OFFSET, 0
        ),
    ),
    *(
        _recipe(number, f"bitmaps-{name}", lie, _declared(*fields))
        for number, name, lie, fields in (
            (71, "none", "the bitmaps extension tells of no bitmap", (0, 0, 32, _CLUSTER)),
            (
                72,
                "65536",
                "the bitmaps extension tells of 65,536 bitmaps",
                (65_536, 0, 32, _CLUSTER),
            ),
            (
                73,
                "reserved",
                "a reserved field of the bitmaps extension is set",
                (1, 1, 32, _CLUSTER),
            ),
            (
                74,
                "unaligned",
                "the bitmap directory starts inside a cluster",
                (1, 0, 32, _CLUSTER + 512),
            ),
            (75, "2-40", "the bitmap directory has 2^40 bytes", (1, 0, 1 << 40, _CLUSTER)),
            (
                76,
                "past-end",
                "the bitmap directory is past the end of the file",
                (1, 0, 32, 1 << 40),
            ),
            (
                76,
                "in-refcounts",
                "the bitmap directory is the refcount table",
                (1, 0, 32, _CLUSTER),
            ),
        )
    ),
    *(
        _recipe(number, f"bitmap-{name}", lie, damage, base="bitmaps")
        for number, name, lie, damage in (
            (77, "granularity-64", "a bitmap's granularity is 2^64", _entry(_GRANULARITY, "B", 64)),
            (78, "type-9", "a bitmap's type is 9, which is none", _entry(_TYPE, "B", 9)),
            (79, "name-65535", "a bitmap's name has 65,535 bytes", _entry(_NAME_SIZE, "H", 65_535)),
            (
                80,
                "table-2-32",
                "a bitmap's table has 2^32 - 1 entries",
                _entry(_TABLE_SIZE, "I", 2**32 - 1),
            ),
            (
                81,
                "reserved-flag",
                "a reserved flag of a bitmap is set",
                _entry(_FLAGS, "I", 1 << 31),
            ),
            (
                81,
                "table-in-header",
                "a bitmap's table is the header",
                _entry(0, "Q", 0),
            ),
        )
    ),
]
