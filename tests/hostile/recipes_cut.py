"""Files that end too soon: classes 144 and 145."""

from __future__ import annotations

from collections.abc import Callable

from .editing import Image
from .recipe import Reading, Recipe, Rule, Writing

__all__ = ["RECIPES"]

_CLUSTER = 64 << 10
_MIB = 1 << 20
#: The host cluster that is the last one of "plain", and the guest's that it holds.
_LAST, _HELD = 0x90000, 2 * _MIB


def _l2_table(image: Image) -> int:
    return image.l2(0)


def _in_l2_table(image: Image) -> int:
    return image.l2(0) + 512


def _cut(place: Callable[[Image], int]) -> Callable[[Image], object]:
    return lambda image: image.data.__delitem__(slice(place(image), None))


RECIPES = [
    Recipe(
        number=144,
        name="cut-in-data",
        lie="the file ends inside a cluster of data",
        base="plain",
        damage=_cut(lambda _: _LAST + 1000),
        rule=Rule(reading=Reading.FAILS_OR_ZEROES, damaged=(_HELD + 1000, _HELD + _CLUSTER)),
    ),
    Recipe(
        number=144,
        name="cut-before-data",
        lie="the file ends before a cluster of data",
        base="plain",
        damage=_cut(lambda _: _LAST),
        rule=Rule(
            reading=Reading.FAILS, damaged=(_HELD, _HELD + _CLUSTER), writing=Writing.REFUSED
        ),
    ),
    Recipe(
        number=144,
        name="cut-in-compressed-data",
        lie="the file ends inside compressed data",
        base="zlib",
        damage=_cut(lambda image: len(image.data) - 10_000),
        rule=Rule(
            reading=Reading.FAILS, damaged=(_HELD, _HELD + _CLUSTER), writing=Writing.REFUSED
        ),
    ),
    *(
        Recipe(
            number=145,
            name=name,
            lie=lie,
            base="two-tables",
            damage=_cut(place),
            rule=Rule(reading=Reading.FAILS, damaged=(0, 2 * _MIB), writing=Writing.REFUSED),
        )
        for name, lie, place in (
            ("cut-before-l2-table", "the file ends before an L2 table", _l2_table),
            ("cut-in-l2-table", "the file ends inside an L2 table", _in_l2_table),
        )
    ),
]
