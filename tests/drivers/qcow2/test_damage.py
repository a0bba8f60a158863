"""A damaged image never yields plausible data: refused at open, or where it is damaged.

The numbers are those of the classes of malformed images for which QEMU's behaviour was measured.
"Refused" is a typed error at open; "range" one for the damaged range alone; "unwritable" one for
opening writable; what is none of these must read as if nothing were.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from underlay.errors import (
    CorruptImageError,
)

from .images import Image, mappings, open_bytes, read

Damage = Callable[[Image], object]

COPIED = 1 << 63
CLUSTER = 64 << 10


def reserved(bit: int) -> Damage:
    return lambda image: image.put(image.l2(1), "Q", image.word(image.l2(1)) | 1 << bit)


# -- harmless

HARMLESS: dict[str, Damage] = {
    "124 compressed with COPIED": lambda image: image.put(
        image.l2(3), "Q", image.word(image.l2(3)) | COPIED
    ),
    "125 reftable entry unaligned": lambda image: image.put(0x10000, "Q", 0x20200),
    "126 reftable entry past the end": lambda image: image.put(0x10000, "Q", 1 << 40),
    "127 reftable entry reserved": lambda image: image.put(0x10000, "Q", 0x20001),
    "129 reftable entry 0": lambda image: image.put(0x10000, "Q", 0),
    "130 refblock all zero": lambda image: image.put(image.refcount_block(), "8192Q", *[0] * 8192),
    "109 no COPIED": lambda image: image.put(image.l2(1), "Q", image.word(image.l2(1)) & ~COPIED),
    "reserved bits of a zero cluster's offset past the end": lambda image: image.put(
        image.l2(2), "Q", COPIED | 1 << 40 | 1
    ),
}


@pytest.mark.parametrize("damage", HARMLESS.values(), ids=HARMLESS)
def test_no_harm_to_reading(plain: Image, damage: Damage) -> None:
    with open_bytes(plain.data) as disk:
        good = read(disk, 0, 4 << 20)
    damage(plain)
    with open_bytes(plain.data) as disk:
        assert read(disk, 0, 4 << 20) == good


# -- writing

UNWRITABLE: dict[str, Damage] = {
    "142 snapshot table is the L1 table": lambda image: image.put(60, "IQ", 1, 0x30000),
}


@pytest.mark.parametrize("damage", UNWRITABLE.values(), ids=UNWRITABLE)
def test_readable_but_not_writable(plain: Image, damage: Damage) -> None:
    with open_bytes(plain.data) as disk:
        good = read(disk, 0, 4 << 20)
    damage(plain)
    with open_bytes(plain.data) as disk:
        assert read(disk, 0, 4 << 20) == good
    with pytest.raises(CorruptImageError), open_bytes(plain.data, writable=True):
        pass


# -- a range

RANGES: dict[str, tuple[int, Damage]] = {
    "100 cluster past the end": (1, lambda image: image.put(image.l2(1), "Q", COPIED | 1 << 40)),
    "101 cluster near 2^56": (
        1,
        lambda image: image.put(image.l2(1), "Q", COPIED | (1 << 56) - CLUSTER),
    ),
    "102 cluster unaligned": (
        1,
        lambda image: image.put(image.l2(1), "Q", image.word(image.l2(1)) + 512),
    ),
    **{f"103 reserved bit {bit}": (1, reserved(bit)) for bit in (1, 8, 56, 61)},
    "103 reserved bit alone": (20, lambda image: image.put(image.l2(20), "Q", 1 << 5)),
    "104 the header": (1, lambda image: image.put(image.l2(1), "Q", COPIED)),
    "106 the L1 table": (1, lambda image: image.put(image.l2(1), "Q", COPIED | 0x30000)),
    "107 the refcount table": (1, lambda image: image.put(image.l2(1), "Q", COPIED | 0x10000)),
    "111 zero, unaligned": (2, lambda image: image.put(image.l2(2), "Q", COPIED | 0x50200 | 1)),
    "117 compressed past the end": (
        3,
        lambda image: image.put(image.l2(3), "Q", 1 << 62 | 1 << 40),
    ),
    "119 garbage": (3, lambda image: scribble(image, 3, b"\xff" * 64)),
    "121 a stream that is short": (3, lambda image: scribble(image, 3, b"\x03\0" + bytes(62))),
    "compressed, in the header": (3, lambda image: image.put(image.l2(3), "Q", 1 << 62 | 512)),
}


def scribble(image: Image, cluster: int, content: bytes) -> None:
    offset = image.word(image.l2(cluster)) & ((1 << 54) - 1)
    image.data[offset : offset + len(content)] = content


@pytest.mark.parametrize(("cluster", "damage"), RANGES.values(), ids=RANGES)
def test_an_error_for_that_range_only(plain: Image, cluster: int, damage: Damage) -> None:
    with open_bytes(plain.data) as disk:
        good = read(disk, 0, 4 << 20)
    damage(plain)
    start = cluster * CLUSTER
    with open_bytes(plain.data) as disk:
        for offset in (start, start + 1, start + CLUSTER - 1):
            assert read(disk, start - 1, 1) == good[start - 1 : start]  # brings the table
            location = disk.locate(offset)
            assert location is None
            with pytest.raises(CorruptImageError) as caught:
                read(disk, offset, 1)
            assert "'" in str(caught.value)
        with pytest.raises(CorruptImageError):
            read(disk, 0, 4 << 20)
        assert read(disk, 0, start) == good[:start]
        after = good[start + CLUSTER :]
        assert read(disk, start + CLUSTER, len(after)) == after


L1_FAULTS: dict[str, Damage] = {
    "91 unaligned": lambda image: image.put(image.l1(), "Q", image.word(image.l1()) + 512),
    "92 reserved bit 0": lambda image: image.put(image.l1(), "Q", image.word(image.l1()) | 1),
    "93 reserved bit 56": lambda image: image.put(
        image.l1(), "Q", image.word(image.l1()) | 1 << 56
    ),
    "94 past the end": lambda image: image.put(image.l1(), "Q", COPIED | 1 << 40),
    "95 the header": lambda image: image.put(image.l1(), "Q", COPIED),
    "96 the L1 table": lambda image: image.put(image.l1(), "Q", COPIED | 0x30000),
    "97 the refcount table": lambda image: image.put(image.l1(), "Q", COPIED | 0x10000),
    "144 cut in the L2 table": lambda image: image.data.__delitem__(slice(image.l2(0) + 512, None)),
}


@pytest.mark.parametrize("damage", L1_FAULTS.values(), ids=L1_FAULTS)
def test_a_table_that_cannot_be_is_an_error_for_its_range_only(
    make: Callable[..., Image], damage: Damage
) -> None:
    # Two L2 tables, the damaged one first in the L1 table and last in the file.
    image = make("compat=1.1", "1G", "write -P 0x22 512M 64k", "write -P 0x11 0 64k")
    damage(image)
    with open_bytes(image.data) as disk:
        for offset in (0, (512 << 20) - 1):
            with pytest.raises(CorruptImageError, match="L1 entry"):
                read(disk, offset, 1)
        assert read(disk, 512 << 20, 4096) == b"\x22" * 4096
        with pytest.raises(CorruptImageError, match="L1 entry"):
            mappings(disk)
        assert len(mappings(disk, 512 << 20)) == 2


def test_what_lies_before_damage_is_listed(make: Callable[..., Image]) -> None:
    """By the walk of few clusters, and by the one of many."""
    for size in ("4M", "4G"):
        image = make("compat=1.1", size, "write 0 128k", "write 256k 64k")
        image.put(image.l2(5), "Q", 1 << 5)
        with open_bytes(image.data) as disk:
            found: list[int] = []

            async def collect() -> None:
                async for mapping in disk.iter_mappings(0, disk.size()):
                    found.append(mapping.length)  # noqa: B023, PERF401

            with pytest.raises(CorruptImageError) as caught:
                collect().send(None)
            assert found == [128 << 10, 128 << 10, 64 << 10]
            assert caught.value.field == "L2 entry"
            assert caught.value.offset == image.l2(5)
            assert caught.value.value == 1 << 5


def test_a_zero_flag_in_version_2_is_damage(make: Callable[..., Image]) -> None:
    image = make("compat=0.10", "4M", "write -P 0x11 0 64k")
    image.put(image.l2(1), "Q", 1)
    with open_bytes(image.data) as disk:
        assert read(disk, 0, 4096) == b"\x11" * 4096
        with pytest.raises(CorruptImageError):
            read(disk, CLUSTER, 1)


EXTENDED: dict[str, tuple[int, int]] = {
    "112 both allocated and zero": (0x50000 | COPIED, 1 | 1 << 32),
    "113 allocated without an offset": (0, 1),
    "114 compressed with a bitmap": (1 << 62 | 0x50000, 1),
    "50 a normal zero flag": (1, 0),
    "past the end": (COPIED | 1 << 40, 1),
    "past the end, all of it": (COPIED | 1 << 40, 0xFFFFFFFF),
}


@pytest.mark.parametrize(("entry", "bitmap"), EXTENDED.values(), ids=EXTENDED)
def test_subclusters_that_cannot_be(extended: Image, entry: int, bitmap: int) -> None:
    extended.put(extended.l2(1), "QQ", entry, bitmap)
    with open_bytes(extended.data) as disk:
        assert read(disk, 0, 8192) == b"\x11" * 8192
        assert disk.locate(CLUSTER) is None
        with pytest.raises(CorruptImageError):
            read(disk, CLUSTER, 1)
        assert read(disk, 2 * CLUSTER, 1) == b"\0"


def test_an_offset_past_the_end_that_nothing_reads_does_no_harm(extended: Image) -> None:
    extended.put(extended.l2(1), "QQ", COPIED | 1 << 40, 0xFF << 32)
    with open_bytes(extended.data) as disk:
        assert read(disk, CLUSTER, CLUSTER) == bytes(CLUSTER)


def test_a_cluster_that_the_file_ends_in_reads_zeroes_past_it(make: Callable[..., Image]) -> None:
    image = make("compat=1.1", "4M", "write -P 0x11 0 64k")
    offset = image.word(image.l2(0)) & ~COPIED
    del image.data[offset + 1000 :]
    with open_bytes(image.data) as disk:
        assert read(disk, 0, CLUSTER) == b"\x11" * 1000 + bytes(CLUSTER - 1000)
    del image.data[offset:]
    with open_bytes(image.data) as disk, pytest.raises(CorruptImageError):
        read(disk, 0, 1)


def test_compressed_data_that_the_file_ends_in_is_read_as_far_as_it_goes(
    make: Callable[..., Image],
) -> None:
    image = make("compat=1.1", "4M", "write -c -P 0x44 0 64k")
    entry = image.word(image.l2(0))
    offset = entry & ((1 << 54) - 1)
    end = len(image.data)
    assert end - offset < 512
    # 118: twice as many sectors as there are
    image.put(image.l2(0), "Q", entry + (1 << 54))
    with open_bytes(image.data) as disk:
        assert read(disk, 0, CLUSTER) == b"\x44" * CLUSTER
