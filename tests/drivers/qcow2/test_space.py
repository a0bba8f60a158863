"""Space that is given back: when the host's file becomes smaller, and why not before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import underlay
from underlay import SyncFormatAccess
from underlay.capabilities import Snapshottable
from underlay.mapping import Data
from underlay.storage import PreallocateMode
from underlay_storage.memory import MemoryStorage

from .ends import Ends, pattern

CLUSTER = 65536
MANY = 32 * CLUSTER


@pytest.fixture
def full(ends: Ends) -> Ends:
    """32 clusters of data, and room in the disk for as many more."""
    ends.create(2 * MANY)
    with ends.open() as disk:
        ends.write(disk, 0, pattern(MANY))
    if ends.blocks < MANY:
        pytest.skip("this file system does not say how much a file takes")
    return ends


def _durable(disk: SyncFormatAccess) -> None:
    disk.flush()
    disk.sync()


@pytest.mark.parametrize("method", ["discard_to_zero", "discard_to_any", "discard_to_backing"])
def test_what_is_freed_is_punched_with_the_next_flush(full: Ends, method: str) -> None:
    before = full.blocks
    with full.open() as disk:
        getattr(disk, method)(4 * CLUSTER, 8 * CLUSTER)
        full.put(4 * CLUSTER, bytes(8 * CLUSTER))
        # Nothing is lost before it is durable that nobody needs it.
        assert full.blocks >= before
        _durable(disk)
        assert full.blocks <= before - 8 * CLUSTER
        assert disk.read_bytes(0, disk.size) == full.model
    full.agree()


def test_at_the_end_of_the_file_it_is_cut(full: Ends) -> None:
    size = full.path.stat().st_size
    with full.open() as disk:
        disk.discard_to_zero(16 * CLUSTER, 16 * CLUSTER)
    full.put(16 * CLUSTER, bytes(16 * CLUSTER))
    assert full.path.stat().st_size == size - 16 * CLUSTER
    assert full.path.stat().st_size % CLUSTER == 0
    full.agree()
    full.they_write(40 * CLUSTER, CLUSTER, 3)
    full.agree()


def test_all_of_it_can_go(full: Ends) -> None:
    with full.open() as disk:
        disk.discard_to_zero(0, disk.size)
    full.put(0, bytes(MANY))
    # Header, refcount table and block, L1 and L2 table.
    assert full.path.stat().st_size == 5 * CLUSTER
    full.agree()


FREEING: dict[str, Callable[[SyncFormatAccess], object]] = {
    "shrinking": lambda disk: disk.resize(CLUSTER),
    "applying a snapshot": lambda disk: disk.capability(Snapshottable).apply_snapshot("empty"),
}


@pytest.mark.parametrize("let_go", FREEING)
def test_others_that_free_give_back_too(ends: Ends, let_go: str) -> None:
    ends.create(MANY, theirs=True)
    ends.snapshot("-c", "empty")
    with ends.open() as disk:
        disk.write(pattern(MANY), 0)
        _durable(disk)
        before = ends.blocks
        FREEING[let_go](disk)
        _durable(disk)
        assert ends.blocks <= before - 31 * CLUSTER
    ends.qemu_img("check", "-q", ends.path)


def test_deleting_a_snapshot_gives_back_what_only_it_held(full: Ends) -> None:
    full.snapshot("-c", "old")
    with full.open() as disk:
        full.write(disk, 0, pattern(MANY, 2))
        _durable(disk)
        before = full.blocks
        disk.capability(Snapshottable).delete_snapshot("old")
        _durable(disk)
        assert full.blocks <= before - 31 * CLUSTER
    full.agree()


def test_rewriting_compressed_clusters_gives_theirs_back(ends: Ends) -> None:
    ends.create(MANY, theirs=True)
    ends.they(*(f"write -q -c -P {number + 1} {number * CLUSTER} 64k" for number in range(4)))
    compressed = [ends.l2_entry(number * CLUSTER)[1] & (1 << 54) - 1 for number in range(4)]
    assert len({offset // CLUSTER for offset in compressed}) == 1
    with ends.open() as disk:
        for number in range(4):
            ends.write(disk, number * CLUSTER, pattern(CLUSTER, number))
            _durable(disk)
            _durable(disk)
            # They share a cluster, which stays until the last of them is gone.
            assert ends.refcount(compressed[0]) == 3 - number
    ends.agree()


# -- not before


def test_a_lease_keeps_what_it_may_read(full: Ends) -> None:
    before = full.blocks
    with full.open() as disk:
        with disk.lease():
            mapping = disk.get_mapping(CLUSTER)
            assert isinstance(mapping, Data)
            disk.discard_to_zero(0, MANY)
            _durable(disk)
            full.write(disk, MANY, pattern(4 * CLUSTER))
            _durable(disk)
            old = bytearray(CLUSTER)
            mapping.storage.readv((old,), mapping.offset)
            assert old == full.model[CLUSTER : 2 * CLUSTER]
        full.put(0, bytes(MANY))
        _durable(disk)
        assert full.blocks <= before - 24 * CLUSTER
    full.agree()


def test_closing_ends_every_lease(full: Ends) -> None:
    disk = full.open()
    lease = disk.lease()
    lease.__enter__()
    disk.discard_to_zero(0, MANY)
    disk.close()
    lease.__exit__(None, None, None)
    full.put(0, bytes(MANY))
    assert full.path.stat().st_size == 5 * CLUSTER
    full.agree()


class EventsSeen(MemoryStorage):
    """A storage that remembers what happened to it, in order."""

    __slots__ = ("events",)

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.events: list[str] = []

    def writev(self, buffers: Any, offset: int) -> None:
        self.events.append("write")
        super().writev(buffers, offset)

    def sync(self) -> None:
        self.events.append("sync")
        super().sync()

    def discard(self, offset: int, length: int) -> None:
        self.events.append("discard")
        super().discard(offset, length)

    def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        self.events.append("cut" if size < self.size() else "grow")
        super().resize(size, preallocation)


def test_space_goes_only_when_it_is_durable_that_nothing_leads_there(full: Ends) -> None:
    storage = EventsSeen(full.path.read_bytes())
    with underlay.open_image(storage, format="qcow2", writable=True) as disk:
        disk.discard_to_zero(0, MANY)
        assert set(storage.events) <= {"write", "sync"}  # autoclear bits, at most
        storage.events.clear()
        disk.flush()
        disk.sync()
        # The entries, then a barrier, then the space.
        order = [event for event in storage.events if event != "write"]
        assert storage.events[0] == "write"
        assert order.index("sync") < order.index("discard")
        assert storage.events.index("write") < storage.events.index("sync")
    assert storage.events[-2:] == ["cut", "sync"]


def test_freed_clusters_are_used_again_instead_of_new_ones(full: Ends) -> None:
    size = full.path.stat().st_size
    with full.open() as disk:
        for turn in range(5):
            disk.discard_to_zero(0, MANY)
            full.put(0, bytes(MANY))
            _durable(disk)
            full.write(disk, MANY, pattern(MANY, turn))
            disk.discard_to_zero(MANY, MANY)
            _durable(disk)
            full.write(disk, 0, pattern(MANY, turn))
            full.put(MANY, bytes(MANY))
    assert full.path.stat().st_size <= size + MANY + CLUSTER
    full.agree()


def test_of_a_data_file_holes_are_punched_and_nothing_is_cut(ends: Ends) -> None:
    ends.create(2 * MANY, data_file="data.raw")
    with ends.open() as disk:
        ends.write(disk, 0, pattern(MANY))
        _durable(disk)
        data = ends.folder / "data.raw"
        before = data.stat()
        disk.discard_to_zero(8 * CLUSTER, 24 * CLUSTER)
        ends.put(8 * CLUSTER, bytes(24 * CLUSTER))
        _durable(disk)
        after = data.stat()
    assert after.st_size == before.st_size
    assert after.st_blocks * 512 <= before.st_blocks * 512 - 24 * CLUSTER
    ends.agree()


@pytest.mark.parametrize("options", [{}, {"discard": "ignore"}])
def test_zeroing_keeps_what_it_has(full: Ends, options: dict[str, Any]) -> None:
    before = full.blocks
    with full.open(**options) as disk:
        (disk.discard_to_zero if options else disk.write_zeroes)(0, MANY)
        full.put(0, bytes(MANY))
    assert full.blocks >= before
    full.agree()


def test_a_storage_that_cannot_punch_keeps_its_space_and_nothing_else_changes(
    full: Ends, tmp_path: Path
) -> None:
    class Solid(MemoryStorage):
        __slots__ = ()

        def discard(self, offset: int, length: int) -> None:
            raise underlay.UnsupportedOperationError("no holes here")

    storage = Solid(full.path.read_bytes())
    with underlay.open_image(storage, format="qcow2", writable=True) as disk:
        disk.discard_to_zero(CLUSTER, 4 * CLUSTER)
        _durable(disk)
    full.put(CLUSTER, bytes(4 * CLUSTER))
    content = bytearray(storage.size())
    storage.readv((content,), 0)
    full.path.write_bytes(content)
    full.agree()


def test_what_a_failed_write_took_is_given_back_at_once(full: Ends) -> None:
    """Not even the file stays longer than it was."""

    class Failing(MemoryStorage):
        __slots__ = ("most",)
        most: int

        def writev(self, buffers: Any, offset: int) -> None:
            if offset >= self.most:
                # As a full file system does: some of it is there.
                super().writev((bytes(buffers[0])[:512],), offset)
                raise underlay.StorageError("no space left", filename="memory")
            super().writev(buffers, offset)

    storage = Failing(full.path.read_bytes())
    size = storage.most = storage.size()
    with underlay.open_image(storage, format="qcow2", writable=True) as disk:
        with pytest.raises(underlay.StorageError, match="no space"):
            disk.write(pattern(3 * CLUSTER), MANY)
        assert disk.read_bytes(0, disk.size) == full.model
    content = bytearray(storage.size())
    storage.readv((content,), 0)
    full.path.write_bytes(content)
    full.agree()
    assert storage.size() == size
