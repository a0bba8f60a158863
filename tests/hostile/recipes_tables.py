"""Lies in the L1 and L2 tables: classes 91 to 116."""

from __future__ import annotations

from collections.abc import Callable

from underlay_drivers.qcow2 import layout

from .editing import Image
from .recipe import HARMLESS, Reading, Recipe, Rule, Writing

__all__ = ["RECIPES"]

Damage = Callable[[Image], object]

_CLUSTER = 64 << 10
_MIB = 1 << 20
#: Nothing of this disk can be written before its tables are right.
_UNWRITABLE = Rule(writing=Writing.REFUSED)


def _rule(reading: Reading, start: int, end: int) -> Rule:
    return Rule(reading=reading, damaged=(start, end), writing=Writing.REFUSED)


# -- L1 entries

#: What the first L2 table of "two-tables" is for.
_FIRST = (0, 2 * _MIB)


def _l1(
    number: int,
    name: str,
    lie: str,
    entry: Callable[[Image], int],
    *,
    reading: Reading = Reading.FAILS,
) -> Recipe:
    return Recipe(
        number=number,
        name=f"l1-entry-{name}",
        lie=f"an L1 entry {lie}",
        base="two-tables",
        damage=lambda image: image.put(image.l1(), "Q", entry(image)),
        rule=_rule(reading, *_FIRST),
    )


def _leading(place: Callable[[Image], int]) -> Callable[[Image], int]:
    return lambda image: place(image) | layout.COPIED


_L1 = [
    _l1(91, "unaligned", "leads into a cluster", lambda image: image.word(image.l1()) + 512),
    *(
        _l1(
            number,
            f"reserved-{bit}",
            f"has the reserved bit {bit} set",
            lambda image, bit=bit: image.word(image.l1()) | 1 << bit,  # type: ignore[misc]
        )
        for number, bit in ((92, 0), (92, 8), (93, 56), (93, 62))
    ),
    _l1(94, "past-the-end", "leads past the end of the file", _leading(lambda _: 1 << 40)),
    _l1(94, "near-2-56", "leads to 2^56", _leading(lambda image: (1 << 56) - image.cluster)),
    _l1(95, "header", "leads to the header", _leading(lambda _: 0)),
    _l1(
        96,
        "l1-table",
        "leads to the L1 table itself",
        _leading(lambda image: image.header.l1_table_offset),
    ),
    _l1(
        97,
        "refcount-table",
        "leads to the refcount table",
        _leading(lambda image: image.header.refcount_table_offset),
    ),
    # That it is one, reading does not know; its counts are no entries that could lead anywhere.
    _l1(
        98,
        "refcount-block",
        "leads to a refcount block",
        _leading(Image.refcount_block),
        reading=Reading.ANY,
    ),
    Recipe(
        number=99,
        name="l2-table-shared",
        lie="two L1 entries lead to one L2 table that counts once",
        base="two-tables",
        damage=lambda image: image.put(image.l1(1), "Q", image.word(image.l1(0))),
        rule=_rule(Reading.ANY, 2 * _MIB, 4 * _MIB),
    ),
]

# -- L2 entries


def _l2(
    number: int,
    name: str,
    lie: str,
    entry: Callable[[Image], int],
    *,
    base: str = "plain",
    cluster: int = 1,
    reading: Reading = Reading.FAILS,
) -> Recipe:
    return Recipe(
        number=number,
        name=f"l2-entry-{name}",
        lie=f"an L2 entry {lie}",
        base=base,
        damage=lambda image: image.put(image.l2(cluster), "Q", entry(image)),
        rule=_rule(reading, cluster * _CLUSTER, (cluster + 1) * _CLUSTER),
    )


def _bits(bits: int) -> Callable[[Image], int]:
    return lambda image: image.word(image.l2(1)) | bits


_L2 = [
    _l2(100, "unaligned", "leads into a cluster", _bits(512)),
    _l2(101, "past-the-end", "leads past the end of the file", _leading(lambda _: 1 << 40)),
    _l2(102, "near-2-56", "leads to 2^56", _leading(lambda _: (1 << 56) - _CLUSTER)),
    *(
        _l2(103, f"reserved-{bit}", f"has the reserved bit {bit} set", _bits(1 << bit))
        for bit in (1, 8, 56, 61)
    ),
    _l2(103, "reserved-alone", "is nothing but a reserved bit", lambda _: 1 << 5, cluster=20),
    _l2(104, "header", "leads to the header", _leading(lambda _: 0)),
    _l2(
        105,
        "own-table",
        "leads to its own L2 table",
        _leading(lambda image: image.l2(0)),
        reading=Reading.ANY,
    ),
    _l2(
        106,
        "l1-table",
        "leads to the L1 table",
        _leading(lambda image: image.header.l1_table_offset),
    ),
    _l2(
        107,
        "refcount-block",
        "leads to a refcount block",
        _leading(Image.refcount_block),
        reading=Reading.ANY,
    ),
    _l2(
        107,
        "refcount-table",
        "leads to the refcount table",
        _leading(lambda image: image.header.refcount_table_offset),
    ),
    _l2(
        107,
        "zero-on-metadata",
        "of a zero cluster has its room in the L1 table",
        lambda image: image.header.l1_table_offset | layout.COPIED | layout.ZERO,
        cluster=5,
        reading=Reading.SAME,
    ),
    Recipe(
        number=101,
        name="zero-room-past-the-end",
        lie="a zero cluster has its room past the end of the file",
        base="plain",
        damage=lambda image: image.put(image.l2(2), "Q", layout.COPIED | 1 << 40 | layout.ZERO),
        rule=Rule(writing=Writing.EITHER),
    ),
    Recipe(
        number=108,
        name="cluster-shared",
        lie="two L2 entries lead to one cluster that counts once",
        base="plain",
        damage=lambda image: image.put(image.l2(1), "Q", image.word(image.l2(0))),
        # Reading cannot see it, and nor can writing in place.
        rule=Rule(reading=Reading.ANY, damaged=(0, 2 * _CLUSTER)),
    ),
    _l2(110, "zero-in-version-2", "has the zero flag, in version 2", _bits(layout.ZERO), base="v2"),
    _l2(
        110,
        "zero-alone-in-version-2",
        "is nothing but the zero flag, in version 2",
        lambda _: layout.ZERO,
        base="v2",
        cluster=20,
    ),
    _l2(
        111,
        "zero-unaligned",
        "of a zero cluster has its room inside a cluster",
        lambda image: image.word(image.l2(5)) + 512,
        cluster=5,
    ),
    _l2(
        115,
        "host-not-guest",
        "does not lead to its own offset in the data file",
        _leading(lambda _: 2 * _CLUSTER),
        base="data-file",
    ),
    _l2(
        116,
        "compressed-beside-data-file",
        "is compressed, and there is a data file",
        lambda _: layout.COMPRESSED | _CLUSTER,
        base="data-file",
    ),
]

# -- COPIED


def _flip(place: Callable[[Image], int]) -> Damage:
    return lambda image: image.put(place(image), "Q", image.word(place(image)) ^ layout.COPIED)


_COPIED = [
    Recipe(
        number=109,
        name="copied-clear",
        lie="COPIED is clear though the cluster counts once",
        base="plain",
        damage=_flip(lambda image: image.l2(0)),
        rule=HARMLESS,
    ),
    Recipe(
        number=109,
        name="copied-clear-table",
        lie="COPIED is clear though the L2 table counts once",
        base="two-tables",
        damage=_flip(lambda image: image.l1()),
        rule=HARMLESS,
    ),
    Recipe(
        number=109,
        name="copied-set",
        lie="COPIED is set though a snapshot has the cluster too",
        base="snapshots",
        damage=_flip(lambda image: image.l2(0)),
        rule=HARMLESS,
    ),
]

# -- extended L2 entries


def _extended(number: int, name: str, lie: str, entry: int, bitmap: int) -> Recipe:
    return Recipe(
        number=number,
        name=f"extended-{name}",
        lie=f"an extended L2 entry {lie}",
        base="extended-l2",
        damage=lambda image: image.put(image.l2(1), "QQ", entry, bitmap),
        rule=_rule(Reading.FAILS, _CLUSTER, 2 * _CLUSTER),
    )


#: Where the base has guest cluster 1.
_ITS_PLACE = 0x60000 | layout.COPIED

_EXTENDED = [
    _extended(
        112,
        "allocated-and-zero",
        "has a subcluster that is both allocated and zero",
        _ITS_PLACE,
        layout.ALL_ALLOCATED | 1 << layout.SUBCLUSTERS,
    ),
    _extended(
        113, "without-offset", "has allocated subclusters and no place", 0, layout.ALL_ALLOCATED
    ),
    _extended(113, "one-without-offset", "has an allocated subcluster and no place", 0, 1),
    _extended(
        114,
        "compressed-with-bitmap",
        "is compressed and has subclusters",
        layout.COMPRESSED | 0x70000,
        1,
    ),
    _extended(
        101,
        "past-the-end",
        "leads past the end of the file",
        layout.COPIED | 1 << 40,
        layout.ALL_ALLOCATED,
    ),
    _extended(
        101,
        "one-past-the-end",
        "with one allocated subcluster leads past the end of the file",
        layout.COPIED | 1 << 40,
        1,
    ),
    _extended(50, "zero-flag", "has the zero flag of normal ones", layout.ZERO, 0),
    Recipe(
        number=101,
        name="extended-room-past-the-end",
        lie="an extended L2 entry that shows nothing leads past the end of the file",
        base="extended-l2",
        damage=lambda image: image.put(
            image.l2(20), "QQ", layout.COPIED | 1 << 40, layout.ALL_ZERO
        ),
        rule=Rule(writing=Writing.EITHER),
    ),
]

RECIPES = [*_L1, *_L2, *_COPIED, *_EXTENDED]
