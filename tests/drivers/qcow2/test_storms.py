"""Everything at once on one disk, much of it cancelled: the image is sound, and reads as the disk.

What is in flight when depends on threads, so a seed does not repeat a failure for sure.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine
from typing import Any

import pytest

import underlay
from underlay import FormatAccess, aio
from underlay.capabilities import CompressedWriter, Snapshottable
from underlay.errors import LimitExceededError, OptionError
from underlay.jobs.check import check
from underlay.storage import ReadBuffers
from underlay.testing.wrappers import WrappedStorage
from underlay_storage.memory import MemoryStorage

LAYOUTS: dict[str, dict[str, Any]] = {
    "512-byte clusters": {"cluster_size": 512},
    "4 KiB clusters": {"cluster_size": 4096, "refcount_bits": 8},
    "subclusters": {"cluster_size": 16384, "extended_l2": True},
}
SIZE = (300 << 10) + 7
CALLS = 120


class Waiting(WrappedStorage):
    """Nothing is at hand: every call takes a worker, and others come in between."""

    def try_readv(self, buffers: ReadBuffers, offset: int) -> int | None:
        """None."""
        return None


async def snapshot(disk: FormatAccess, chance: random.Random) -> None:
    able: Any = disk.capability(Snapshottable)
    there = [found.id for found in await able.snapshots()]
    call = chance.choice([able.create_snapshot, able.apply_snapshot, able.delete_snapshot])
    # One that is taken gets another name; one that is wanted may be gone by now.
    with contextlib.suppress(OptionError, LimitExceededError):
        await call(chance.choice(there or ["none"]))


async def compress(disk: FormatAccess, offset: int, size: int) -> None:
    able: Any = disk.capability(CompressedWriter)
    encoded = able.encode(memoryview(b"c" * size))
    await able.write_encoded(offset - offset % size, encoded)


def call(disk: FormatAccess, chance: random.Random, cluster: int) -> Coroutine[Any, Any, Any]:
    """Something to do."""
    offset = chance.randrange(SIZE)
    length = min(SIZE - offset, chance.choice([1, 600, cluster, 3 * cluster + 5, 100_000]))
    match chance.choices(range(9), weights=(50, 10, 8, 6, 6, 4, 12, 3, 2))[0]:
        case 0:
            return disk.write(bytes([chance.randrange(1, 256)]) * length, offset)
        case 1:
            return disk.discard_to_zero(offset, length)
        case 2:
            return disk.write_zeroes(offset, length)
        case 3:
            return disk.read_bytes(offset, length)
        case 4:
            return disk.flush()
        case 5:
            return disk.sync()
        case 6:
            return snapshot(disk, chance)
        case 7:
            return compress(disk, offset, cluster)
        case _:
            return disk.ensure_data_mapping(offset, length)


async def storm(storage: Waiting, layout: dict[str, Any], chance: random.Random) -> bytes:
    """What the disk holds at the end."""
    disk = await aio.create(storage, size=SIZE, **layout)
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[Any]] = set()
    for _ in range(CALLS):
        task: asyncio.Task[Any] = asyncio.ensure_future(call(disk, chance, layout["cluster_size"]))
        tasks.add(task)
        if chance.random() < 0.35:
            loop.call_later(chance.random() * 0.004, task.cancel)
        if len(tasks) > 8:
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                assert ended.cancelled() or ended.exception() is None, ended
    await asyncio.wait(tasks)
    content = await disk.read_bytes(0, SIZE)
    await asyncio.wait_for(disk.close(), 30)
    return content


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_outlives_a_storm(layout: str) -> None:
    for seed in range(20):
        storage = Waiting(MemoryStorage(0))
        content = asyncio.run(storm(storage, LAYOUTS[layout], random.Random(seed)))
        found = check(storage)
        assert (found.corruptions, found.leaks, found.check_errors) == (0, 0, 0), seed
        with underlay.open_any(storage) as disk:
            assert disk.read_bytes(0, SIZE) == content, seed
