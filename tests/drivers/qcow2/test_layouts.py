"""Subclusters and external data files, read as QEMU reads them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from underlay.errors import CorruptImageError, OptionError
from underlay.gate import ReferenceKind
from underlay.mapping import Data, Zero
from underlay_storage.memory import MemoryStorage

from .conftest import Maker, Tool
from .images import Image, mappings, open_bytes, read

CLUSTER = 64 << 10
COPIED = 1 << 63


def test_subclusters_are_told_apart(extended: Image) -> None:
    with open_bytes(extended.data) as disk:
        found = [(at, mapping.length, type(mapping)) for at, mapping in mappings(disk)]
        assert found == [
            (0, 8 << 10, Data),
            (8 << 10, 8 << 10, Zero),
            (16 << 10, 4 << 10, Zero),
            (20 << 10, 44 << 10, Zero),
            (64 << 10, (4 << 20) - (64 << 10), Zero),
        ]
        zeroes = [mapping for _, mapping in mappings(disk) if isinstance(mapping, Zero)]
        assert [zero.explicit for zero in zeroes] == [False, True, False, False]
        assert [zero.offset is not None for zero in zeroes] == [True, True, True, False]
        location = disk.locate(1000)
        assert location is not None
        assert location[2] == (8 << 10) - 1000
        assert disk.locate(9 << 10) is None


@pytest.mark.parametrize("seed", range(3))
def test_any_pattern_of_subclusters_is_read_as_qemu_reads_it(
    qemu_img: Tool, qemu_io: Tool, tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    path, plain = tmp_path / "image", tmp_path / "plain"
    size = 1 << 20
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=16k", path, "1M")
    commands: list[str] = []
    for _ in range(80):
        offset, length = dice.randrange(size // 512) * 512, dice.randrange(1, 40) * 512
        length = min(length, size - offset)
        what = dice.choice(["write -P {}", "write -P {}", "write -z", "write -z -u", "discard"])
        commands += ["-c", f"{what.format(dice.randrange(1, 255))} {offset} {length}"]
    qemu_io("-f", "qcow2", *commands, path)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, plain)
    with open_bytes(path.read_bytes()) as disk:
        assert read(disk, 0, size) == plain.read_bytes()


def test_a_data_file_must_be_given(with_data_file: Image) -> None:
    with open_bytes(with_data_file.data) as disk:
        assert disk.requires_external_data_file()
        (reference,) = disk.references()
        assert reference.kind is ReferenceKind.DATA_FILE
        assert reference.name == disk.implicit_external_data_file()
        with pytest.raises(OSError, match="data file is not attached"):
            read(disk, 0, 1)
        assert disk.locate(0) is None
        # What is in no file needs none.
        assert read(disk, 3 << 20, 10) == bytes(10)


def test_a_data_file_holds_each_byte_at_its_own_offset(with_data_file: Image) -> None:
    data = MemoryStorage(b"\x11" * CLUSTER + b"\x99" * CLUSTER + b"\x33" * 1000)
    with open_bytes(with_data_file.data) as disk:
        disk.set_data_file(data)
        assert disk.references() == []
        assert len(disk.collect_storage_dependencies()) == 2
        assert read(disk, 0, CLUSTER) == b"\x11" * CLUSTER
        assert read(disk, CLUSTER, CLUSTER) == bytes(CLUSTER)
        # Past the data file's end are zeroes.
        assert read(disk, 2 * CLUSTER, CLUSTER) == b"\x33" * 1000 + bytes(CLUSTER - 1000)
        location = disk.locate(2 * CLUSTER + 7)
        assert location is not None
        assert location[1] == 2 * CLUSTER + 7


def test_a_data_file_without_a_name_is_asked_for_all_the_same(with_data_file: Image) -> None:
    with_data_file.extensions()
    with open_bytes(with_data_file.data) as disk:
        assert [reference.name for reference in disk.references()] == [""]
        assert disk.implicit_external_data_file() is None


def test_only_who_needs_a_data_file_takes_one(plain: Image) -> None:
    with open_bytes(plain.data) as disk:
        disk.set_data_file(None)
        with pytest.raises(OptionError):
            disk.set_data_file(MemoryStorage(b""))


@pytest.mark.parametrize(
    "entry",
    [COPIED | 2 * CLUSTER, 2 * CLUSTER, COPIED, COPIED | 2 * CLUSTER | 1, 1 << 62 | CLUSTER],
)
def test_elsewhere_in_the_data_file_is_damage(with_data_file: Image, entry: int) -> None:
    with_data_file.put(with_data_file.l2(1), "Q", entry)
    with open_bytes(with_data_file.data) as disk:
        disk.set_data_file(MemoryStorage(b"\x11" * 4 * CLUSTER))
        assert read(disk, 0, 1) == b"\x11"
        assert disk.locate(CLUSTER) is None
        with pytest.raises(CorruptImageError):
            read(disk, CLUSTER, 1)


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10,cluster_size=512",
        "cluster_size=2M,refcount_bits=1",
        "refcount_bits=64,cluster_size=1k",
        "lazy_refcounts=on",
    ],
)
def test_scattered_data_is_read_whatever_the_clusters(make: Maker, options: str) -> None:
    image = make(options, "5M", "write -P 5 100k 70k", "write -P 6 3000k 1", "write -P 7 5M 0")
    expected = bytearray(5 << 20)
    expected[100 << 10 : 170 << 10] = b"\x05" * (70 << 10)
    expected[3000 << 10] = 6
    with open_bytes(image.data) as disk:
        assert read(disk, 0, 5 << 20) == expected
