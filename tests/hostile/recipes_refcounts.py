"""Lies in the refcount table and its blocks: classes 125 to 134."""

from __future__ import annotations

from collections.abc import Callable

from .editing import Image
from .recipe import HARMLESS, Recipe, Rule, Writing

__all__ = ["RECIPES"]

#: Reading does not look at counts; nothing may be allocated by these.
_UNWRITABLE = Rule(writing=Writing.REFUSED)


def _recipe(
    number: int,
    name: str,
    lie: str,
    damage: Callable[[Image], object],
    *,
    base: str = "plain",
    rule: Rule = _UNWRITABLE,
) -> Recipe:
    return Recipe(number=number, name=name, lie=lie, base=base, damage=damage, rule=rule)


def _table(entry: Callable[[Image], int], index: int = 0) -> Callable[[Image], object]:
    """Let an entry of the refcount table be another."""
    return lambda image: image.put(
        image.header.refcount_table_offset + 8 * index, "Q", entry(image)
    )


def _filled(byte: int, length: Callable[[Image], int]) -> Callable[[Image], object]:
    """Fill so many bytes of the first refcount block."""

    def damage(image: Image) -> None:
        start = image.refcount_block()
        image.data[start : start + length(image)] = bytes([byte]) * length(image)

    return damage


def _counted(place: Callable[[Image], int], count: int) -> Callable[[Image], object]:
    """Let the cluster of a table or of data count so often."""
    return lambda image: image.put(image.count(place(image)), "H", count)


def _data(image: Image) -> int:
    """Where guest cluster 1 lies."""
    return image.word(image.l2(1)) & ~(1 << 63)


def _leak(image: Image) -> None:
    offset = image.add_cluster(b"nobody's")
    image.put(image.count(offset), "H", 1)


RECIPES = [
    _recipe(
        125,
        "block-unaligned",
        "an entry of the refcount table leads into a cluster",
        _table(lambda image: image.refcount_block() + 512),
    ),
    _recipe(
        126,
        "block-past-the-end",
        "an entry of the refcount table leads past the end of the file",
        _table(lambda _: 1 << 40),
    ),
    _recipe(
        127,
        "block-reserved",
        "an entry of the refcount table has a reserved bit set",
        _table(lambda image: image.refcount_block() | 1),
    ),
    _recipe(
        128,
        "block-is-l1-table",
        "an entry of the refcount table leads to the L1 table",
        _table(lambda image: image.header.l1_table_offset),
    ),
    _recipe(
        128,
        "block-is-header",
        "an entry of the refcount table leads to the L2 table",
        _table(lambda image: image.l2(0)),
    ),
    _recipe(
        129,
        "block-missing",
        "the refcount table leads nowhere, and so all that is in use counts as free",
        _table(lambda _: 0),
    ),
    _recipe(
        130,
        "block-zero",
        "the refcount block is zero, and so all that is in use counts as free",
        _filled(0, lambda image: image.cluster),
    ),
    _recipe(
        131,
        "block-full",
        "every cluster of the file counts as often as it can",
        _filled(0xFF, lambda image: -(-len(image.data) // image.cluster) * 2),
        base="small-clusters",
        rule=HARMLESS,
    ),
    _recipe(
        132,
        "block-shared",
        "two entries of the refcount table lead to one block",
        _table(Image.refcount_block, index=1),
    ),
    _recipe(133, "leak", "a cluster counts that nothing leads to", _leak, rule=HARMLESS),
    _recipe(134, "data-free", "a cluster of data counts as free", _counted(_data, 0)),
    _recipe(
        134,
        "l2-table-free",
        "an L2 table counts as free",
        _counted(lambda image: image.l2(0), 0),
    ),
    _recipe(
        134,
        "refcount-block-free",
        "a refcount block counts itself as free",
        _counted(Image.refcount_block, 0),
    ),
    _recipe(
        134,
        "header-free",
        "the header counts as free",
        _counted(lambda _: 0, 0),
        # Offset 0 is not even looked at; a hole in front of everything does no harm.
        rule=HARMLESS,
    ),
    _recipe(
        134,
        "shared-data-counts-once",
        "a cluster that a snapshot has too counts once",
        _counted(lambda image: image.word(image.l2(0)), 1),
        base="snapshots",
        # A write there would let go of it; where it needs no room of others, the disk goes on.
        rule=Rule(damaged=(0, 64 << 10), writing=Writing.REFUSED),
    ),
]
