"""Growing and shrinking: what is new is zero, what is cut never comes back, whoever looks."""

from __future__ import annotations

from typing import Any

import pytest

from underlay.capabilities import Snapshottable
from underlay.errors import LimitExceededError, UnsupportedOperationError
from underlay_storage.file import FileStorage

from .ends import LAYOUTS, Ends, pattern

CLUSTER = 65536


def resize(ends: Ends, size: int, **options: Any) -> None:
    with ends.open(**options) as disk:
        disk.resize(size)
        ends.model[:] = ends.model[:size].ljust(size, b"\0")
        assert disk.size == size
        assert disk.read_bytes(0, size) == ends.model


def _raw_agrees(ends: Ends) -> None:
    if ends.data_file is not None and ends.header.autoclear_features & 2:
        assert ends.data_file.read_bytes()[: len(ends.model)] == ends.model


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "theirs"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_cut_never_comes_back(ends: Ends, layout: str, *, theirs: bool) -> None:
    size = 600 << 10
    ends.create(size, theirs=theirs, **LAYOUTS[layout])
    ends.they_write(0, size, 9)
    for wanted in (300_000 // 512 * 512, size, 123 << 10, 2 << 20, 512, 65536, 0, 400_000):
        resize(ends, wanted)
        ends.agree()
        _raw_agrees(ends)
        with ends.open() as disk:
            ends.write(disk, wanted // 2, pattern(min(5000, wanted - wanted // 2)))
    ends.agree()
    _raw_agrees(ends)


@pytest.mark.parametrize("who", ["we", "they"])
@pytest.mark.parametrize("layout", ["v3", "v2", "subclusters", "512-byte clusters", "data file"])
def test_growing_does_not_show_what_a_longer_backing_image_has(
    ends: Ends, layout: str, who: str
) -> None:
    """Whether we had shrunk the disk before, or QEMU had."""
    ends.create(100_352, below=pattern(900_000), **LAYOUTS[layout])
    ends.agree()
    resize(ends, 400_384)
    ends.agree()
    with ends.open() as disk:
        ends.write(disk, 100_000, pattern(1000, 2))
    if who == "we":
        resize(ends, 70_144)
    else:
        ends.qemu_img("resize", "-q", "--shrink", "-f", "qcow2", ends.path, "70144")
        del ends.model[70_144:]
    ends.agree()
    resize(ends, 1 << 20)
    ends.agree()


@pytest.mark.parametrize("extended", [False, True], ids=["plain", "subclusters"])
@pytest.mark.parametrize("flags", ["", "-c", "-z", "-z -u"])
def test_the_last_cluster_of_any_kind_is_cut_and_grows(
    ends: Ends, flags: str, *, extended: bool
) -> None:
    ends.create(3 * CLUSTER, extended_l2=extended, below=pattern(4 * CLUSTER))
    if "-z" in flags:
        ends.they(f"write -q {flags} {2 * CLUSTER} 64k")
        ends.put(2 * CLUSTER, bytes(CLUSTER))
    else:
        ends.they_write(2 * CLUSTER, CLUSTER, 5, flags)
    resize(ends, 2 * CLUSTER + 1536)
    ends.agree()
    resize(ends, 3 * CLUSTER + 512)
    ends.agree()


def test_sizes_are_kept_exactly(ends: Ends) -> None:
    ends.create(1000)
    for size in (1001, 65537, 3, 70_001):
        resize(ends, size)
        assert ends.header.size == size
        with ends.open() as disk:
            ends.write(disk, size - 1, b"e")
    ends.qemu_img("check", "-q", ends.path)


@pytest.mark.parametrize("layout", ["v3", "512-byte clusters", "subclusters"])
def test_the_l1_table_grows_and_the_old_one_is_freed(ends: Ends, layout: str) -> None:
    size = 100_352
    ends.create(size, **LAYOUTS[layout])
    ends.they_write(0, size, 3)
    for factor in (10, 1000, 20_000):
        with ends.open() as disk:
            disk.resize(size * factor)
            disk.write(b"far away", size * factor - 8)
            assert disk.read_bytes(0, 2 * size) == ends.model.ljust(2 * size, b"\0")
        ends.qemu_img("check", "-q", ends.path)
        ends.qemu_io(
            "-f", "qcow2", "-r", "-c", f"read -q -P 3 0 {size}",
            "-c", f"read -q -P 0 {size} {size}", ends.path,
        )  # fmt: skip
    resize(ends, size)
    ends.agree()


def test_more_than_an_l1_table_can_cover_is_refused(ends: Ends) -> None:
    ends.create(1 << 20, cluster_size=512)
    before = ends.path.read_bytes()
    with ends.open() as disk:
        with pytest.raises(LimitExceededError, match="larger clusters"):
            disk.resize("200G")
        assert disk.size == 1 << 20
    assert ends.path.read_bytes() == before
    ends.agree()


# -- preallocation


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "layout", ["v3", "v2", "subclusters", "512-byte clusters", "data file", "raw data file"]
)
def test_what_grows_can_get_its_place_at_once(ends: Ends, layout: str, mode: str) -> None:
    ends.create(100_352, theirs=True, **LAYOUTS[layout])
    ends.they_write(0, 100_352, 3)
    wanted = 40 * CLUSTER
    with ends.open() as disk:
        disk.resize(wanted, preallocation=mode)
        ends.model[:] = ends.model.ljust(wanted, b"\0")
        assert disk.read_bytes(0, wanted) == ends.model
    ends.agree()
    _raw_agrees(ends)
    if mode in {"falloc", "full"}:
        taken = ends.blocks
        if ends.data_file is not None:
            taken = ends.data_file.stat().st_blocks * 512
        assert taken >= wanted - 2 * CLUSTER

    size = ends.path.stat().st_size
    with ends.open() as disk:
        ends.write(disk, 20 * CLUSTER, pattern(10 * CLUSTER))
    if mode != "off":
        assert ends.path.stat().st_size == size
    ends.agree()
    resize(ends, CLUSTER)
    ends.agree()


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("layout", ["v2", "v3", "subclusters"])
@pytest.mark.parametrize("below", [50_000, 500_000, 2 << 20])
def test_what_grows_over_a_backing_image_can_get_its_place_at_once(
    ends: Ends, layout: str, mode: str, below: int
) -> None:
    ends.create(100_352, below=pattern(below), **LAYOUTS[layout])
    with ends.open() as disk:
        disk.resize(1 << 20, preallocation=mode)
        ends.model[:] = ends.model.ljust(1 << 20, b"\0")
        assert disk.read_bytes(0, 1 << 20) == ends.model
    ends.agree()


@pytest.mark.parametrize("mode", ["off", "metadata", "full"])
@pytest.mark.parametrize("raw", [False, True], ids=["mapped", "raw"])
def test_what_somebody_has_put_behind_a_data_file_does_not_show(
    ends: Ends, mode: str, *, raw: bool
) -> None:
    ends.create(2 * CLUSTER, data_file="data.raw", data_file_raw=raw)
    assert ends.data_file is not None
    with ends.data_file.open("r+b") as file:
        file.seek(2 * CLUSTER)
        file.write(b"stranger" * 50_000)
    with ends.open() as disk:
        disk.resize(8 * CLUSTER, preallocation=mode)
        ends.model[:] = ends.model.ljust(8 * CLUSTER, b"\0")
        assert disk.read_bytes(0, disk.size) == ends.model
        ends.write(disk, 3 * CLUSTER + 100, b"new")
    ends.agree()
    _raw_agrees(ends)


def test_what_others_write_to_a_raw_data_file_is_seen(ends: Ends) -> None:
    ends.create(2 * CLUSTER, data_file="data.raw", data_file_raw=True)
    resize(ends, 5 * CLUSTER)
    assert ends.data_file is not None
    with ends.data_file.open("r+b") as file:
        file.seek(4 * CLUSTER)
        file.write(b"somebody was here")
    ends.put(4 * CLUSTER, b"somebody was here")
    ends.agree()
    with ends.open() as disk:
        disk.discard_to_zero(3 * CLUSTER, CLUSTER)
        disk.discard_to_backing(0, CLUSTER)
    ends.agree()
    assert ends.data_file.read_bytes() == ends.model


# -- snapshots


def test_disks_of_version_3_change_their_size_beside_snapshots(ends: Ends) -> None:
    ends.create(300 << 10)
    ends.they_write(0, 300 << 10, 1)
    sizes: dict[str, bytes] = {}
    for size in (300 << 10, 1 << 20, 100 << 10):
        resize(ends, size)
        with ends.open() as disk:
            ends.write(disk, size // 3, pattern(1000, size))
            disk.capability(Snapshottable).create_snapshot(str(size))
        sizes[str(size)] = bytes(ends.model)
        ends.agree()
    for name, content in sizes.items():
        with ends.open() as disk:
            disk.capability(Snapshottable).apply_snapshot(name)
            ends.model[:] = content
        ends.agree()


@pytest.mark.parametrize("size", [1 << 19, 2 << 20])
def test_a_disk_of_version_2_keeps_its_size_beside_snapshots(ends: Ends, size: int) -> None:
    """QEMU refuses it: version 2 does not have to say how large the disk was."""
    ends.create(1 << 20, theirs=True, compat="v2")
    ends.they_write(0, CLUSTER, 1)
    ends.snapshot("-c", "s")
    before = ends.path.read_bytes()
    with ends.open() as disk:
        with pytest.raises(UnsupportedOperationError, match="version 2"):
            disk.resize(size)
        assert disk.size == 1 << 20
    assert ends.path.read_bytes() == before
    ends.snapshot("-d", "s")
    ends.model[:] = ends.model[:size].ljust(size, b"\0")
    with ends.open() as disk:
        disk.resize(size)
    ends.agree()


# -- what fails


@pytest.mark.parametrize("mode", ["off", "full"])
def test_growing_that_fails_leaves_the_disk_as_it_was(
    ends: Ends, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import underlay

    ends.create(100_352, theirs=True, below=b"" if mode == "full" else pattern(5 << 20))
    ends.they_write(0, 100_352, 3)
    with ends.open() as disk:
        ends.write(disk, 0, b"ready")
        disk.flush()
        storage: Any = disk.collect_storage_dependencies()[0]
        limit = ends.path.stat().st_size
        writev, resize_storage = FileStorage.writev, FileStorage.resize

        def full(self: Any, buffers: Any, offset: int) -> None:
            if self is storage and offset >= limit:
                raise underlay.StorageError("no space", filename="x")
            writev(self, buffers, offset)

        def full_too(self: Any, size: int, *rest: Any) -> None:
            if self is storage and size > limit:
                raise underlay.StorageError("no space", filename="x")
            resize_storage(self, size, *rest)

        monkeypatch.setattr(FileStorage, "writev", full)
        monkeypatch.setattr(FileStorage, "resize", full_too)
        with pytest.raises(underlay.StorageError, match="no space"):
            disk.resize("2G", preallocation=mode)
        monkeypatch.undo()
        assert disk.size == 100_352
        assert disk.read_bytes(0, 100_352) == ends.model
        ends.write(disk, 5000, b"it goes on")
    ends.agree()
    resize(ends, 1 << 20)
    ends.agree()
