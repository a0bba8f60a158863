"""Guest writes are seen in enabled bitmaps, and a crash leaves none that says less than is true."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from underlay import SyncFormatAccess, aio, jobs
from underlay.buffers import AnyBuffer
from underlay.capabilities import (
    Amendable,
    BitmapStore,
    CompressedWriter,
    Repairable,
    Snapshottable,
)
from underlay.errors import ConflictError, StorageError
from underlay.handle import StorageHandle
from underlay_drivers.qcow2 import writeback
from underlay_drivers.qcow2.bitmap_tracking import Tracking
from underlay_drivers.qcow2.rebuild import Rebuild
from underlay_drivers.qcow2.writing import ImageWriter

from .bitmapping import Model, dirty, their_dirty
from .ends import Ends, pattern

SIZE = 4 << 20
GRANULARITIES = {"fine": 512, "middle": 4096, "coarse": 1 << 20}


@pytest.mark.parametrize("options", [{}, {"cluster_size": 512}, {"data_file": "data.raw"}])
@pytest.mark.parametrize("seed", range(3))
def test_both_ends_write_in_turn(
    ends: Ends, qemu: Callable[[str], str], options: dict[str, Any], seed: int
) -> None:
    chance = random.Random(seed)
    ends.create(SIZE, theirs=True, **options)
    models = {name: Model(SIZE, size) for name, size in GRANULARITIES.items()}
    for name, size in GRANULARITIES.items():
        jobs.add_bitmap(ends.path, name, granularity=size)
    jobs.add_bitmap(ends.path, "idle", enabled=False)
    for turn in range(4):
        places = [chance.randrange(SIZE // 512) * 512 for _ in range(4)]
        writes = [(at, min(chance.choice((512, 5120, 200_192)), SIZE - at)) for at in places]
        if turn % 2:
            for at, length in writes:
                ends.they_write(at, length, turn)
        else:
            with ends.open() as disk:
                for at, length in writes:
                    ends.write(disk, at, pattern(length, turn))
                    # Once more, in place.
                    ends.write(disk, at, pattern(length, turn + 9))
        for model in models.values():
            for write in writes:
                model.write(*write)
        for name, model in models.items():
            assert dirty(ends.path, name) == model.ranges(), (turn, name)
    jobs.disable_bitmap(ends.path, "fine")
    assert their_dirty(qemu, ends.path, "fine") == models["fine"].ranges()
    assert dirty(ends.path, "idle") == []
    ends.agree()


CHANGES: dict[str, Callable[[SyncFormatAccess], object]] = {
    "zero": lambda disk: disk.write_zeroes(65536, 65536),
    "zero a part": lambda disk: disk.write_zeroes(65536, 5),
    "discard": lambda disk: disk.discard_to_zero(65536, 65536),
    "discard to any": lambda disk: disk.discard_to_any(65536, 65536),
    "compress": lambda disk: disk.capability(CompressedWriter).write_encoded(
        65536, disk.capability(CompressedWriter).encode(memoryview(bytes(65536)))
    ),
    "map": lambda disk: disk.ensure_data_mapping(65536, 65536),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_way_to_change_data_is_seen(ends: Ends, change: str) -> None:
    ends.create(SIZE, theirs=True)
    ends.they_write(0, SIZE, 1)
    jobs.add_bitmap(ends.path, "all", granularity=65536)
    with ends.open() as disk:
        CHANGES[change](disk)
        assert dirty(disk, "all") == [(65536, 65536)]
    assert dirty(ends.path, "all") == [(65536, 65536)]
    ends.qemu_img("check", "-q", ends.path)


@pytest.mark.parametrize("options", [{}, {"data_file": "data.raw"}])
def test_bitmaps_do_not_change_while_somebody_writes_through_a_mapping(
    ends: Ends, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writeback, "_LONGEST_LEASE", 0.01)
    ends.create(SIZE, theirs=True, **options)
    jobs.add_bitmap(ends.path, "all", granularity=65536)
    with ends.open() as disk:
        with disk.lease():
            disk.ensure_data_mapping(65536, 65536)
            with pytest.raises(ConflictError, match="holds a lease"):
                jobs.clear_bitmap(disk, "all")
        assert dirty(disk, "all") == [(65536, 65536)]
        jobs.clear_bitmap(disk, "all")
    assert dirty(ends.path, "all") == []


def test_the_first_bitmap_waits_for_those_who_write_through_a_mapping(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writeback, "_LONGEST_LEASE", 0.01)
    ends.create(SIZE, data_file="data.raw")
    with ends.open() as disk:
        with disk.lease():
            disk.ensure_data_mapping(65536, 65536)
            with pytest.raises(ConflictError, match="holds a lease"):
                jobs.add_bitmap(disk, "all")
        jobs.add_bitmap(disk, "all")


def test_going_back_to_a_snapshot_may_change_everything(ends: Ends) -> None:
    ends.create(SIZE, theirs=True)
    with ends.open() as disk:
        snapshots = disk.capability(Snapshottable)
        snapshots.create_snapshot("a")
        jobs.add_bitmap(disk, "all")
        assert dirty(disk, "all") == []
        snapshots.create_snapshot("b")
        snapshots.delete_snapshot("b")
        assert dirty(disk, "all") == []
        snapshots.apply_snapshot("a")
        assert dirty(disk, "all") == [(0, SIZE)]
    assert dirty(ends.path, "all") == [(0, SIZE)]
    ends.agree()


@pytest.mark.parametrize("sizes", [(6 << 20, 40 << 20), (1 << 20, 8 << 20), (512, 3 << 20)])
def test_bitmaps_follow_the_size_of_the_disk(ends: Ends, sizes: tuple[int, int]) -> None:
    """Those that are disabled too; tables become longer and shorter with small clusters."""
    ends.create(SIZE, cluster_size=512)
    for name in ("on", "off"):
        jobs.add_bitmap(ends.path, name, granularity=512)
    ends.they_write(SIZE // 2, 512, 1)
    ends.they_write(0, 1024, 2)
    jobs.disable_bitmap(ends.path, "off")
    model = Model(SIZE, 512)
    for written in ((SIZE // 2, 512), (0, 1024)):
        model.write(*written)
    for size in sizes:
        with ends.open() as disk:
            disk.resize(size)
        model.bits = {bit for bit in model.bits if bit < size // 512}
        model.size = size
        assert dirty(ends.path, "off") == model.ranges()
        ends.qemu_img("check", "-q", ends.path)
        said = ends.info()["format-specific"]["data"]["bitmaps"]
        assert [one["flags"] for one in said] == [["auto"], []]
    # QEMU uses them as they are.
    ends.qemu_img("bitmap", "--add", "--merge", "off", "-g", "512", ends.path, "copy")
    assert dirty(ends.path, "copy") == model.ranges()


def test_one_that_is_never_closed_leaves_bitmaps_that_say_so(ends: Ends) -> None:
    ends.create(SIZE)
    jobs.add_bitmap(ends.path, "on")
    jobs.add_bitmap(ends.path, "off", enabled=False)
    with ends.open() as disk:
        disk.write(b"x", 0)
        disk.flush()
        disk.sync()
        crashed = ends.path.read_bytes()
        assert [one.in_use for one in jobs.bitmaps(disk)] == [False, False]
    assert [one.in_use for one in jobs.bitmaps(ends.path)] == [False, False]
    ends.path.write_bytes(crashed)
    assert [one.in_use for one in jobs.bitmaps(ends.path)] == [True, False]
    ends.qemu_img("check", "-q", ends.path)


def test_changes_of_bitmaps_and_of_data_go_together(ends: Ends) -> None:
    ends.create(SIZE)
    with ends.open() as disk:
        disk.write(b"before", 0)
        jobs.add_bitmap(disk, "a", granularity=4096)
        disk.write(b"x", 5000)
        jobs.add_bitmap(disk, "b", granularity=4096)
        disk.write(b"y", 9000)
        assert dirty(disk, "a") == [(4096, 8192)]
        assert dirty(disk, "b") == [(8192, 4096)]
        jobs.clear_bitmap(disk, "a")
        jobs.disable_bitmap(disk, "b")
        disk.write(b"z", 0)
        jobs.merge_bitmap(disk, "b", "a")
        for _ in range(2):
            disk.flush()
            disk.sync()
        disk.invalidate_cache()
        disk.write(b"z", 20_000)
    assert dirty(ends.path, "a") == [(0, 4096), (16384, 4096)]
    assert dirty(ends.path, "b") == [(0, 4096), (8192, 4096)]
    ends.qemu_img("check", "-q", ends.path)


def test_what_is_remembered_goes_to_the_image_when_it_is_much(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    from underlay_drivers.qcow2 import bitmap_tracking

    monkeypatch.setattr(bitmap_tracking, "_MEMORY", 8192)
    chance = random.Random(4)
    ends.create(1 << 30, cluster_size=4096)
    jobs.add_bitmap(ends.path, "fine", granularity=512)
    model = Model(1 << 30, 512)
    with ends.open() as disk:
        for _ in range(60):
            at = chance.randrange((1 << 30) - 600)
            disk.write(b"x" * 600, at)
            model.write(at, 600)
        assert dirty(disk, "fine") == model.ranges()
    assert dirty(ends.path, "fine") == model.ranges()
    ends.qemu_img("check", "-q", ends.path)


def test_a_repair_finds_bitmaps_at_rest(ends: Ends) -> None:
    ends.create(SIZE)
    jobs.add_bitmap(ends.path, "a", granularity=4096)
    with ends.open() as disk:
        disk.write(b"x", 5000)
        result = disk.capability(Repairable).repair(leaks_only=False)
        assert (result.corruptions, result.leaks) == (0, 0)
        disk.write(b"x", 50_000)
    assert dirty(ends.path, "a") == [(4096, 4096), (49152, 4096)]
    ends.qemu_img("check", "-q", ends.path)


def test_bits_that_find_no_space_leak_none(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    ends.create(SIZE, theirs=True)
    jobs.add_bitmap(ends.path, "all", granularity=65536)
    write = StorageHandle.write

    async def full(self: StorageHandle, data: AnyBuffer, offset: int) -> None:
        raise StorageError("Could not write", errno=errno.ENOSPC)

    with ends.open() as disk:
        disk.write(pattern(512, 1), 65536)
        disk.flush()
        monkeypatch.setattr(StorageHandle, "write", full)
        with pytest.raises(StorageError):
            dirty(disk, "all")
        monkeypatch.setattr(StorageHandle, "write", write)
        disk.write(pattern(512, 1), 0)
    assert dirty(ends.path, "all") == [(0, 131072)]
    ends.qemu_img("check", "-q", ends.path)


class _Held:
    """A step of the library that is stopped, once, when its work is done."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        step = getattr(owner, name)
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

        async def held(*args: Any) -> Any:
            result = await step(*args)
            if not self.reached.is_set():
                self.reached.set()
                await self.go_on.wait()
            return result

        patch.setattr(owner, name, held)

    async def cancel_there(self, task: asyncio.Task[Any]) -> None:
        """Cancel a task that has come to the step, which then goes on."""
        await self.reached.wait()
        task.cancel()
        await asyncio.sleep(0)
        self.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_bits_find_no_room_where_counts_are_made_anew(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with await aio.open_image(ends.path, format="qcow2", writable=True) as disk:
            await disk.write(pattern(65536, 1), 0)
            # What is new lies where the allocator sees free clusters.
            held = _Held(monkeypatch, Rebuild, "write_structures")
            amendable: Any = disk.capability(Amendable)
            bitmaps: Any = disk.capability(BitmapStore)
            amending = asyncio.create_task(amendable.amend({"refcount_bits": 64}))
            await held.reached.wait()
            asking = asyncio.create_task(bitmaps.dirty_ranges("all"))
            await asyncio.wait([asking], timeout=0.1)
            held.go_on.set()
            await amending
            assert (await asking).ranges == ((0, 65536),)
            await disk.write(pattern(1 << 20, 2), 1 << 20)

    ends.create(SIZE, theirs=True)
    jobs.add_bitmap(ends.path, "all")
    asyncio.run(main())
    assert dirty(ends.path, "all") == [(0, 65536), (1 << 20, 1 << 20)]
    ends.qemu_img("check", "-q", ends.path)


def test_a_cancelled_first_write_costs_no_bitmap(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with await aio.open_image(ends.path, format="qcow2", writable=True) as disk:
            held = _Held(monkeypatch, ImageWriter, "_clear_autoclear_bits")
            await held.cancel_there(asyncio.create_task(disk.write(pattern(512, 1), 0)))
            await disk.write(pattern(512, 2), 65536)

    ends.create(SIZE, theirs=True)
    jobs.add_bitmap(ends.path, "all", granularity=65536)
    asyncio.run(main())
    assert (65536, 65536) in dirty(ends.path, "all")


def test_after_a_cancelled_change_of_bitmaps_writes_are_marked_first(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed = ends.path.with_name("crashed.qcow2")

    async def main() -> None:
        async with await aio.open_image(ends.path, format="qcow2", writable=True) as disk:
            await disk.write(pattern(512, 1), 0)
            held = _Held(monkeypatch, Tracking, "_write_flags")
            bitmaps: Any = disk.capability(BitmapStore)
            await held.cancel_there(asyncio.create_task(bitmaps.add_bitmap("another")))
            await disk.write(pattern(512, 2), 65536)
            await disk.flush()
            await disk.sync()
            shutil.copyfile(ends.path, crashed)

    ends.create(SIZE, theirs=True)
    jobs.add_bitmap(ends.path, "all", granularity=65536)
    asyncio.run(main())
    assert dirty(ends.path, "all") == [(0, 131072)]
    with pytest.raises(ConflictError):
        dirty(crashed, "all")
