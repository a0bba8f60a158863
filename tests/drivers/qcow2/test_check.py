"""A check agrees with QEMU's: the verdict, each count, each line; on whole images and damaged ones.

The numbers are those of the classes of malformed images for which QEMU's behaviour was measured.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import pytest

from underlay.capabilities import Finding
from underlay.errors import UnderlayError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.snapshots import SnapshotEntry

from .checking import check_bytes, exit_status
from .images import Image

Damage = Callable[[Image], object]
Maker = Callable[..., Image]

COPIED = 1 << 63
FAR = 1 << 40

#: What qemu-img's JSON calls the counts.
COUNTS = {
    "corruptions": "corruptions",
    "leaks": "leaks",
    "check_errors": "check-errors",
    "image_end_offset": "image-end-offset",
    "total_clusters": "total-clusters",
    "allocated_clusters": "allocated-clusters",
    "fragmented_clusters": "fragmented-clusters",
    "compressed_clusters": "compressed-clusters",
}
#: Printed by QEMU when it opens an image with bitmaps that are out of date; ends no line.
HINT = "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."


class Verdict(NamedTuple):
    """What a check says: its exit status, its counts, and its lines in any order."""

    status: int
    counts: dict[str, int]
    lines: list[str]


@pytest.fixture
def verdict(tmp_path: Path, qemu_img: object) -> Callable[[Image], Verdict]:
    """QEMU's own."""

    def ask(image: Image) -> Verdict:
        path = tmp_path / "asked.qcow2"
        path.write_bytes(image.data)
        done = subprocess.run(
            ["qemu-img", "check", "--output=json", "-f", "qcow2", path],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        fields: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
        counts = {ours: fields.get(theirs, 0) for ours, theirs in COUNTS.items()}
        if not fields:  # the check could not run: its words are ours to choose
            return Verdict(done.returncode, {}, [])
        stderr = done.stderr.replace(HINT, "")
        lines = [
            line for line in stderr.splitlines() if not line.startswith(("qemu-img:", "qcow2"))
        ]
        return Verdict(done.returncode, counts, sorted(lines))

    return ask


def own_verdict(image: Image) -> Verdict:
    findings: list[Finding] = []
    try:
        result = check_bytes(image.data, report=findings.append)
    except UnderlayError:
        return Verdict(1, {}, [])
    assert all(finding.what for finding in findings)
    lines = [line for finding in findings for line in finding.line.splitlines()]
    counts = {name: getattr(result, name) for name in COUNTS}
    return Verdict(exit_status(result), counts, sorted(lines))


def agree(image: Image, verdict: Callable[[Image], Verdict]) -> Verdict:
    theirs = verdict(image)
    ours = own_verdict(image)
    assert ours == theirs
    return theirs


# -- images as QEMU makes them

WRITES = (
    "write -P 1 0 300k",
    "write -P 2 1M 64k",
    "write -z 2M 128k",
    "write -c -P 3 3M 64k",
    "write -c -P 4 3136k 64k",
    "write -P 5 500k 3k",
)

GOOD = {
    **{
        f"refcounts of {bits} bits": (
            f"refcount_bits={bits}",
            "4M",
            WRITES if bits > 1 else WRITES[:3],
        )
        for bits in (1, 2, 4, 8, 16, 32, 64)
    },
    "clusters of 512 bytes": ("cluster_size=512", "4M", WRITES),
    "clusters of 2 MiB": ("cluster_size=2M", "40M", (*WRITES[:3], "write -c -P 3 6M 2M")),
    "version 2": ("compat=0.10", "4M", WRITES),
    "extended L2": ("extended_l2=on", "4M", WRITES),
    "zstd": ("compression_type=zstd", "4M", WRITES),
    "lazy refcounts": ("lazy_refcounts=on", "4M", WRITES),
    "preallocated": ("preallocation=metadata", "200M", ()),
    "preallocated, small clusters": ("preallocation=metadata,cluster_size=512", "3M", WRITES[:3]),
    "preallocated, extended": ("preallocation=metadata,extended_l2=on", "200M", ()),
    "nothing": ("compat=1.1", "4M", ()),
    "no size": ("compat=1.1", "0", ()),
    "an odd size": ("compat=1.1", "1234567", ("write 0 100k",)),
    "fragmented": (
        "cluster_size=4k",
        "4M",
        tuple(f"write {at * 12 % 1024}k 4k" for at in range(0, 100, 3)),
    ),
}


@pytest.mark.parametrize(("options", "size", "writes"), GOOD.values(), ids=GOOD)
def test_good_images(
    make: Maker,
    verdict: Callable[[Image], Verdict],
    options: str,
    size: str,
    writes: tuple[str, ...],
) -> None:
    assert agree(make(options, size, *writes), verdict).status == 0


def test_snapshots(snapshotted: Image, verdict: Callable[[Image], Verdict]) -> None:
    assert agree(snapshotted, verdict).status == 0


def test_a_data_file(with_data_file: Image, verdict: Callable[[Image], Verdict]) -> None:
    assert agree(with_data_file, verdict).status == 0


def test_bitmaps(bitmapped: Image, verdict: Callable[[Image], Verdict]) -> None:
    assert agree(bitmapped, verdict).status == 0


# -- damaged images


def word(place: Callable[[Image], int], change: Callable[[int], int]) -> Damage:
    """Change one 64-bit word."""

    def damage(image: Image) -> None:
        at = place(image)
        image.put(at, "Q", change(image.word(at)))

    return damage


def l2(cluster: int, change: Callable[[int], int] | int) -> Damage:
    return word(lambda image: image.l2(cluster), _change(change))


def l1(change: Callable[[int], int] | int) -> Damage:
    return word(Image.l1, _change(change))


def reftable(change: Callable[[int], int] | int, index: int = 0) -> Damage:
    return word(lambda image: image.header.refcount_table_offset + 8 * index, _change(change))


def _change(change: Callable[[int], int] | int) -> Callable[[int], int]:
    return change if callable(change) else lambda _: change


def refcount(cluster: int, count: int) -> Damage:
    return lambda image: image.put(image.refcount_block() + 2 * cluster, "H", count)


def field(offset: int, form: str, *values: int) -> Damage:
    return lambda image: image.put(offset, form, *values)


def cut(length: Callable[[Image], int]) -> Damage:
    return lambda image: image.data.__delitem__(slice(length(image), None))


def both(*damages: Damage) -> Damage:
    return lambda image: [damage(image) for damage in damages]


def share_l2(image: Image) -> None:
    """The second L1 entry leads where the first one does."""
    image.put(36, "I", 2).put(24, "Q", 1 << 30).put(image.l1(1), "Q", image.word(image.l1()))


def bitmap_entry(index: int, value: int) -> Damage:
    def damage(image: Image) -> None:
        (directory,) = (
            layout.BITMAPS.unpack(content)[3]
            for kind, content in extensions(image)
            if kind == layout.EXTENSION_BITMAPS
        )
        image.put(image.word(directory) + 8 * index, "Q", value)

    return damage


def extensions(image: Image) -> list[tuple[int, bytes]]:
    header, problem = image.header.with_extensions(bytes(image.data))
    assert problem is None
    return [(extension.type, extension.data) for extension in header.extensions]


PLAIN: dict[str, Damage] = {
    "24 L1 past the end": field(36, "I", 4 << 20),
    "26 l1 offset 0": field(40, "Q", 0),
    "27 l1 offset past the end": field(40, "Q", FAR),
    "29 reftable offset 0": field(48, "Q", 0),
    "31 reftable past the end": field(48, "Q", FAR),
    "36 reftable over the L1 table": field(48, "Q", 0x30000),
    "36 reftable over a refblock": field(48, "Q", 0x20000),
    "39 one snapshot, offset 0": field(60, "I", 1),
    "41 snapshot table past the end": field(60, "IQ", 1, FAR),
    "44 dirty": field(72, "Q", 1),
    "45 corrupt": field(72, "Q", 2),
    "50 extended L2 on normal tables": field(72, "Q", 16),
    "57 refcount_order 3 on 16 bits": field(96, "I", 3),
    "57 refcount_order 0 on 16 bits": field(96, "I", 0),
    "57 refcount_order 6 on 16 bits": field(96, "I", 6),
    "91 L1 entry unaligned": l1(lambda entry: entry + 512),
    "92 L1 entry reserved bit 0": l1(lambda entry: entry | 1),
    "93 L1 entry reserved bit 56": l1(lambda entry: entry | 1 << 56),
    "94 L1 entry past the end": l1(COPIED | FAR),
    "95 L1 entry: the header": l1(COPIED),
    "96 L1 entry: the L1 table": l1(COPIED | 0x30000),
    "97 L1 entry: the refcount table": l1(COPIED | 0x10000),
    "98 L1 entry: a refcount block": l1(COPIED | 0x20000),
    "99 two L1 entries, one L2 table": share_l2,
    "100 L2 entry unaligned": l2(1, lambda entry: entry + 512),
    "101 L2 entry past the end": l2(1, COPIED | FAR),
    "101 L2 entry past the end, not copied": l2(1, FAR),
    "102 L2 entry near 2^56": l2(1, COPIED | (1 << 56) - 0x10000),
    "103 L2 entry reserved bit 1": l2(1, lambda entry: entry | 2),
    "103 L2 entry reserved bit 61": l2(1, lambda entry: entry | 1 << 61),
    "103 a hole with reserved bits": l2(9, 1 << 5),
    "104 L2 entry: the header": l2(1, COPIED),
    "105 L2 entry: its own table": lambda image: image.put(
        image.l2(1), "Q", COPIED | (image.l2(0) & -image.cluster)
    ),
    "106 L2 entry: the L1 table": l2(1, COPIED | 0x30000),
    "107 L2 entry: a refcount block": l2(1, COPIED | 0x20000),
    "108 two L2 entries, one cluster": lambda image: image.put(
        image.l2(1), "Q", image.word(image.l2(0))
    ),
    "109 no COPIED": l2(1, lambda entry: entry & ~COPIED),
    "109 no COPIED in L1": l1(lambda entry: entry & ~COPIED),
    "109 COPIED, refcount 2": refcount(5, 2),
    "110 zero flag in version 2": both(l2(1, lambda entry: entry | 1), field(4, "I", 2)),
    "111 zero, unaligned": l2(2, COPIED | 0x50200 | 1),
    "111 zero, unaligned, past the end": l2(2, COPIED | FAR + 512 | 1),
    "117 compressed past the end": l2(3, 1 << 62 | FAR),
    "118 compressed length past the end": l2(3, lambda entry: entry | 0xFF << 54),
    "119 garbage deflated": lambda image: image.data.__setitem__(slice(-64, None), b"\xff" * 64),
    "124 compressed with COPIED": l2(3, lambda entry: entry | COPIED),
    "125 reftable entry unaligned": reftable(0x20200),
    "126 reftable entry past the end": reftable(FAR),
    "127 reftable entry reserved": reftable(0x20001),
    "128 reftable entry: the L1 table": reftable(0x30000),
    "129 reftable entry 0": reftable(0),
    "130 refblock all zero": lambda image: image.put(image.refcount_block(), "8192Q", *[0] * 8192),
    "131 refblock all ones": lambda image: image.put(
        image.refcount_block(), "8192Q", *[2**64 - 1] * 8192
    ),
    "132 two reftable entries, one block": reftable(0x20000, index=1),
    "132 two reftable entries, the second past the end": reftable(FAR, index=1),
    "133 a leak": refcount(8, 7),
    "133 a leak of a cluster in use": refcount(6, 7),
    "133 a leak past the end": refcount(100, 1),
    "134 refcount 0": refcount(6, 0),
    "134 refcount 0 of the header": refcount(0, 0),
    "134 refcount 0 of the L2 table": refcount(4, 0),
    "142 snapshot table: the L1 table": field(60, "IQ", 1, 0x30000),
    "144 cut inside data": cut(lambda image: len(image.data) - 0x18000),
    "144 cut at 100 bytes into a cluster": cut(lambda _: 0x50064),
    "145 cut before L2": cut(lambda image: image.l2(0) & -image.cluster),
    "145 cut after the refcount table": cut(lambda _: 0x20000),
    "much at once": both(
        refcount(6, 3), refcount(5, 2), l2(9, COPIED | 0x60000), l2(10, 3), l1(lambda e: e | 4)
    ),
}


@pytest.mark.parametrize("damage", PLAIN.values(), ids=PLAIN)
def test_damaged(plain: Image, verdict: Callable[[Image], Verdict], damage: Damage) -> None:
    damage(plain)
    agree(plain, verdict)


EXTENDED: dict[str, Damage] = {
    "112 allocated and zero both": word(lambda image: image.l2(0) + 8, lambda bits: bits | 1 << 32),
    "113 allocated without offset": word(lambda image: image.l2(5) + 8, lambda _: 1),
    "114 compressed with a bitmap": lambda image: image.put(
        image.l2(5), "QQ", 1 << 62 | 0x50000, 1
    ),
    "unaligned, allocated": l2(0, lambda entry: entry + 512),
    "unaligned, zero": lambda image: image.put(
        image.l2(5), "QQ", COPIED | 0x50200, layout.ALL_ZERO
    ),
    "no COPIED": l2(0, lambda entry: entry & ~COPIED),
    "zero flag": l2(0, lambda entry: entry | 1),
}


@pytest.mark.parametrize("damage", EXTENDED.values(), ids=EXTENDED)
def test_damaged_extended_entries(
    extended: Image, verdict: Callable[[Image], Verdict], damage: Damage
) -> None:
    damage(extended)
    agree(extended, verdict)


DATA_FILE: dict[str, Damage] = {
    "115 host offset not guest offset": l2(0, COPIED | 0x20000),
    "116 compressed": l2(1, 1 << 62 | 0x50000),
    "no COPIED": l2(2, lambda entry: entry & ~COPIED),
    "unaligned": l2(2, lambda entry: entry + 512),
    "a snapshot": field(60, "IQ", 1, FAR),
}


@pytest.mark.parametrize("damage", DATA_FILE.values(), ids=DATA_FILE)
def test_damaged_with_a_data_file(
    with_data_file: Image, verdict: Callable[[Image], Verdict], damage: Damage
) -> None:
    damage(with_data_file)
    agree(with_data_file, verdict)


def snapshot_field(offset: int, form: str, *values: int) -> Damage:
    return lambda image: image.put(image.header.snapshots_offset + offset, form, *values)


SNAPSHOTS: dict[str, Damage] = {
    "135 L1 unaligned": snapshot_field(0, "Q", 0x50200),
    "136 L1 past the end": snapshot_field(0, "Q", FAR),
    "137 l1_size huge": snapshot_field(8, "I", (4 << 20) + 1),
    "137 l1_size over the end": snapshot_field(8, "I", 3 << 20),
    "138 id of 65,535 bytes": snapshot_field(12, "H", 65_535),
    "139 extra data 2^32-1": snapshot_field(36, "I", 2**32 - 1),
    "140 extra data 8": snapshot_field(36, "I", 8),
    "142 snapshot table is the L1 table": lambda image: image.put(
        64, "Q", image.header.l1_table_offset
    ),
    "143 snapshot L1 is the active L1": lambda image: image.put(
        image.header.snapshots_offset, "Q", image.header.l1_table_offset
    ),
    "active L2 without COPIED": l2(0, lambda entry: entry & ~COPIED),
    "one snapshot less": field(60, "I", 1),
}


@pytest.mark.parametrize("damage", SNAPSHOTS.values(), ids=SNAPSHOTS)
def test_damaged_snapshots(
    snapshotted: Image, verdict: Callable[[Image], Verdict], damage: Damage
) -> None:
    damage(snapshotted)
    agree(snapshotted, verdict)


def ten_snapshots(image: Image, *, sizes: Sequence[int]) -> int:
    """All of one L1 table, of ``sizes`` entries; where that lies."""
    first, _ = SnapshotEntry.unpack(image.data, image.header.snapshots_offset)
    assert first is not None
    table = b"".join(
        attrs.evolve(first, id=b"%d" % number, l1_size=size).pack()
        for number, size in enumerate(sizes)
    )
    image.put(60, "IQ", len(sizes), image.add_cluster(table))
    return first.l1_table_offset


def five_entries(image: Image) -> None:
    """Five L1 entries lead to one L2 table."""
    image.put(36, "I", 5).put(24, "Q", 5 << 29)
    image.put(image.l1(), "5Q", *[image.word(image.l1())] * 5)


SHARED: dict[str, Damage] = {
    "nothing else": lambda _: None,
    "no COPIED": l2(0, lambda entry: entry & ~COPIED),
    "no COPIED in L1": l1(lambda entry: entry & ~COPIED),
    "reserved bits in L1": l1(lambda entry: entry | 1 << 60),
    "unaligned in L1": l1(lambda entry: entry + 512),
    "L1 past the end": l1(COPIED | FAR),
    "reserved bits": l2(0, lambda entry: entry | 1 << 60),
    "unaligned": l2(0, lambda entry: entry + 512),
    "past the end": l2(0, COPIED | FAR),
    "compressed past the end": l2(1, 1 << 62 | FAR),
    "compressed, COPIED": l2(1, 3 << 62 | 0x50000),
    "unaligned, zero": l2(1, COPIED | 0x50201),
}


@pytest.mark.parametrize("damage", SHARED.values(), ids=SHARED)
def test_an_l2_table_of_five_l1_entries(
    plain: Image, verdict: Callable[[Image], Verdict], damage: Damage
) -> None:
    damage(plain)
    five_entries(plain)
    assert agree(plain, verdict).status == 2


@pytest.mark.parametrize("sizes", [(1,) * 10, (1, 2, 3, 1, 2, 3, 8192, 8191, 9, 3)])
@pytest.mark.parametrize("damage", SHARED.values(), ids=SHARED)
def test_an_l1_table_of_ten_snapshots(
    snapshotted: Image, verdict: Callable[[Image], Verdict], damage: Damage, sizes: Sequence[int]
) -> None:
    """Of which some know more entries of it than others."""
    damage(snapshotted)
    place = ten_snapshots(snapshotted, sizes=sizes)
    snapshotted.put(place, "Q", snapshotted.word(snapshotted.l1()))
    assert agree(snapshotted, verdict).status == 2


@pytest.mark.parametrize("bits", [1, 2])
def test_tables_shared_more_often_than_a_refcount_can_say(
    make: Maker, verdict: Callable[[Image], Verdict], bits: int
) -> None:
    image = make(f"refcount_bits={bits}", "4M", "write 0 512k")
    five_entries(image)
    assert agree(image, verdict).status == 2


def test_what_is_shared_is_told_again_up_to_a_bound(plain: Image) -> None:
    plain.put(plain.l2(0), "Q", 1 << 60)
    plain.put(36, "I", 1 << 13).put(24, "Q", 1 << 42)
    plain.put(plain.l1(), f"{1 << 13}Q", *[plain.word(plain.l1())] * (1 << 13))
    seen: list[Finding] = []
    result = check_bytes(plain.data, report=seen.append)
    assert result.corruptions > 1 << 13
    assert len(result.findings) == 1000 < len(seen) < 1100
    assert result.corruptions + result.leaks == len(result.findings) + result.findings_omitted


BITMAPS: dict[str, Damage] = {
    "table entry past the end": bitmap_entry(0, FAR),
    "table entry: the L1 table": bitmap_entry(0, 0x30000),
    "out of date": field(88, "Q", 0),
}


@pytest.mark.parametrize("damage", BITMAPS.values(), ids=BITMAPS)
def test_damaged_bitmaps(
    bitmapped: Image, verdict: Callable[[Image], Verdict], damage: Damage
) -> None:
    damage(bitmapped)
    agree(bitmapped, verdict)


@pytest.mark.parametrize("entry", [1 << 57, 0x50200, 0x50001])
def test_a_bitmap_entry_that_makes_no_sense_does_not_end_the_check(
    bitmapped: Image, verdict: Callable[[Image], Verdict], entry: int
) -> None:
    """QEMU says no more than that the check failed."""
    bitmap_entry(0, entry)(bitmapped)
    assert verdict(bitmapped).status == 1
    found = own_verdict(bitmapped)
    assert found.status == 2
    assert found.counts["corruptions"] == 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32, 64])
def test_damaged_refcounts_of_every_width(
    make: Maker, verdict: Callable[[Image], Verdict], bits: int
) -> None:
    image = make(f"refcount_bits={bits}", "4M", "write 0 512k")
    block = image.refcount_block()
    if bits < 8:
        image.put(block + 6 * bits // 8, "BB", 0xFF, 0)
    else:
        image.put(block + 5 * bits // 8, {8: "B", 32: "I", 64: "Q"}[bits], 0)
        image.put(block + 6 * bits // 8, {8: "B", 32: "I", 64: "Q"}[bits], (1 << bits) - 1)
    image.put(image.l2(3), "Q", image.word(image.l2(2)))
    image.put(image.l2(4), "Q", image.word(image.l2(2)))
    assert agree(image, verdict).status == 2


# -- bounds


def test_findings_are_kept_up_to_a_bound_and_reported_all(make: Maker) -> None:
    image = make("cluster_size=512", "4M", "write 0 2M")
    block = image.refcount_block()
    for table in range(8):
        entry = image.word(image.header.refcount_table_offset + 8 * table)
        if entry:
            image.put(entry, "256H", *[9] * 256)
    assert image.word(block)
    seen: list[Finding] = []
    result = check_bytes(image.data, report=seen.append)
    assert len(result.findings) == 1000
    assert result.findings_omitted == len(seen) - 1000 > 0
    assert list(result.findings) == seen[:1000]
    assert check_bytes(image.data).findings == result.findings


def test_a_finding_says_where_and_what_was_expected(plain: Image) -> None:
    refcount(6, 3)(plain)
    (leak, *_) = check_bytes(plain.data).findings
    assert (leak.kind, leak.offset, leak.found, leak.expected) == ("leak", 6 * 65536, 3, 1)
