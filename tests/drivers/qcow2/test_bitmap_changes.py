"""Adding, removing, clearing, enabling, disabling and merging bitmaps, beside QEMU."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

import underlay
from underlay import jobs
from underlay.capabilities import BitmapStore
from underlay.errors import (
    ConflictError,
    CorruptImageError,
    OptionError,
    OutOfRangeError,
    ReadOnlyError,
    UnderlayError,
    UnsupportedOperationError,
)
from underlay.jobs.check import check
from underlay.storage import WriteBuffers
from underlay.testing.wrappers import WrappedStorage
from underlay_storage.memory import MemoryStorage

from .bitmapping import Model, dirty, their_dirty
from .ends import Ends

#: Images of every kind.
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small clusters": {"cluster_size": 512},
    "large clusters": {"cluster_size": 2 << 20},
    "extended": {"extended_l2": True},
    "narrow counts": {"refcount_bits": 1},
    "wide counts": {"refcount_bits": 64, "cluster_size": 4096},
    "external": {"data_file": "data.raw"},
    "long names": {"below": b"x", "cluster_size": 4096},
}
SIZE = (3 << 20) + 512


def listed(ends: Ends) -> list[dict[str, Any]]:
    """The bitmaps, as QEMU tells."""
    found: list[dict[str, Any]] = ends.info()["format-specific"]["data"].get("bitmaps", [])
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_qemu_takes_what_we_add_change_and_remove(ends: Ends, shape: str) -> None:
    ends.create(SIZE, **SHAPES[shape])
    jobs.add_bitmap(ends.path, "one", granularity=4096)
    jobs.add_bitmap(ends.path, "two", granularity=65536, enabled=False)
    jobs.add_bitmap(ends.path, "three")
    assert [(one["name"], one["granularity"], one["flags"]) for one in listed(ends)] == [
        ("one", 4096, ["auto"]),
        ("two", 65536, []),
        ("three", min(max(ends.header.cluster_size, 4096), 65536), ["auto"]),
    ]
    ends.agree()

    ends.they_write(5000, 100, 1)
    ends.they_write(1 << 20, 70_000, 2)
    ends.they_write(SIZE - 512, 512, 3)
    model = Model(SIZE, 4096)
    for written in ((5000, 100), (1 << 20, 70_000), (SIZE - 512, 512)):
        model.write(*written)
    assert dirty(ends.path, "one") == model.ranges()
    assert dirty(ends.path, "two") == []

    jobs.merge_bitmap(ends.path, "two", "one")
    jobs.disable_bitmap(ends.path, "one")
    jobs.enable_bitmap(ends.path, "two")
    jobs.clear_bitmap(ends.path, "three")
    coarse = Model(SIZE, 65536)
    for run in model.ranges():
        coarse.write(*run)
    assert dirty(ends.path, "two") == coarse.ranges()
    assert dirty(ends.path, "three") == []
    assert [one["flags"] for one in listed(ends)] == [[], ["auto"], ["auto"]]
    ends.agree()

    jobs.remove_bitmap(ends.path, "one")
    assert [one["name"] for one in listed(ends)] == ["two", "three"]
    jobs.remove_bitmap(ends.path, "three")
    jobs.remove_bitmap(ends.path, "two")
    assert listed(ends) == []
    assert ends.header.autoclear_features & 1 == 0
    ends.agree()


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_what_we_merge_is_what_qemu_serves(
    ends: Ends, qemu: Callable[[str], str], cluster_size: int
) -> None:
    """Between all granularities, whole runs of clusters of bits included."""
    chance = random.Random(cluster_size)
    size = 40 << 20
    ends.create(size, cluster_size=cluster_size)
    for shift in (9, 12, 16):
        jobs.add_bitmap(ends.path, f"from{shift}", granularity=1 << shift)
    writes = [(chance.randrange(size // 512) * 512, 512 * chance.randint(1, 9)) for _ in range(9)]
    writes = [(at, min(length, size - at)) for at, length in writes]
    writes.append((8 << 20, 20 << 20))
    ends.they(*(f"write -q -z {at} {length}" for at, length in writes))
    for shift in (9, 12, 16):
        jobs.disable_bitmap(ends.path, f"from{shift}")
    for shift, source in ((9, 16), (16, 9), (12, 12)):
        name = f"to{shift}"
        jobs.add_bitmap(ends.path, name, granularity=1 << shift, enabled=False)
        jobs.merge_bitmap(ends.path, name, f"from{source}")
        fine, coarse = Model(size, 1 << source), Model(size, 1 << shift)
        for run in writes:
            fine.write(*run)
        for run in fine.ranges():
            coarse.write(*run)
        assert dirty(ends.path, name) == coarse.ranges()
        assert their_dirty(qemu, ends.path, name) == coarse.ranges()
        # Once more changes nothing.
        before = ends.path.read_bytes()
        jobs.merge_bitmap(ends.path, name, f"from{source}")
        assert ends.path.read_bytes() == before
    # QEMU goes on with them.
    ends.qemu_img("bitmap", "--add", "--merge", "to9", "--merge", "to16", ends.path, "all")
    jobs.disable_bitmap(ends.path, "all")
    both = Model(size, 65536 if cluster_size > 4096 else 4096)
    for name in ("to9", "to16"):
        for run in dirty(ends.path, name):
            both.write(*run)
    assert dirty(ends.path, "all") == both.ranges()
    ends.agree()


def test_a_bitmap_of_another_image_is_merged(ends: Ends, tmp_path: Any) -> None:
    ends.create(SIZE, theirs=True)
    other = tmp_path / "other.qcow2"
    ends.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", other, SIZE)
    ends.qemu_img("bitmap", "--add", "-g", "512", other, "theirs")
    ends.qemu_io("-f", "qcow2", "-c", "write -q 513 1", "-c", "write -q 1M 64k", other)
    jobs.add_bitmap(ends.path, "ours", granularity="128k")
    jobs.merge_bitmap(ends.path, "ours", "theirs", source_image=other)
    assert dirty(ends.path, "ours") == [(0, 128 << 10), (1 << 20, 128 << 10)]
    with ends.open() as disk, ends.open(writable=False, lock=False) as same:
        # Disks, and capabilities, as well as names.
        store = disk.capability(BitmapStore)
        store.add_bitmap("again", granularity=512)
        store.merge_bitmap("again", "ours", same.capability(BitmapStore))
    assert dirty(ends.path, "again") == dirty(ends.path, "ours")
    ends.qemu_img("create", "-q", "-f", "qcow2", other, SIZE + 512)
    ends.qemu_img("bitmap", "--add", other, "theirs")
    with pytest.raises(ConflictError, match=r"destination size is \d+, source size is"):
        jobs.merge_bitmap(ends.path, "ours", "theirs", source_image=other)
    ends.agree()


def test_a_bitmap_that_was_not_saved_can_only_be_removed(ends: Ends) -> None:
    ends.create(theirs=True)
    jobs.add_bitmap(ends.path, "lost")
    jobs.add_bitmap(ends.path, "well")
    directory = next(e for e in ends.header.extensions if e.type == 0x23852875).data
    ends.poke(struct.unpack_from(">Q", directory, 16)[0] + 12, "I", 3)
    assert [one.in_use for one in jobs.bitmaps(ends.path)] == [True, False]
    before = ends.path.read_bytes()
    refused: list[Callable[[], object]] = [
        lambda: jobs.clear_bitmap(ends.path, "lost"),
        lambda: jobs.enable_bitmap(ends.path, "lost"),
        lambda: jobs.disable_bitmap(ends.path, "lost"),
        lambda: jobs.merge_bitmap(ends.path, "lost", "well"),
        lambda: jobs.merge_bitmap(ends.path, "well", "lost"),
        lambda: dirty(ends.path, "lost"),
    ]
    for call in refused:
        with pytest.raises(ConflictError, match="inconsistent"):
            call()
    assert ends.path.read_bytes() == before
    jobs.remove_bitmap(ends.path, "lost")
    ends.agree()


WRONG: list[tuple[type[UnderlayError], str, Callable[[Any], object]]] = [
    (OptionError, "cannot be empty", lambda store: store.add_bitmap("")),
    (OptionError, "exceeds maximum", lambda store: store.add_bitmap("x" * 1024)),
    (OptionError, "power of 2", lambda store: store.add_bitmap("a", granularity=513)),
    (OptionError, "power of 2", lambda store: store.add_bitmap("a", granularity=256)),
    (OptionError, "power of 2", lambda store: store.add_bitmap("a", granularity=4 << 30)),
    (ConflictError, "already exists", lambda store: store.add_bitmap("there")),
    (OptionError, "not found", lambda store: store.remove_bitmap("gone")),
    (OptionError, "not found", lambda store: store.merge_bitmap("there", "gone")),
    (OptionError, "not found", lambda store: store.dirty_ranges("gone")),
    (OutOfRangeError, "no guest offset", lambda store: store.dirty_ranges("there", 2 << 20)),
]


@pytest.mark.parametrize(("error", "why", "call"), WRONG)
def test_what_cannot_be_is_refused_and_changes_nothing(
    ends: Ends, error: type[UnderlayError], why: str, call: Callable[[Any], object]
) -> None:
    ends.create()
    jobs.add_bitmap(ends.path, "there")
    before = ends.path.read_bytes()
    with ends.open() as disk, pytest.raises(error, match=why):
        call(disk.capability(BitmapStore))
    assert ends.path.read_bytes() == before


def test_images_that_can_have_none_say_so(ends: Ends) -> None:
    ends.create(compat="v2")
    with pytest.raises(UnsupportedOperationError, match="v2 files"):
        jobs.add_bitmap(ends.path, "a")
    ends.create(0)
    with pytest.raises(UnsupportedOperationError, match="no bytes"):
        jobs.add_bitmap(ends.path, "a")
    ends.create()
    with ends.open(writable=False) as disk, pytest.raises(ReadOnlyError):
        jobs.add_bitmap(disk, "a")


@pytest.mark.parametrize("word", [1 << 40, 1 << 16 | 1, 1 << 60, 0x10200, 0x10000])
def test_a_table_that_makes_no_sense_costs_the_bitmap_alone(ends: Ends, word: int) -> None:
    ends.create(theirs=True)
    jobs.add_bitmap(ends.path, "odd")
    jobs.add_bitmap(ends.path, "well")
    directory = next(e for e in ends.header.extensions if e.type == 0x23852875).data
    table = ends.word(struct.unpack_from(">Q", directory, 16)[0])
    ends.poke(table, "Q", word)
    before = ends.path.read_bytes()
    with pytest.raises(CorruptImageError):
        jobs.remove_bitmap(ends.path, "odd")
    assert ends.path.read_bytes() == before
    jobs.clear_bitmap(ends.path, "well")
    jobs.remove_bitmap(ends.path, "well")
    assert ends.header.incompatible_features == 0


def test_a_terabyte_of_granules_takes_little_memory(ends: Ends) -> None:
    """The ranges come in portions, however many there are."""
    ends.qemu_img("create", "-q", "-f", "qcow2", ends.path, "1T")
    jobs.add_bitmap(ends.path, "fine", granularity=65536)
    with ends.open() as disk:
        store = disk.capability(BitmapStore)
        for number in range(0, 20_000, 2):
            disk.write_zeroes(number * 65536, 65536)
        first = store.dirty_ranges("fine")
        assert first.size == 1 << 40
        assert 4096 <= len(first.ranges) < 100_000
    assert len(dirty(ends.path, "fine")) == 10_000
    ends.qemu_img("check", "-q", ends.path)


def test_the_refcount_table_may_move_for_a_bitmap(ends: Ends) -> None:
    """With 512-byte clusters and 64 bits a count, a table of one cluster ends at 2 MiB."""
    ends.create(8 << 20, cluster_size=512, refcount_bits=64)
    with ends.open(writable=True) as disk:
        disk.write(b"x" * (1981 << 10), 0)
    tables = set[int]()
    for number in range(5):
        with ends.open(writable=True) as disk:
            disk.write(b"y" * 512, (1981 << 10) + number * 512)
        tables.add(ends.header.refcount_table_offset)
        jobs.add_bitmap(ends.path, "new")
        tables.add(ends.header.refcount_table_offset)
        ends.qemu_img("check", "-q", ends.path)
        jobs.remove_bitmap(ends.path, "new")
    assert len(tables) > 1


class Interrupted(WrappedStorage):
    """Somebody presses Ctrl-C just as a write or a sync has been done, the one of this number."""

    def __init__(self, content: bytes, number: int) -> None:
        super().__init__(MemoryStorage(content))
        self.left = number

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        super().writev(buffers, offset)
        self._count()

    def sync(self) -> None:
        super().sync()
        self._count()

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("change", [jobs.clear_bitmap, jobs.disable_bitmap, jobs.remove_bitmap])
def test_an_interrupt_of_a_change_harms_nothing(ends: Ends, change: Callable[..., None]) -> None:
    """Nothing is given back that the directory may lead to, and be given to another."""
    ends.create(SIZE, cluster_size=4096)
    jobs.add_bitmap(ends.path, "b", granularity=4096)
    with ends.open() as disk:
        disk.write(b"1" * 4096, 4096)
    before = ends.path.read_bytes()
    for number in itertools.count(1):
        storage = Interrupted(before, number)
        disk = underlay.open_image(storage, format="qcow2", writable=True)
        with suppress(KeyboardInterrupt):
            change(disk, "b")
        done, storage.left = storage.left > 0, 0
        with suppress(UnderlayError):
            disk.write(b"2" * 65536, 1 << 20)
        with suppress(UnderlayError):
            disk.close()
        assert check(storage.inner).corruptions == 0, number
        if done:
            assert number > 3
            break
