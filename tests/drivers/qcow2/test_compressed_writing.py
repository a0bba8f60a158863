"""Compressed clusters that we write: QEMU reads them, shares their clusters, and rewrites them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

import underlay
from underlay import SyncFormatAccess
from underlay.capabilities import CompressedWriter, Snapshottable
from underlay.errors import OutOfRangeError, UnsupportedOperationError
from underlay_storage.file import FileStorage

from .ends import Ends, pattern

SIZE = 1 << 20


_LETTERS = bytes(byte & 15 | 64 for byte in range(256))


def _text(length: int, seed: int) -> bytes:
    """Bytes that become about half as long."""
    return pattern(length, seed).translate(_LETTERS)


def compress(ends: Ends, disk: SyncFormatAccess, offset: int, data: bytes) -> int:
    """Write one compressed cluster, and say how long it became."""
    writer = disk.capability(CompressedWriter)
    encoded = writer.encode(memoryview(data))
    assert encoded is not None
    writer.write_encoded(offset, encoded)
    ends.put(offset, data)
    return len(encoded)


KINDS: dict[str, dict[str, Any]] = {
    "zlib": {},
    "zstd": {"compression_type": "zstd"},
    "v2": {"compat": "v2"},
    "zlib 512": {"cluster_size": 512},
    "zstd 4K": {"compression_type": "zstd", "cluster_size": 4096},
    "zstd 2M": {"compression_type": "zstd", "cluster_size": 2 << 20},
    "zlib subclusters": {"extended_l2": True},
    "zstd subclusters": {"extended_l2": True, "compression_type": "zstd"},
}


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "theirs"])
@pytest.mark.parametrize("kind", KINDS)
def test_qemu_reads_what_we_compress_and_writes_over_it(
    ends: Ends, kind: str, *, theirs: bool
) -> None:
    options = KINDS[kind]
    cluster = options.get("cluster_size", 65536)
    size = min(16 * cluster, 4 << 20) if cluster > 512 else 128 * cluster
    ends.create(size, theirs=theirs, **options)

    with ends.open() as disk:
        for number in range(size // cluster):
            if number % 5 != 4:
                compress(ends, disk, number * cluster, _text(cluster, number))
        assert disk.read_bytes(0, size) == ends.model
    ends.agree()
    ends.they_write(cluster // 2, cluster, 0x77)
    ends.agree()
    with ends.open() as disk:
        ends.write(disk, cluster + 3, b"uncompressed again")
        compress(ends, disk, 0, _text(cluster, 99))
        ends.write(disk, 0, bytes(10))
        compress(ends, disk, 0, _text(cluster, 98))
    ends.agree()


@pytest.mark.parametrize("kind", ["zlib", "zstd", "zlib 512"])
def test_they_lie_one_behind_the_other(ends: Ends, kind: str) -> None:
    options = KINDS[kind]
    cluster = options.get("cluster_size", 65536)
    ends.create(64 * cluster, **options)
    with ends.open() as disk:
        disk.write(b"x", 63 * cluster)
        ends.put(63 * cluster, b"x")
        used = sum(
            compress(ends, disk, number * cluster, _text(cluster, number)) for number in range(60)
        )
    ends.agree()
    # Without packing each would take a cluster.
    assert ends.path.stat().st_size <= used + 8 * cluster
    shared = ends.checked()
    assert shared["compressed-clusters"] == 60


@pytest.mark.parametrize("bits", [1, 2, 8, 16])
def test_as_many_share_a_cluster_as_can_be_counted(ends: Ends, bits: int) -> None:
    ends.create(SIZE, refcount_bits=bits)
    with ends.open() as disk:
        for number in range(16):
            compress(ends, disk, number * 65536, b"\1" * 65536)
    ends.agree()
    clusters = -(-16 // ((1 << bits) - 1))
    assert ends.path.stat().st_size <= (5 + clusters) * 65536
    with ends.open() as disk:
        for number in range(0, 16, 3):
            ends.write(disk, number * 65536, b"again")
    ends.agree()
    with ends.open() as disk:
        disk.discard_to_zero(0, SIZE)
        ends.put(0, bytes(SIZE))
    ends.agree()
    assert ends.path.stat().st_size == 5 * 65536


def _reserved_zero(disk: SyncFormatAccess) -> None:
    disk.write(b"d" * 65536, 0)
    disk.write_zeroes(0, 65536)


def _shared(disk: SyncFormatAccess) -> None:
    disk.write(b"s" * 65536, 0)
    disk.capability(Snapshottable).create_snapshot("s")


BEFORE: dict[str, Callable[[SyncFormatAccess], object]] = {
    "data": lambda disk: disk.write(b"d" * 65536, 0),
    "zero": lambda disk: disk.write_zeroes(0, 65536),
    "reserved zero": _reserved_zero,
    "shared": _shared,
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("extended", [False, True], ids=["plain", "subclusters"])
def test_what_was_there_before_is_freed(ends: Ends, before: str, *, extended: bool) -> None:
    ends.create(SIZE, extended_l2=extended)
    with ends.open() as disk:
        BEFORE[before](disk)
        compress(ends, disk, 0, _text(65536, 3))
    ends.agree()


def test_it_hides_the_backing_image(ends: Ends) -> None:
    ends.create(SIZE, below=pattern(SIZE))
    with ends.open() as disk:
        compress(ends, disk, 65536, bytes(65536))
    ends.agree()


def test_the_last_cluster_may_be_longer_than_the_disk(ends: Ends) -> None:
    ends.create(65536 + 1536)
    data = _text(1536, 1)
    with ends.open() as disk:
        writer = disk.capability(CompressedWriter)
        encoded = writer.encode(memoryview(data.ljust(65536, b"\0")))
        writer.write_encoded(65536, encoded)
        ends.put(65536, data)
        assert disk.read_bytes(0, disk.size) == ends.model
    ends.agree()


@pytest.mark.parametrize("kind", ["zlib", "zstd", "v2"])
def test_what_does_not_become_smaller_is_not_encoded(ends: Ends, kind: str) -> None:
    ends.create(SIZE, **KINDS[kind])
    data = random.Random(1).randbytes(65536)
    with ends.open() as disk:
        assert disk.capability(CompressedWriter).encode(memoryview(data)) is None


@pytest.mark.parametrize(
    ("offset", "length"), [(1, 100), (512, 100), (-65536, 100), (SIZE, 100), (0, 0), (0, 65536)]
)
def test_what_is_no_cluster_of_the_disk_is_refused(ends: Ends, offset: int, length: int) -> None:
    ends.create(SIZE)
    before = ends.path.read_bytes()
    with ends.open() as disk:
        with pytest.raises(OutOfRangeError):
            disk.capability(CompressedWriter).write_encoded(offset, bytes(length))
        with pytest.raises(ValueError, match="one cluster"):
            disk.capability(CompressedWriter).encode(memoryview(bytes(100)))
    assert ends.path.read_bytes() == before


def test_a_data_file_takes_nothing_compressed(ends: Ends) -> None:
    ends.create(SIZE, data_file="data.raw")
    with ends.open() as disk, pytest.raises(UnsupportedOperationError, match="data file"):
        disk.capability(CompressedWriter).write_encoded(0, b"x")
    ends.agree()


@pytest.mark.parametrize("kind", ["zlib", "zstd 4K"])
def test_a_failed_write_leaks_nothing(
    ends: Ends, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = KINDS[kind]
    cluster = options.get("cluster_size", 65536)
    ends.create(32 * cluster, **options)

    with ends.open() as disk:
        original = FileStorage.writev
        calls = 0

        def fails_at_times(storage: Any, buffers: Any, offset: int) -> None:
            nonlocal calls
            calls += 1
            if calls % 3 == 0 and offset > 5 * cluster:
                raise underlay.StorageError("broken", filename="x")
            original(storage, buffers, offset)

        monkeypatch.setattr(FileStorage, "writev", fails_at_times)
        failures = 0
        for turn in range(3):
            for number in range(30):
                before = bytes(ends.model)
                try:
                    compress(ends, disk, number * cluster, _text(cluster, turn * 99 + number))
                except underlay.StorageError:
                    failures += 1
                    ends.model[:] = before
        monkeypatch.undo()
        assert failures > 20
        assert disk.read_bytes(0, disk.size) == ends.model
    ends.agree()


def test_snapshots_share_compressed_clusters(ends: Ends) -> None:
    ends.create(SIZE)
    with ends.open() as disk:
        for number in range(8):
            compress(ends, disk, number * 65536, _text(65536, number))
        old = bytes(ends.model)
        snapshots = disk.capability(Snapshottable)
        snapshots.create_snapshot("old")
        for number in range(0, 8, 2):
            compress(ends, disk, number * 65536, _text(65536, 50 + number))
    ends.agree()
    assert ends.their_bytes("-l", "snapshot.name=old") == old
    with ends.open() as disk:
        snapshots = disk.capability(Snapshottable)
        snapshots.apply_snapshot("old")
        ends.model[:] = old
        assert disk.read_bytes(0, SIZE) == old
        snapshots.delete_snapshot("old")
    ends.agree()


@pytest.mark.parametrize("kind", ["zlib", "zstd 4K"])
def test_many_are_written_at_a_time(ends: Ends, kind: str) -> None:
    options = KINDS[kind]
    cluster = options.get("cluster_size", 65536)
    ends.create(64 * cluster, **options)

    async def write() -> None:
        gate = underlay.DirectoryGate()
        opened = underlay.aio.open_image(ends.path, format="qcow2", writable=True, gate=gate)
        async with await opened as disk:
            writer: Any = disk.capability(CompressedWriter)

            async def one(number: int) -> None:
                data = _text(cluster, number)
                ends.put(number * cluster, data)
                await writer.write_encoded(number * cluster, writer.encode(memoryview(data)))

            async def other(number: int) -> None:
                await one(number)
                await disk.write(b"over it", number * cluster + 5)
                ends.put(number * cluster + 5, b"over it")

            for _ in range(2):
                await asyncio.gather(
                    *(one(number) for number in range(0, 60, 2)),
                    *(other(number) for number in range(1, 60, 2)),
                    disk.flush(),
                )
                await disk.discard_to_zero(20 * cluster, 9 * cluster)
                ends.put(20 * cluster, bytes(9 * cluster))

    asyncio.run(write())
    ends.agree()
