"""Bitmaps as jobs: on names and on open disks, and while others write."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

import underlay
from underlay import jobs
from underlay.errors import OptionError, UnsupportedOperationError

from .conftest import Make, Tool


def ranges(image: Path | underlay.SyncFormatAccess, name: str) -> list[tuple[int, int]]:
    return [(dirty.start, dirty.length) for dirty in jobs.dirty_ranges(image, name)]


def test_names_and_open_disks_do(make: Make, qemu_img: Tool) -> None:
    path = make("disk.qcow2", "qcow2", "4M")
    added = jobs.add_bitmap(path, "a", granularity="4k", format="qcow2")
    assert (added.name, added.granularity, added.auto, added.in_use) == ("a", 4096, True, False)
    with underlay.open_any(path, writable=True) as disk:
        assert jobs.add_bitmap(disk, "b", enabled=False).granularity == 65536
        disk.write(b"x", 12_345)
        assert ranges(disk, "a") == [(12288, 4096)]
        jobs.merge_bitmap(disk, "b", "a")
        jobs.disable_bitmap(disk, "a")
        jobs.enable_bitmap(disk, "b")
        disk.write(b"x", 3 << 20)
        jobs.clear_bitmap(disk, "a")
    assert [(one.name, one.auto) for one in jobs.bitmaps(path)] == [("a", False), ("b", True)]
    assert ranges(path, "a") == []
    assert ranges(path, "b") == [(0, 65536), (3 << 20, 65536)]
    jobs.remove_bitmap(path, "a")
    jobs.remove_bitmap(path, "b")
    assert jobs.bitmaps(path) == []
    qemu_img("check", "-q", path)


def test_neighbours_are_one_range(make: Make) -> None:
    """However many portions they come in."""
    path = make("disk.qcow2", "qcow2", "64M", options="cluster_size=512")
    jobs.add_bitmap(path, "a", granularity=512)
    with underlay.open_any(path, writable=True) as disk:
        disk.write_zeroes(1 << 20, 40 << 20)
    assert ranges(path, "a") == [(1 << 20, 40 << 20)]


def test_a_backing_image_need_not_be_there(make: Make) -> None:
    make("base.qcow2", "qcow2", "4M")
    path = make("top.qcow2", "qcow2", "4M", backing=Path("base.qcow2"))
    path.with_name("base.qcow2").unlink()
    jobs.add_bitmap(path, "a")
    assert ranges(path, "a") == []


def test_raw_has_none(make: Make) -> None:
    path = make("disk.raw", "raw", "1M")
    assert jobs.bitmaps(path, format="raw") == []
    with pytest.raises(UnsupportedOperationError, match="persistent bitmaps"):
        jobs.add_bitmap(path, "a", format="raw")
    with pytest.raises(OptionError, match="not found"):
        jobs.remove_bitmap(path, "a", format="raw")


@pytest.mark.parametrize("seed", range(2))
def test_no_write_is_missed_whatever_happens_to_bitmaps_meanwhile(
    make: Make, qemu_img: Tool, seed: int
) -> None:
    path = make("disk.qcow2", "qcow2", "16M", "write -P 1 0 4M")
    jobs.add_bitmap(path, "always", granularity=4096)
    written: list[int] = []
    failures: list[BaseException] = []

    def write(number: int) -> None:
        chance = random.Random(f"{seed}-{number}")
        try:
            for _ in range(150):
                at = chance.randrange((16 << 20) // 4096) * 4096
                disk.write(b"x" * 4096, at)
                written.append(at)
        except BaseException as error:  # noqa: BLE001 - told by the test
            failures.append(error)

    def change() -> None:
        try:
            for number in range(12):
                jobs.add_bitmap(disk, f"extra{number}", granularity=4096)
                jobs.merge_bitmap(disk, f"extra{number}", "always")
                ranges(disk, "always")
                if number % 3:
                    jobs.remove_bitmap(disk, f"extra{number}")
        except BaseException as error:  # noqa: BLE001 - told by the test
            failures.append(error)

    with underlay.open_any(path, writable=True) as disk:
        threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
        threads.append(threading.Thread(target=change))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not failures, failures
    clusters = {at // 4096 for at in written}
    seen = {
        at // 4096
        for start, length in ranges(path, "always")
        for at in range(start, start + length, 4096)
    }
    assert seen == clusters
    # What was merged into the others stays, and what came later is in them as well.
    extra = {
        at // 4096
        for start, length in ranges(path, "extra9")
        for at in range(start, start + length, 4096)
    }
    assert extra <= clusters
    qemu_img("check", "-q", path)
