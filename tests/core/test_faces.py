"""One disk on two faces: what is cancelled, what overlaps, and what moves from one to the other."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import attrs
import pytest

import underlay
from underlay.capabilities import Describable, ImageDescription, Snapshottable
from underlay.storage import ReadBuffers, WriteBuffers
from underlay.testing import AwaitableMemoryStorage, PausedStorage, WrappedStorage
from underlay_storage.memory import MemoryStorage

from .toy_format import CLUSTER, Toy, pack

_CONTENT = random.Random(0).randbytes(5_000_000)


class _Slow(WrappedStorage):
    """Takes its time, and counts how many requests it has at once.

    One of several that are wanted at once takes as long as it takes the others to come.
    """

    def __init__(self, inner: MemoryStorage, *, seconds: float = 0.01) -> None:
        super().__init__(inner)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._now = 0
        self.most = 0
        self.wanted = 1
        self._come = threading.Event()

    def want(self, at_once: int) -> None:
        """From now on there are to be so many."""
        self.wanted = at_once
        self._come.clear()

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        self._take_time()
        super().readv(buffers, offset)

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        self._take_time()
        super().writev(buffers, offset)

    def _take_time(self) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            if self.most >= self.wanted:
                self._come.set()
        self._come.wait(60)
        time.sleep(self._seconds)
        with self._lock:
            self._now -= 1


def _run(check: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(check())


# -- cancelling


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_cancelled_call_waits_for_the_system_and_leaves_the_disk_usable(what: str) -> None:
    async def check() -> None:
        storage = PausedStorage(MemoryStorage(bytes(1000)))
        disk = await underlay.aio.open_image(storage, format="raw", writable=True)
        buffer = bytearray(10)
        call = disk.read(buffer, 0) if what == "read" else disk.write(b"y" * 10, 0)
        task = asyncio.ensure_future(call)
        while not storage.waiting.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0.02)
        assert not task.done(), "the system call still uses the buffer and the descriptor"
        storage.go_on.set()
        await asyncio.wait([task])
        assert task.cancelled()
        expected = b"y" * 10 if what == "write" else bytes(10)
        assert await disk.read_bytes(0, 10) == expected
        await disk.write(b"z", 0)
        await disk.close()

    _run(check)


def test_a_cancelled_read_into_a_buffer_never_writes_to_it_later() -> None:
    async def check() -> None:
        storage = _Slow(MemoryStorage(b"x" * 100_000), seconds=0.002)
        async with await underlay.aio.open_image(storage, format="raw") as disk:
            disk.set_async_read_parallelization(4)
            for turns in range(12):
                buffer = bytearray(100_000)
                task = asyncio.ensure_future(disk.read(buffer, 0))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                seen = bytes(buffer)
                await asyncio.sleep(0.004)
                assert buffer == seen

    _run(check)


# -- overlapping


def test_parts_of_one_read_overlap_when_asked_to() -> None:
    async def check() -> None:
        storage = _Slow(MemoryStorage(_CONTENT))
        async with await underlay.aio.open_image(storage, format="raw") as disk:
            assert await disk.read_bytes(123, 4_800_000) == _CONTENT[123:4_800_123]
            assert storage.most == 1
            disk.set_async_read_parallelization(4)
            storage.want(2)
            assert await disk.read_bytes(123, 4_800_000) == _CONTENT[123:4_800_123]
            assert 2 <= storage.most <= 4

    _run(check)


def test_parts_of_one_write_overlap_when_asked_to() -> None:
    async def check() -> None:
        storage = _Slow(MemoryStorage(len(_CONTENT)))
        async with await underlay.aio.open_image(storage, format="raw", writable=True) as disk:
            await disk.write(_CONTENT[:2_000_000], 7)
            assert storage.most == 1
            disk.set_async_write_parallelization(4)
            storage.want(2)
            await disk.writev([_CONTENT[:1], _CONTENT[1:4_900_000]], 7)
            assert 2 <= storage.most <= 4
            assert await disk.read_bytes(7, 4_900_000) == _CONTENT[:4_900_000]

    _run(check)


def test_the_first_error_of_many_parts_is_raised_when_all_have_ended() -> None:
    class Broken(_Slow):
        ended = 0

        def readv(self, buffers: ReadBuffers, offset: int) -> None:
            try:
                super().readv(buffers, offset)
                if offset >= 2 << 20:
                    raise underlay.StorageError(f"bad sector at {offset}")
            finally:
                self.ended += 1

    async def check() -> None:
        storage = Broken(MemoryStorage(_CONTENT))
        async with await underlay.aio.open_image(storage, format="raw") as disk:
            disk.set_async_read_parallelization(5)
            with pytest.raises(underlay.StorageError, match="bad sector"):
                await disk.read_bytes(0, len(_CONTENT))
            ended = storage.ended
            await asyncio.sleep(0.03)
            assert storage.ended == ended
            assert await disk.read_bytes(0, 10) == _CONTENT[:10]

    _run(check)


def test_many_tasks_read_one_disk_at_once() -> None:
    async def check() -> None:
        storage = _Slow(MemoryStorage(_CONTENT))
        async with await underlay.aio.open_image(storage, format="raw") as disk:
            found = await asyncio.gather(*(disk.read_bytes(at, 50) for at in range(20)))
            assert found == [_CONTENT[at : at + 50] for at in range(20)]
            assert storage.most > 1

    _run(check)


# -- moving


def test_a_disk_moves_between_the_faces(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(_CONTENT[:10_000])
    disk = underlay.open_image(tmp_path / "disk", format="raw", writable=True)
    assert disk.blocking() is disk

    async def check() -> None:
        core = disk.awaitable()
        assert core.awaitable() is core
        await core.write(b"async", 0)
        assert disk.read_bytes(0, 5) == b"async"
        disk.write(b"block", 0)
        assert await core.read_bytes(0, 5) == b"block"
        async with await underlay.aio.open_any(tmp_path / "disk", lock=False) as other:
            assert other.blocking().read_bytes(0, 5) == b"block"
            assert other.as_file().read(5) == b"block"
        await core.close()

    _run(check)
    assert disk.closed


def test_a_coroutine_storage_serves_both_faces() -> None:
    async def check() -> None:
        storage = AwaitableMemoryStorage(_CONTENT[:100_000])
        async with await underlay.aio.open_image(storage, format="raw", writable=True) as disk:
            await disk.write(b"w", 77)
            assert await disk.read_bytes(77, 2) == b"w" + _CONTENT[78:79]
            with pytest.raises(RuntimeError, match="await"):
                disk.blocking().read_bytes(0, 1)
            found = await asyncio.to_thread(disk.blocking().read_bytes, 77, 2)
            assert found == b"w" + _CONTENT[78:79]

    _run(check)


def test_the_blocking_face_works_in_a_running_loop_and_stops_it(toy: None) -> None:
    image = MemoryStorage(pack(_CONTENT[: 50 * CLUSTER], compressed=True))

    async def check() -> None:
        with underlay.open_image(image, format="toy", writable=True) as disk:
            assert disk.read_bytes(0, disk.size) == _CONTENT[: 50 * CLUSTER]
            disk.write(b"mine", CLUSTER - 2)
            disk.flush()
            assert next(iter(disk.extents())).length == CLUSTER
            assert disk.info().format == "toy"

    _run(check)


# -- the rest of the face


def test_capabilities_block_on_the_blocking_face(toy: None) -> None:
    image = MemoryStorage(pack(b"x" * 10))
    with underlay.open_image(image, format="toy") as disk:
        assert disk.capability(Describable) is None
    with underlay.open_image(_qcow2(), format="qcow2") as disk:
        description = disk.capability(Describable).describe()
        assert isinstance(description, ImageDescription)
        assert list(disk.capability(Snapshottable).snapshots()) == []
        found = disk.capability(Describable)
    with pytest.raises(underlay.ClosedError):
        found.describe()

    async def check() -> None:
        async with await underlay.aio.open_image(_qcow2(), format="qcow2") as disk:
            describable = disk.capability(Describable)
            assert describable is not None
            assert isinstance(await describable.describe(), ImageDescription)

    _run(check)


def _qcow2() -> MemoryStorage:
    """An image of 64 KiB without data: a header, and a table of one empty entry."""
    header = bytearray(3 * 65536)
    header[:8] = b"QFI\xfb\0\0\0\2"
    header[20:24] = (16).to_bytes(4)
    header[24:32] = (65536).to_bytes(8)
    header[36:40] = (1).to_bytes(4)
    header[40:48] = (65536).to_bytes(8)
    header[48:56] = (131072).to_bytes(8)
    header[56:60] = (1).to_bytes(4)
    return MemoryStorage(bytes(header))


def test_it_counts_what_went_through_each_storage(tmp_path: Path, toy: None) -> None:
    (tmp_path / "base").write_bytes(pack(b"b" * CLUSTER))
    (tmp_path / "top").write_bytes(pack(b"", size=CLUSTER, backing="base"))
    with underlay.open_any(tmp_path / "top", gate=underlay.DirectoryGate(), writable=True) as disk:
        before = {name: attrs.evolve(stats) for name, stats in disk.stats().items()}
        assert set(before) == {str(tmp_path / "base"), str(tmp_path / "top")}
        disk.read_bytes(0, 100)
        disk.write(b"x", 0)
        disk.flush()
        after = disk.stats()
        assert (
            after[str(tmp_path / "base")].read_bytes
            >= before[str(tmp_path / "base")].read_bytes + 100
        )
        assert after[str(tmp_path / "base")].write_requests == 0
        assert after[str(tmp_path / "top")].write_bytes > 0
        assert after[str(tmp_path / "top")].syncs > before[str(tmp_path / "top")].syncs


def test_alignments_are_those_of_all_storages() -> None:
    from underlay.testing import AlignedStorage

    storage = AlignedStorage(MemoryStorage(_CONTENT[:8192]), request=512, memory=4096)
    with underlay.open_image(storage, format="raw", writable=True) as disk:
        assert (disk.req_align(), disk.mem_align()) == (512, 4096)
        buffer = underlay.aligned_buffer(1024)
        disk.read(buffer, 512)
        assert buffer == _CONTENT[512:1536]
        disk.write(b"odd", 1001)
        assert disk.read_bytes(1000, 5) == _CONTENT[1000:1001] + b"odd" + _CONTENT[1004:1005]


def test_misuse_is_a_type_or_value_error() -> None:
    with underlay.open_image(MemoryStorage(100), format="raw", writable=True) as disk:
        wrong: list[Callable[[], Any]] = [
            lambda: disk.read(b"constant", 0),
            lambda: disk.read(5, 0),  # type: ignore[arg-type]
            lambda: disk.read(memoryview(bytes(100)), 0),
            lambda: disk.write("text", 0),  # type: ignore[arg-type]
            lambda: disk.read(memoryview(bytearray(100))[::2], 0),
        ]
        for call in wrong:
            with pytest.raises(TypeError):
                call()
        for call in (
            lambda: disk.read(bytearray(1), -1),
            lambda: disk.read_bytes(0, -1),
            lambda: disk.read_bytes(-1, 1),
            lambda: disk.get_mapping(-1),
            lambda: disk.get_mapping(0, -1),
            lambda: disk.extents(-1),
            lambda: disk.extents(0, -1),
            lambda: disk.write_zeroes(0, -1),
            lambda: disk.write_zeroes(-1, 1),
            lambda: disk.ensure_data_mapping(0, 0),
            lambda: disk.ensure_data_mapping(99, 2),
            lambda: disk.resize(-1),
            lambda: disk.resize(5, "sideways"),
        ):
            with pytest.raises(ValueError, match=r"\w"):
                call()
        assert disk.size == 100


def test_a_large_request_is_no_different(tmp_path: Path) -> None:
    size = 70_000_000
    with underlay.create(tmp_path / "disk", format="raw", size=size) as disk:
        data = os.urandom(1 << 20) * 64
        disk.write(data, 1_000_001)
        assert disk.read_bytes(1_000_001, len(data)) == data
        pieces = [bytearray(1 << 15) for _ in range(1500)]
        disk.readv(pieces, 1_000_001)
        assert b"".join(pieces) == data[: 1500 << 15]


def test_the_driver_is_within_reach(toy: None) -> None:
    with underlay.open_image(MemoryStorage(pack(b"x")), format="toy") as disk:
        assert isinstance(disk.inner, Toy)
        assert disk.awaitable().inner is disk.inner
