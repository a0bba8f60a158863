"""What fuzzing has found, each under its name, so that it is not found again."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

import underlay
from underlay import checking
from underlay.capabilities import Amendable
from underlay.errors import CorruptImageError
from underlay_storage.memory import MemoryStorage

from ..bases import Bases
from ..editing import Image


@pytest.fixture
def plain(bases: Bases) -> Image:
    return bases["plain"].image()


def test_another_refcount_width_where_no_refcount_is_left(plain: Image) -> None:
    """Once an ``IndexError``."""
    plain.put(plain.header.refcount_table_offset, "Q", 0)
    before = bytes(plain.data)
    target = MemoryStorage(before)
    with underlay.open_image(target, format="qcow2", writable=True) as disk:
        ability = disk.capability(Amendable)
        with pytest.raises(CorruptImageError, match="reference count"):
            ability.amend({"refcount_bits": 8})


def test_a_bitmap_table_inside_a_cluster(bases: Bases) -> None:
    """Once taken for sound by a check, though neither QEMU nor we can use the bitmap."""
    image = bases["bitmaps"].image()
    extension = image.header.bitmaps
    assert extension is not None
    image.put(extension.directory_offset, "Q", image.word(extension.directory_offset) + 1)
    assert checking.check(MemoryStorage(bytes(image.data))).corruptions == 1


@pytest.mark.parametrize("end", [0x30000, 0x30004, 0x2FE00])
def test_a_file_that_ends_before_or_in_its_l1_table(plain: Image, end: int) -> None:
    """Once sound for a check, which then showed an empty disk, and refused by every open."""
    del plain.data[end:]
    target = MemoryStorage(bytes(plain.data))
    with pytest.raises(CorruptImageError, match="L1 table"):
        underlay.open_image(target, format="qcow2")
    assert checking.check(target).corruptions


@pytest.mark.parametrize("use", [underlay.inspect, checking.check])
def test_snapshots_by_the_ten_thousands_past_the_end(
    plain: Image, use: Callable[[MemoryStorage], object]
) -> None:
    """Once a second for each 8,192 of them: they are 40 zeroes each, and take no room."""
    plain.put(60, "IQ", 65_536, len(plain.data) + -len(plain.data) % plain.cluster)
    began = time.process_time()
    use(MemoryStorage(bytes(plain.data)))
    assert time.process_time() - began < 2
