"""A damaged image never yields plausible data: refused at open, or where it is damaged.

The numbers are those of the classes of malformed images for which QEMU's behaviour was measured.
"Refused" is a typed error at open; "range" one for the damaged range alone; "unwritable" one for
opening writable; what is none of these must read as if nothing were.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from underlay.errors import (
    CorruptImageError,
    InvalidImageError,
    LimitExceededError,
    ReadOnlyError,
    UnderlayError,
    UnsupportedFeatureError,
)
from underlay.limits import Limits
from underlay_drivers.qcow2 import layout

from .images import Image, mappings, open_bytes, read

Damage = Callable[[Image], object]

COPIED = 1 << 63
CLUSTER = 64 << 10


def field(offset: int, form: str, value: int) -> Damage:
    return lambda image: image.put(offset, form, value)


def extension(kind: int, content: bytes) -> Damage:
    return lambda image: image.extensions((kind, content))


def extension_length(length: int) -> Damage:
    return lambda image: image.put(image.header.header_length, "II", 0x12345678, length)


def backing(name: bytes, *, offset: int = 1024, length: int | None = None) -> Damage:
    def damage(image: Image) -> None:
        image.put(8, "QI", offset, len(name) if length is None else length)
        if offset + len(name) <= image.cluster:
            image.data[offset : offset + len(name)] = name

    return damage


def bitmaps(*fields: int) -> Damage:
    return lambda image: (
        image.extensions((layout.EXTENSION_BITMAPS, layout.BITMAPS.pack(*fields))),
        image.put(88, "Q", 1),
    )


def reserved(bit: int) -> Damage:
    return lambda image: image.put(image.l2(1), "Q", image.word(image.l2(1)) | 1 << bit)


def incompatible(bit: int) -> Damage:
    return lambda image: image.put(72, "Q", image.word(72) | 1 << bit)


REFUSED: dict[str, Damage] = {
    "1 magic": field(0, "I", 0x514649FC),
    "2 empty": lambda image: image.data.clear(),
    "3 40 bytes": lambda image: image.data.__delitem__(slice(40, None)),
    "4 80 bytes": lambda image: image.data.__delitem__(slice(80, None)),
    "5 version 0": field(4, "I", 0),
    "5 version 1": field(4, "I", 1),
    "6 version 4": field(4, "I", 4),
    **{
        f"{number} cluster_bits {bits}": field(20, "I", bits)
        for number, bits in zip(range(7, 13), (0, 8, 22, 31, 63, 2**32 - 1), strict=True)
    },
    "13 size 2^63": field(24, "Q", 1 << 63),
    "14 size 2^64-1": field(24, "Q", 2**64 - 1),
    "15 size larger than L1": field(24, "Q", (512 << 20) + 1),
    "18 crypt_method 3": field(32, "I", 3),
    "19 LUKS without header": field(32, "I", 2),
    "20 AES": field(32, "I", 1),
    "21 l1_size 0": field(36, "I", 0),
    "22 l1_size 2^32-1": field(36, "I", 2**32 - 1),
    "23 l1_size one over 32 MiB": field(36, "I", (4 << 20) + 1),
    "24 L1 past the end": field(36, "I", 4 << 20),
    "25 l1 offset unaligned": field(40, "Q", 0x30200),
    "26 l1 offset 0": field(40, "Q", 0),
    "27 l1 offset past the end": field(40, "Q", 1 << 40),
    "28 l1 offset 2^63": field(40, "Q", 1 << 63),
    "30 reftable unaligned": field(48, "Q", 0x10200),
    "32 reftable 2^64-64K": field(48, "Q", 2**64 - 65536),
    "33 reftable clusters 0": field(56, "I", 0),
    "34 reftable clusters 2^32-1": field(56, "I", 2**32 - 1),
    "35 reftable over 8 MiB": field(56, "I", 129),
    "37 nb_snapshots 2^32-1": field(60, "I", 2**32 - 1),
    "38 nb_snapshots 65,537": field(60, "I", 65_537),
    "40 snapshot table unaligned": lambda image: image.put(60, "IQ", 1, 0x10200),
    "40 snapshot table unaligned, and empty": field(64, "Q", 0x10200),
    "42 unknown incompatible bit 5": incompatible(5),
    "43 unknown incompatible bit 63": incompatible(63),
    "47 compression bit, type 0": incompatible(3),
    "48 compression type 1, no bit": field(104, "B", 1),
    "49 compression type 2": lambda image: (incompatible(3)(image), image.put(104, "B", 2)),
    "54 raw data bit, no data file": field(88, "Q", 2),
    "55 refcount_order 7": field(96, "I", 7),
    "56 refcount_order 2^32-1": field(96, "I", 2**32 - 1),
    "58 header_length 72": field(100, "I", 72),
    "59 header_length 103": field(100, "I", 103),
    "60 header_length 105": field(100, "I", 105),
    "61 header_length over a cluster": field(100, "I", CLUSTER + 8),
    "62 header_length 2^31-1": field(100, "I", 2**31 - 1),
    "63 extension past the cluster": extension_length(CLUSTER),
    "64 extension 2^31-1": extension_length(2**31 - 1),
    "65 extension 2^32-1": extension_length(2**32 - 1),
    "65 end marker past the cluster": lambda image: image.put(112, "II", 0, CLUSTER),
    "66 nothing but extensions": lambda image: image.put(
        112, f"{(CLUSTER - 112) // 4}I", *([7, 0] * ((CLUSTER - 112) // 8))
    ),
    "67 backing format of 20 bytes": extension(layout.EXTENSION_BACKING_FORMAT, b"r" * 20),
    "69 an extension twice": lambda image: image.extensions(
        (layout.EXTENSION_BACKING_FORMAT, b"raw"), (layout.EXTENSION_BACKING_FORMAT, b"qcow2")
    ),
    "82 backing name of 1,024": backing(b"n" * 1024),
    "83 backing name 2^32-1": backing(b"", length=2**32 - 1),
    "84 backing past the first cluster": backing(b"name", offset=CLUSTER + 8),
    "84 backing over the first cluster's end": backing(b"", offset=CLUSTER - 4, length=8),
    "85 backing inside the header": backing(b"name", offset=64),
    "87 backing name with NUL": backing(b"na\0me"),
    "data file name with NUL": lambda image: (
        incompatible(2)(image),
        image.extensions((layout.EXTENSION_DATA_FILE, b"da\0ta")),
    ),
}


@pytest.mark.parametrize("damage", REFUSED.values(), ids=REFUSED)
def test_refused_at_open(plain: Image, damage: Damage) -> None:
    damage(plain)
    for writable in (False, True):
        with (
            pytest.raises((InvalidImageError, UnsupportedFeatureError)) as caught,
            open_bytes(plain.data, writable=writable),
        ):
            pass
        assert "underlay" not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


def test_extended_entries_need_large_clusters(make: Callable[..., Image]) -> None:
    image = make("cluster_size=8k")
    incompatible(4)(image)
    with pytest.raises(CorruptImageError), open_bytes(image.data):
        pass


def test_encryption_is_refused_by_name(plain: Image) -> None:
    with (
        pytest.raises(UnsupportedFeatureError, match="LUKS") as caught,
        open_bytes(plain.put(32, "I", 2).data),
    ):
        pass
    assert caught.value.feature == "encryption (LUKS)"


def test_an_unknown_feature_is_named_by_the_images_own_table(plain: Image) -> None:
    incompatible(5)(plain)
    incompatible(9)(plain)
    plain.extensions(
        (layout.EXTENSION_FEATURE_NAMES, layout.FEATURE_NAME.pack(0, 5, b"time travel"))
    )
    with pytest.raises(UnsupportedFeatureError) as caught, open_bytes(plain.data):
        pass
    assert caught.value.feature == "time travel, Unknown incompatible feature: 200"
    assert "Unsupported qcow2 feature(s): time travel" in str(caught.value)


def test_an_unknown_feature_is_named_even_if_the_rest_makes_no_sense(plain: Image) -> None:
    incompatible(5)(plain)
    plain.put(36, "I", 2**32 - 1).put(32, "I", 3)
    with (
        pytest.raises(UnsupportedFeatureError, match="Unknown incompatible"),
        open_bytes(plain.data),
    ):
        pass


# -- harmless

HARMLESS: dict[str, Damage] = {
    "44 dirty": incompatible(0),
    "45 corrupt": incompatible(1),
    "51 unknown compatible bit": field(80, "Q", 1 << 40),
    "52 unknown autoclear bit": field(88, "Q", 1 << 40),
    "53 bitmaps bit without bitmaps": field(88, "Q", 1),
    "57 refcount_order 3 on 16 bits": field(96, "I", 3),
    "68 feature names of 50 bytes": extension(layout.EXTENSION_FEATURE_NAMES, bytes(50)),
    "70 bitmaps extension of 23 bytes": lambda image: (
        image.extensions((layout.EXTENSION_BITMAPS, bytes(23))),
        image.put(88, "Q", 1),
    ),
    **{
        f"{number} bitmaps: {what}": bitmaps(*fields)
        for number, what, fields in (
            (71, "none", (0, 0, 32, CLUSTER)),
            (72, "65,536", (65_536, 0, 32, CLUSTER)),
            (73, "reserved", (1, 1, 32, CLUSTER)),
            (74, "unaligned", (1, 0, 32, CLUSTER + 512)),
            (75, "2^40 bytes", (1, 0, 1 << 40, CLUSTER)),
            (76, "past the end", (1, 0, 32, 1 << 40)),
        )
    },
    "124 compressed with COPIED": lambda image: image.put(
        image.l2(3), "Q", image.word(image.l2(3)) | COPIED
    ),
    "125 reftable entry unaligned": lambda image: image.put(0x10000, "Q", 0x20200),
    "126 reftable entry past the end": lambda image: image.put(0x10000, "Q", 1 << 40),
    "127 reftable entry reserved": lambda image: image.put(0x10000, "Q", 0x20001),
    "129 reftable entry 0": lambda image: image.put(0x10000, "Q", 0),
    "130 refblock all zero": lambda image: image.put(image.refcount_block(), "8192Q", *[0] * 8192),
    "109 no COPIED": lambda image: image.put(image.l2(1), "Q", image.word(image.l2(1)) & ~COPIED),
    "unknown extension": extension(0x12345678, b"unknown"),
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
    "29 reftable offset 0": field(48, "Q", 0),
    "31 reftable past the end": field(48, "Q", 1 << 40),
    "36 reftable over the L1 table": field(48, "Q", 0x30000),
    "39 one snapshot, offset 0": field(60, "I", 1),
    "41 snapshot table past the end": lambda image: image.put(60, "IQ", 1, 1 << 40),
    "45 corrupt": incompatible(1),
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


def test_a_snapshot_is_read_only(snapshotted: Image) -> None:
    with (
        pytest.raises(ReadOnlyError),
        open_bytes(snapshotted.data, writable=True, snapshot="first"),
    ):
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


def test_a_disk_of_no_bytes_opens(make: Callable[..., Image]) -> None:
    with open_bytes(make("compat=1.1", "0").data) as disk:
        assert disk.size() == 0
        assert disk.locate(0) is None
        assert mappings(disk) == []


def test_a_size_that_is_no_multiple_of_anything_is_kept(plain: Image) -> None:
    plain.put(24, "Q", (1 << 20) + 17)
    with open_bytes(plain.data) as disk:
        assert disk.size() == (1 << 20) + 17
        assert sum(mapping.length for _, mapping in mappings(disk)) == (1 << 20) + 17


def test_limits_are_kept(plain: Image) -> None:
    with (
        pytest.raises(LimitExceededError) as caught,
        open_bytes(plain.data, limits=Limits(virtual_size=1 << 20)),
    ):
        pass
    assert caught.value.limit == "virtual_size"
    with open_bytes(plain.data, limits=Limits(decoded_unit=CLUSTER - 1)) as disk:
        assert read(disk, 0, 1) == b"\x11"
        with pytest.raises(LimitExceededError):
            read(disk, 3 * CLUSTER, 1)


def test_nothing_that_the_header_can_say_ends_otherwise_than_in_an_error_of_ours(
    plain: Image, extended: Image
) -> None:
    """Every field at every border value: no other exception, no hang, no great allocation."""
    values = [0, 1, 2, 7, 8, 511, 512, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
    for image in (plain, extended):
        for offset, width in [(4 * at, "I") for at in range(28)] + [
            (8 * at, "Q") for at in range(14)
        ]:
            for value in values:
                damaged = image.copy()
                if width == "I" and value >= 1 << 32:
                    continue
                damaged.put(offset, width, value)
                try:
                    with open_bytes(damaged.data) as disk:
                        read(disk, 0, 4096)
                except UnderlayError:
                    pass
