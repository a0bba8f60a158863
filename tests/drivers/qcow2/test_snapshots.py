"""Internal snapshots: the list, and each as a disk of its own."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import attrs
import pytest

from underlay.errors import CorruptImageError, LimitExceededError, OptionError, ReadOnlyError
from underlay.face import run_blocking
from underlay.limits import Limits
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.snapshots import SnapshotEntry

from .conftest import Tool
from .images import Image, open_bytes, read

MiB = 1 << 20


def test_the_list_is_qemus(snapshotted: Image, qemu_img: Tool, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(snapshotted.data)
    told = json.loads(qemu_img("info", "--output=json", tmp_path / "image"))["snapshots"]
    with open_bytes(snapshotted.data) as disk:
        found = run_blocking(disk.snapshots())
    assert [
        {
            "id": one.id,
            "name": one.name,
            "vm-state-size": one.vm_state_size,
            "date-sec": one.date_sec,
            "date-nsec": one.date_nsec,
            "vm-clock-sec": one.vm_clock_nsec // 10**9,
            "vm-clock-nsec": one.vm_clock_nsec % 10**9,
            "icount": one.icount,
        }
        for one in found
    ] == told
    assert [one.disk_size for one in found] == [1 * MiB, 2 * MiB]


@pytest.mark.parametrize(
    ("wanted", "size", "byte"),
    [(None, 2 * MiB, 0x33), ("first", MiB, 0x11), ("second", 2 * MiB, 0x22), ("1", MiB, 0x11)],
)
def test_each_is_a_disk_of_its_own(
    snapshotted: Image, wanted: str | None, size: int, byte: int
) -> None:
    with open_bytes(snapshotted.data, snapshot=wanted) as disk:
        assert disk.size() == size
        assert read(disk, 0, 65536) == bytes([byte]) * 65536
        assert read(disk, 65536, 3 * MiB) == bytes(3 * MiB)
        assert len(run_blocking(disk.snapshots())) == 2
        run_blocking(disk.invalidate_cache())
        assert read(disk, 0, 1) == bytes([byte])


def test_an_id_wins_over_a_name(qemu_img: Tool, qemu_io: Tool, tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_img("snapshot", "-c", "2", path)
    qemu_io("-f", "qcow2", "-c", "write -P 9 0 64k", path)
    qemu_img("snapshot", "-c", "1", path)
    data = path.read_bytes()
    with open_bytes(data, snapshot="2") as disk:
        assert read(disk, 0, 1) == b"\x09"


def test_an_unknown_one_is_an_error_that_lists_them(snapshotted: Image) -> None:
    with (
        pytest.raises(OptionError, match="'first', 'second'") as caught,
        open_bytes(snapshotted.data, snapshot="third"),
    ):
        pass
    assert caught.value.option == "snapshot"


def test_version_2_tells_no_size_and_may_have_grown(
    qemu_img: Tool, qemu_io: Tool, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=512", path, "64k")
    qemu_io("-f", "qcow2", "-c", "write -P 7 0 64k", path)
    qemu_img("snapshot", "-c", "old", path)
    image = Image.load(path)
    table = image.header.snapshots_offset
    # As QEMU wrote it before it knew extra data, and as if the disk had grown since.
    entry, _ = SnapshotEntry.unpack(bytes(image.data), table)
    assert entry is not None
    bare = attrs.evolve(entry, extra=b"")
    image.data[table : table + len(bare.pack())] = bare.pack()
    grown = image.add_cluster(bytes(image.data[image.l1() : image.l1() + 16]))
    image.put(24, "Q", 128 << 10).put(36, "I", 4).put(40, "Q", grown)
    with open_bytes(image.data, snapshot="old") as disk:
        assert disk.size() == 128 << 10
        assert read(disk, 0, 128 << 10) == b"\x07" * (64 << 10) + bytes(64 << 10)


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        (0, "Q", 512),
        (0, "Q", 0),
        (0, "Q", 1 << 40),
        (0, "Q", 2**64 - 65536),
        (8, "I", 2**32 - 1),
        (8, "I", 0),
        (48, "Q", 1 << 63),
    ],
)
def test_a_table_that_cannot_be_spoils_its_snapshot_only(
    snapshotted: Image, at: int, form: str, value: int
) -> None:
    snapshotted.put(snapshotted.header.snapshots_offset + at, form, value)
    with open_bytes(snapshotted.data) as disk:
        assert read(disk, 0, 1) == b"\x33"
        assert len(run_blocking(disk.snapshots())) == 2
    with open_bytes(snapshotted.data, snapshot="second") as disk:
        assert read(disk, 0, 1) == b"\x22"
    with (
        pytest.raises(CorruptImageError, match="the snapshot is damaged"),
        open_bytes(snapshotted.data, snapshot="first"),
    ):
        pass


@pytest.mark.parametrize(("at", "form", "value"), [
    (12, "H", 65_535),
    (14, "H", 65_535),
    (36, "I", 2**32 - 1),
    (36, "I", 1025),
])  # fmt: skip
def test_a_list_that_cannot_be_read_spoils_no_data(
    snapshotted: Image, at: int, form: str, value: int
) -> None:
    table, first = snapshotted.header.snapshots_offset, 72
    # At the file's end, so that nothing follows that could pass for a name.
    copy = bytes(snapshotted.data[table : table + 2 * first])
    moved = snapshotted.add_cluster(copy)
    del snapshotted.data[moved + len(copy) :]
    snapshotted.put(64, "Q", moved).put(moved + first + at, form, value)
    with open_bytes(snapshotted.data) as disk:
        assert read(disk, 0, 1) == b"\x33"
        with pytest.raises(CorruptImageError):
            run_blocking(disk.snapshots())
        description = run_blocking(disk.describe())
        assert description.snapshots == ()
        assert any("snapshot table" in warning for warning in description.warnings)


def test_a_long_list_is_read_in_pieces_and_within_limits(snapshotted: Image) -> None:
    entry, _ = SnapshotEntry.unpack(bytes(snapshotted.data), snapshotted.header.snapshots_offset)
    assert entry is not None
    count = 3000
    snapshotted.put(60, "IQ", count, snapshotted.add_cluster(entry.pack() * count))
    with open_bytes(snapshotted.data) as disk:
        assert len(run_blocking(disk.snapshots())) == count
    with (
        open_bytes(snapshotted.data, limits=Limits(metadata=100_000)) as disk,
        pytest.raises(LimitExceededError),
    ):
        run_blocking(disk.snapshots())
    snapshotted.put(60, "I", 65_536)
    with open_bytes(snapshotted.data) as disk, pytest.raises(CorruptImageError):
        run_blocking(disk.snapshots())


def test_what_an_entry_has_beyond_ours_is_kept() -> None:
    entry = SnapshotEntry(
        l1_table_offset=65536,
        l1_size=1,
        id=b"1",
        name="naïve".encode(),
        date_sec=1,
        date_nsec=2,
        vm_clock_nsec=3,
        vm_state_size_short=4,
        extra=struct.pack(">QQQ", 5, 6, 2**64 - 1) + b"future!!!",
    )
    packed = entry.pack()
    assert len(packed) % 8 == 0
    assert SnapshotEntry.unpack(packed, 0) == (entry, len(packed))
    assert (entry.vm_state_size, entry.disk_size, entry.icount) == (5, 6, None)
    assert entry.public(disk_size=1).name == "naïve"


def test_a_data_file_keeps_no_snapshots(with_data_file: Image, snapshotted: Image) -> None:
    entry, _ = SnapshotEntry.unpack(bytes(snapshotted.data), snapshotted.header.snapshots_offset)
    assert entry is not None
    with_data_file.put(60, "IQ", 1, with_data_file.add_cluster(entry.pack()))
    assert Header.unpack(bytes(with_data_file.data)).external_data_file
    with pytest.raises(CorruptImageError), open_bytes(with_data_file.data, snapshot="first"):
        pass


def test_a_snapshot_is_read_only(snapshotted: Image) -> None:
    with (
        pytest.raises(ReadOnlyError),
        open_bytes(snapshotted.data, writable=True, snapshot="first"),
    ):
        pass
