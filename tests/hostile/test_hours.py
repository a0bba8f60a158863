"""Small files that describe hours of work, or findings by the million, are over in seconds."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from underlay_drivers.qcow2 import layout

from .attacks import Done, command
from .bases import IMAGE, Bases
from .child import Warm
from .editing import Image
from .uses import Faults, change, check, inspect, mend

_MIB = 1 << 20


def _words(word: int, count: int) -> bytes:
    return struct.pack(">Q", word) * count


def _many_snapshots(image: Image) -> None:
    """16,384 of them share an L1 table of 8,000 entries: 2 MB that took an hour."""
    table = image.add_cluster(_words(image.word(image.l1()) & ~layout.COPIED, 8000))
    fixed = layout.SNAPSHOT.pack(table, 8000, 1, 0, 0, 0, 0, 0, 16)
    entry = fixed + struct.pack(">QQ", 0, 4 * _MIB) + b"1".ljust(8, b"\0")
    image.put(60, "IQ", 16_384, image.add_cluster(entry * 16_384))


def _overlapping_snapshots(image: Image) -> None:
    """16,384 L1 tables of 32 MiB begin a cluster apart, and a refcount has one bit."""
    image.put(96, "I", 0)
    entries = (
        layout.SNAPSHOT.pack(_MIB + image.cluster * number, 4 * _MIB, 0, 0, 0, 0, 0, 0, 16)
        for number in range(16_384)
    )
    table = b"".join(entry + bytes(16) for entry in entries)
    image.put(60, "IQ", 16_384, image.add_cluster(table))


def _long_l1(entry: Callable[[int], int]) -> Callable[[Image], None]:
    """An L1 table of half a million times one entry, made from that of the only L2 table."""

    def damage(image: Image) -> None:
        table = image.add_cluster(_words(entry(image.word(image.l1())), _MIB // 2))
        image.put(36, "IQ", _MIB // 2, table).put(24, "Q", 1 << 45)

    return damage


def _garbage(image: Image, *, step: int) -> None:
    """L2 tables of 2 MiB of noise, one each ``step`` bytes."""
    start = image.add_cluster(random.Random(1).randbytes(2 * _MIB))
    hosts = range(start, start + 2 * _MIB - image.cluster + 1, step)
    l1 = struct.pack(f">{len(hosts)}Q", *(layout.COPIED | host for host in hosts))
    image.put(36, "IQ", len(hosts), image.add_cluster(l1)).put(24, "Q", len(hosts) << 29)


def _many_bitmaps(image: Image) -> None:
    """16,384 of them share a table of 8,000 entries, all of which lead to one cluster."""
    table = image.add_cluster(_words(image.l2(0) & -image.cluster, 8000))
    entries: list[bytes] = []
    for number in range(16_384):
        name = b"%05d" % number
        entry = layout.BITMAP.pack(table, 8000, 0, layout.DIRTY_TRACKING, 16, len(name), 0) + name
        entries.append(entry + bytes(-len(entry) % 8))
    directory = b"".join(entries)
    place = image.add_cluster(directory)
    value = struct.pack(">IIQQ", len(entries), 0, len(directory), place)
    image.extensions((layout.EXTENSION_BITMAPS, value))


def _one_refcount_block(image: Image) -> None:
    """All entries of the largest refcount table lead to one block, in which each count is 257."""
    block = image.refcount_block()
    image.data[block : block + image.cluster] = b"\1" * image.cluster
    table = image.add_cluster(_words(block, layout.REFCOUNT_TABLE_BYTES_MAX // 8))
    image.put(48, "QI", table, layout.REFCOUNT_TABLE_BYTES_MAX // image.cluster)


def _entries_past_the_end(image: Image) -> None:
    """Each L2 entry lies where another entry of the refcount table says its count."""
    _one_refcount_block(image)
    entries = (layout.COPIED | (1 << 40) + (number << 31) for number in range(8192))
    table = image.add_cluster(struct.pack(">8192Q", *entries))
    image.put(image.l1(), "Q", layout.COPIED | table)


#: The damage, and how long the file is then, with a hole at its end.
SHAPES: dict[str, tuple[str, Callable[[Image], None], int]] = {
    "snapshots that share an L1 table": ("plain", _many_snapshots, 0),
    "snapshots whose L1 tables overlap": ("small-clusters", _overlapping_snapshots, 64 * _MIB),
    "L1 entries to one L2 table": ("plain", _long_l1(lambda entry: entry), 0),
    "L1 entries that lack COPIED": ("plain", _long_l1(lambda entry: entry & ~layout.COPIED), 0),
    "L1 entries with reserved bits": ("plain", _long_l1(lambda entry: entry | 1 << 60), 0),
    "L1 entries past the end": ("plain", _long_l1(lambda _: layout.COPIED | 1 << 50), 0),
    "L2 tables of noise": ("plain", lambda image: _garbage(image, step=image.cluster), 0),
    "L2 tables that overlap": ("plain", lambda image: _garbage(image, step=512), 0),
    "bitmaps that share a table": ("bitmaps", _many_bitmaps, 0),
    "refcounts of 1 TiB in one block": ("plain", _one_refcount_block, 1 << 40),
    "refcounts past the end": ("plain", _entries_past_the_end, 0),
}


def _placed(shape: str, bases: Bases, folder: Path) -> Path:
    base, damage, length = SHAPES[shape]
    image = bases[base].image()
    damage(image)
    path = folder / IMAGE
    path.write_bytes(image.data)
    os.truncate(path, max(length, len(image.data)))
    return path


@pytest.mark.parametrize("shape", SHAPES)
def test_looked_at_changed_and_mended_in_time(
    shape: str, bases: Bases, warm: Warm, tmp_path: Path
) -> None:
    path = _placed(shape, bases, tmp_path)
    told: list[str] = []
    for use in (inspect, check, change, mend):
        outcome = warm.run(use, str(path))
        told += [f"{use.__name__}: {fault}" for fault in outcome.broken([path])]
        if use is check and shape != "L2 tables that overlap":
            assert isinstance(outcome.value, Faults)
            assert outcome.value.corruptions + outcome.value.leaks > 8000
    assert not told, "\n".join(told)


def test_tables_that_overlap_are_refused(bases: Bases, warm: Warm, tmp_path: Path) -> None:
    path = _placed("L2 tables that overlap", bases, tmp_path)
    assert "too damaged to be checked" in str(warm.run(check, str(path)).error)


def test_the_command_prints_a_line_for_each_finding_up_to_a_bound(
    bases: Bases, warm: Warm, tmp_path: Path
) -> None:
    path = _placed("refcounts of 1 TiB in one block", bases, tmp_path)
    outcome = warm.run(command, str(tmp_path), "check", "--output=json", "-f", "qcow2", str(path))
    assert not outcome.broken([path])
    assert isinstance(outcome.value, Done)
    *lines, last = outcome.value.err.splitlines()
    assert 100_000 <= len(lines) < 110_000  # a few take two
    assert last == "and 18708837 more findings"
