"""Lies about internal snapshots: classes 135 to 143."""

from __future__ import annotations

import struct
from collections.abc import Callable

import attrs

from underlay_drivers.qcow2.snapshots import SnapshotEntry

from .editing import Image
from .recipe import HARMLESS, Recipe, Rule, Writing

__all__ = ["RECIPES"]

_UNWRITABLE = Rule(writing=Writing.REFUSED)


def _field(at: int, form: str, value: int) -> Callable[[Image], object]:
    """Change a field of the first snapshot's entry."""
    return lambda image: image.put(image.header.snapshots_offset + at, form, value)


def _first(change: Callable[[SnapshotEntry], SnapshotEntry]) -> Callable[[Image], object]:
    """Let the first snapshot's entry be another, and the second follow it."""

    def damage(image: Image) -> None:
        at = image.header.snapshots_offset
        entries: list[SnapshotEntry] = []
        for _ in range(2):
            entry, at = SnapshotEntry.unpack(image.data, at)
            assert entry is not None
            entries.append(entry)
        packed = change(entries[0]).pack() + entries[1].pack()
        at = image.header.snapshots_offset
        image.data[at : at + len(packed)] = packed

    return damage


def _extra(entry: SnapshotEntry, extra: bytes) -> SnapshotEntry:
    return attrs.evolve(entry, extra=extra)


def _recipe(
    number: int,
    name: str,
    lie: str,
    damage: Callable[[Image], object],
    *,
    rule: Rule = _UNWRITABLE,
) -> Recipe:
    return Recipe(number=number, name=name, lie=lie, base="snapshots", damage=damage, rule=rule)


RECIPES = [
    _recipe(
        135,
        "snapshot-l1-unaligned",
        "the L1 table of a snapshot starts inside a cluster",
        lambda image: image.put(
            image.header.snapshots_offset, "Q", image.word(image.header.snapshots_offset) + 512
        ),
    ),
    _recipe(
        136,
        "snapshot-l1-past-the-end",
        "the L1 table of a snapshot lies past the end of the file",
        _field(0, "Q", 1 << 40),
    ),
    _recipe(
        137,
        "snapshot-l1-huge",
        "the L1 table of a snapshot has 2^32-1 entries",
        _field(8, "I", 2**32 - 1),
    ),
    _recipe(
        137,
        "snapshot-l1-32-mib",
        "the L1 table of a snapshot has 32 MiB, which the file has not",
        _field(8, "I", 4 << 20),
    ),
    _recipe(
        138,
        "snapshot-id-65535",
        "the ID of a snapshot has 65,535 bytes",
        _field(12, "H", 65_535),
        rule=Rule(writing=Writing.EITHER),
    ),
    _recipe(
        138,
        "snapshot-name-65535",
        "the name of a snapshot has 65,535 bytes",
        _field(14, "H", 65_535),
        rule=Rule(writing=Writing.EITHER),
    ),
    _recipe(
        139,
        "snapshot-extra-2-32",
        "a snapshot has 2^32-1 bytes of extra data",
        _field(36, "I", 2**32 - 1),
    ),
    _recipe(
        139,
        "snapshot-extra-1025",
        "a snapshot has one byte of extra data more than any may have",
        _field(36, "I", 1025),
    ),
    _recipe(
        140,
        "snapshot-extra-8",
        "a snapshot has 8 bytes of extra data, in version 3",
        _first(lambda entry: _extra(entry, entry.extra[:8])),
        rule=HARMLESS,
    ),
    _recipe(
        141,
        "snapshot-size-2-63",
        "a snapshot's disk has 2^63 bytes",
        _first(lambda entry: _extra(entry, struct.pack(">QQQ", 0, 1 << 63, 0))),
        rule=HARMLESS,
    ),
    _recipe(
        142,
        "snapshot-table-is-l1-table",
        "the snapshot table is the active L1 table",
        lambda image: image.put(64, "Q", image.header.l1_table_offset),
    ),
    _recipe(
        142,
        "snapshot-table-is-refcount-block",
        "the snapshot table is a refcount block",
        lambda image: image.put(64, "Q", image.refcount_block()),
    ),
    _recipe(
        143,
        "snapshot-l1-is-active-l1",
        "the L1 table of a snapshot is the active one",
        lambda image: image.put(
            image.header.snapshots_offset, "QI", image.header.l1_table_offset, image.header.l1_size
        ),
    ),
    _recipe(
        143,
        "snapshot-l1-is-refcount-table",
        "the L1 table of a snapshot is the refcount table",
        _field(0, "Q", 0x10000),
    ),
]
