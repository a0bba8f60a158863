"""What fuzzing has found, each under its name, so that it is not found again."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable

import pytest

import underlay
from underlay import jobs
from underlay.capabilities import Amendable
from underlay.errors import CorruptImageError
from underlay_storage.memory import MemoryStorage

from ..bases import Bases
from ..editing import Image
from .fields import fields

_TABLE = "bitmap bitmap_table_offset"
_SIZE = "bitmap_directory_size"


@pytest.fixture
def plain(bases: Bases) -> Image:
    return bases["plain"].image()


def test_another_refcount_width_where_no_refcount_is_left(plain: Image) -> None:
    """Once an ``IndexError``."""
    plain.put(plain.header.refcount_table_offset, "Q", 0)
    before = bytes(plain.data)
    target = MemoryStorage(before)
    with (
        pytest.raises(CorruptImageError, match="reference count"),
        underlay.open_image(target, format="qcow2", writable=True) as disk,
    ):
        disk.capability(Amendable).amend({"refcount_bits": 8})


@pytest.mark.parametrize("size", [0x20000, 0x7FFF_FFFF])
def test_the_size_of_a_backing_name_that_is_not_there(plain: Image, size: int) -> None:
    """Once, a new header zeroed so many bytes of the image, or asked for so much memory."""
    plain.put(16, "I", size)
    target = MemoryStorage(bytes(plain.data))
    with underlay.open_image(target, format="qcow2", writable=True) as disk:
        content = disk.read_bytes(0, disk.size)
        disk.capability(Amendable).amend({"compat": "v2", "lazy_refcounts": False})
        assert disk.read_bytes(0, disk.size) == content
    assert not jobs.check(target).corruptions


def test_a_bitmap_table_inside_a_cluster(bases: Bases) -> None:
    """Once taken for sound by a check, though neither QEMU nor we can use the bitmap."""
    image = bases["bitmaps"].image()
    (place, *_) = (field.offset for field in fields(image.data) if field.name == _TABLE)
    image.put(place, "Q", image.word(place) + 1)
    found = jobs.check(MemoryStorage(bytes(image.data))).findings
    assert [finding for finding in found if "starts no cluster" in finding.what]


@pytest.mark.parametrize("end", [0x30000, 0x30004, 0x2FE00])
def test_a_file_that_ends_before_or_in_its_l1_table(plain: Image, end: int) -> None:
    """Once sound for a check, which then showed an empty disk, and refused by every open."""
    del plain.data[end:]
    target = MemoryStorage(bytes(plain.data))
    with pytest.raises(CorruptImageError, match="L1 table"):
        underlay.open_image(target, format="qcow2")
    assert jobs.check(target).corruptions


@pytest.mark.parametrize("use", [underlay.inspect, jobs.check])
def test_snapshots_by_the_ten_thousands_past_the_end(
    plain: Image, use: Callable[[MemoryStorage], object]
) -> None:
    """Once a second for each 8,192 of them: they are 40 zeroes each, and take no room."""
    plain.put(60, "IQ", 65_536, len(plain.data) + -len(plain.data) % plain.cluster)
    began = time.process_time()
    use(MemoryStorage(bytes(plain.data)))
    assert time.process_time() - began < 5


def test_a_bitmap_directory_larger_than_the_file(bases: Bases) -> None:
    """Once, a write looked up each of the two million clusters that it was said to have."""
    image = bases["bitmaps"].image()
    (place,) = (field.offset for field in fields(image.data) if field.name == _SIZE)
    image.put(place, "Q", 128 << 30)
    began = time.process_time()
    with underlay.open_image(
        MemoryStorage(bytes(image.data)), format="qcow2", writable=True
    ) as disk:
        disk.write(b"new", 3 << 20)
    assert time.process_time() - began < 0.5


def test_a_check_holds_no_more_of_a_table_than_the_file_has(plain: Image) -> None:
    """Once 150 MiB for the 32 MiB that an L1 table was said to have."""
    plain.put(36, "I", 4 << 20)
    target = MemoryStorage(bytes(plain.data))
    jobs.check(target)
    tracemalloc.start()
    try:
        jobs.check(target)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The table itself is held once, as it is for every use.
    assert peak < 40 << 20


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_repair_keeps_what_goes_on_past_the_end_of_the_file(rebuilt: bool) -> None:
    """A snapshot's wrong length once gave the cluster away in which the snapshot table begins."""
    target = MemoryStorage()
    with underlay.create(target, format="qcow2", size="64k", cluster_size=512) as disk:
        disk.write(b"data", 0)
        jobs.create_snapshot(disk, "first")
    image = _image_of(target)
    at = image.header.snapshots_offset
    image.put(at + 12, "H", 0xFFFF)  # of its id
    if rebuilt:
        image.put(image.header.refcount_table_offset + 8, "Q", 1)
    target = MemoryStorage(bytes(image.data))
    # New structures are put behind it, so that the file does not end in it any more.
    assert bool(jobs.repair(target).corruptions) is not rebuilt
    repaired = _image_of(target)
    assert (repaired.refcount_block() == image.refcount_block()) is not rebuilt
    assert struct.unpack_from(">H", repaired.data, repaired.count(at)) == (1,)


def _image_of(storage: MemoryStorage) -> Image:
    buffer = bytearray(storage.size())
    storage.readv((buffer,), 0)
    return Image(bytes(buffer))
