"""Internal snapshots as jobs: QEMU reads what we keep, and we apply what QEMU kept."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

import underlay
from underlay.jobs import apply_snapshot, create_snapshot, delete_snapshot, snapshots

from .conftest import Make

Tool = Callable[..., str]


def test_qemu_reads_what_a_snapshot_kept(make: Make, qemu_img: Tool, qemu_io: Tool) -> None:
    path = make("disk.qcow2", "qcow2", "1M", "write -P 1 0 128k")
    kept = create_snapshot(path, "before")
    qemu_io("-f", "qcow2", "-c", "write -P 2 64k 128k", path)
    assert kept.name == "before"
    (listed,) = json.loads(qemu_img("info", "--output=json", path))["snapshots"]
    assert (listed["id"], listed["name"]) == (kept.id, kept.name)
    qemu_img("check", path)
    qemu_img("snapshot", "-a", "before", path)
    assert "verification failed" not in qemu_io(
        "-f", "qcow2", "-c", "read -P 1 0 128k", "-c", "read -P 0 128k 64k", path
    )


def test_what_qemu_kept_can_be_applied_and_deleted(
    make: Make, qemu_img: Tool, qemu_io: Tool
) -> None:
    path = make("disk.qcow2", "qcow2", "1M", "write -P 1 0 128k")
    qemu_img("snapshot", "-c", "first", path)
    qemu_io("-f", "qcow2", "-c", "write -P 2 0 128k", path)
    qemu_img("snapshot", "-c", "second", path)
    assert [one.name for one in snapshots(path)] == ["first", "second"]
    apply_snapshot(path, "first")
    with underlay.open_image(path, format="qcow2") as disk:
        assert disk.read_bytes(0, 128 << 10) == b"\1" * (128 << 10)
    delete_snapshot(path, "first")
    delete_snapshot(path, snapshots(path)[0].id)
    assert snapshots(path) == ()
    qemu_img("check", path)


def test_an_open_disk_stays_open(make: Make) -> None:
    path = make("disk.qcow2", "qcow2", "1M", "write -P 1 0 64k")
    with underlay.open_image(path, format="qcow2", writable=True) as disk:
        create_snapshot(disk, "one")
        disk.write(b"\2" * 512, 0)
        apply_snapshot(disk, "one")
        assert disk.read_bytes(0, 512) == b"\1" * 512
        assert [one.name for one in snapshots(disk)] == ["one"]


def test_nothing_that_the_image_names_is_opened(make: Make) -> None:
    base = make("base.raw", "raw", "1M")
    path = make("top.qcow2", "qcow2", "1M", backing=base)
    base.unlink()
    create_snapshot(path, "one")
    assert [one.name for one in snapshots(path)] == ["one"]


def test_a_format_without_snapshots_says_so(make: Make) -> None:
    path = make("disk.raw", "raw", "1M")
    assert snapshots(path) == ()
    with pytest.raises(underlay.UnsupportedOperationError, match="raw have no snapshots"):
        create_snapshot(path, "one", format="raw")


def test_an_unknown_snapshot_is_an_error_that_lists_them(make: Make) -> None:
    path = make("disk.qcow2", "qcow2", "1M")
    create_snapshot(path, "one")
    for job in (apply_snapshot, delete_snapshot):
        with pytest.raises(underlay.OptionError, match="'one'"):
            job(path, "two")
