"""Emptying an image as a whole: what is read afterwards, and what is left of the file."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import underlay
from underlay.capabilities import BitmapStore, Emptiable, Snapshottable
from underlay.errors import ConflictError, UnsupportedOperationError
from underlay.storage import PreallocateMode
from underlay.testing.wrappers import WrappedStorage
from underlay_drivers.qcow2 import writeback
from underlay_storage.memory import MemoryStorage

from .ends import LAYOUTS, Ends, pattern

SIZE = 6 << 20
WHOLE = [layout for layout in LAYOUTS if "raw" not in layout]


@pytest.mark.parametrize("backed", [True, False])
@pytest.mark.parametrize("layout", WHOLE)
def test_the_disk_goes_on_with_nothing_of_its_own(ends: Ends, layout: str, backed: bool) -> None:
    below = pattern(SIZE // 2) if backed else b""
    ends.create(SIZE, theirs=True, below=below, **LAYOUTS[layout])
    empty = bytes(ends.model)
    ends.they_write(10_240, 3 << 20, 1)
    with ends.open() as disk:
        disk.write(b"two" * 99, 4 << 20)
        disk.capability(Emptiable).make_empty()
        assert disk.read_bytes(0, SIZE) == empty
        assert ends.path.stat().st_size <= 5 * ends.header.cluster_size + SIZE // 512
        ends.qemu_img("check", "-q", "-U", ends.path)
        ends.write(disk, 700, b"three" * 9999)
        disk.write_zeroes(1 << 20, 1 << 20)
        ends.put(1 << 20, bytes(1 << 20))
        disk.flush()
        disk.capability(Emptiable).make_empty()
        ends.model[:] = empty
        ends.write(disk, 5 << 20, b"four" * 9999)
    ends.agree()


def test_a_long_refcount_table_becomes_short(ends: Ends) -> None:
    ends.create(SIZE, cluster_size=512, refcount_bits=64)
    with ends.open() as disk:
        disk.write(pattern(SIZE), 0)
        disk.flush()
        long = ends.header.refcount_table_clusters
        disk.capability(Emptiable).make_empty()
    assert ends.header.refcount_table_clusters < long
    assert ends.path.stat().st_size < 64 << 10
    ends.agree()


@pytest.mark.parametrize("size", [0, 512])
def test_a_disk_of_hardly_any_bytes_is_emptied(ends: Ends, size: int) -> None:
    ends.create(size)
    with ends.open() as disk:
        disk.write(b"1" * size, 0)
        disk.capability(Emptiable).make_empty()
    ends.agree()


@pytest.mark.parametrize("kept", ["snapshot", "bitmap", "raw data file"])
def test_what_keeps_something_else_is_refused(ends: Ends, kept: str) -> None:
    ends.create(SIZE, **LAYOUTS["raw data file" if kept == "raw data file" else "v3"])
    with ends.open() as disk:
        ends.write(disk, 100, pattern(9999))
        if kept == "snapshot":
            disk.capability(Snapshottable).create_snapshot("kept")
        if kept == "bitmap":
            disk.capability(BitmapStore).add_bitmap("kept")
        with pytest.raises(UnsupportedOperationError, match="cannot be made empty"):
            disk.capability(Emptiable).make_empty()
    ends.agree()


def test_whoever_uses_a_mapping_for_long_keeps_all_of_it(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writeback, "_LONGEST_LEASE", 0.01)
    ends.create(SIZE, below=pattern(SIZE))
    with ends.open() as disk:
        ends.write(disk, 100, pattern(99_999, 2))
        disk.flush()
        before = ends.path.read_bytes()
        with disk.lease(), pytest.raises(ConflictError, match="holds a lease"):
            disk.capability(Emptiable).make_empty()
        assert ends.path.read_bytes() == before
        assert disk.read_bytes(0, SIZE) == ends.model
    ends.agree()


def test_whoever_reads_meanwhile_sees_what_was_there_or_what_is_below(ends: Ends) -> None:
    ends.create(SIZE, below=b"b" * SIZE, cluster_size=4096)
    wrong: list[bytes] = []
    stop = threading.Event()

    def read(disk: underlay.SyncFormatAccess) -> None:
        offset = 0
        while not stop.is_set():
            data = disk.read_bytes(offset, 4096)
            if data not in {b"a" * 4096, b"b" * 4096}:
                wrong.append(data)
            offset = (offset + 40_960) % SIZE

    with ends.open() as disk:
        readers = [threading.Thread(target=read, args=(disk,)) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for _ in range(5):
                disk.write(b"a" * (2 << 20), 0)
                disk.capability(Emptiable).make_empty()
        finally:
            stop.set()
            for reader in readers:
                reader.join()
    assert not wrong


class Device(WrappedStorage):
    """Of one size for ever."""

    def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        """Refused."""
        raise UnsupportedOperationError("a device has one size")


def test_a_device_gives_its_space_back_and_stays_as_long() -> None:
    memory = MemoryStorage(b"")
    options: dict[str, Any] = {"cluster_size": 4096}
    with underlay.create(memory, size=SIZE, **options) as disk:
        disk.write(pattern(1 << 20), 0)
    memory.resize(4 << 20)
    with underlay.open_image(Device(memory), format="qcow2", writable=True) as disk:
        disk.capability(Emptiable).make_empty()
        disk.write(b"on", 0)
    assert memory.size() == 4 << 20
    rest = bytearray(3 << 20)
    memory.readv((rest,), 1 << 20)
    assert not any(rest)
