"""The end of a disk: calls in flight end first, none begins after, and no child goes on with it."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import underlay
from underlay.access import FormatAccess
from underlay.capabilities import Describable, ImageDescription
from underlay.driver import FormatOpenOptions
from underlay.errors import ClosedError, StorageError
from underlay.handle import StorageHandle
from underlay.storage import ReadBuffers
from underlay.testing import PausedStorage, WrappedStorage
from underlay_storage.memory import MemoryStorage

from .toy_format import Toy, pack


class _Recorder(WrappedStorage):
    """Knows whether anything came after its close, and whether it was closed in time."""

    def __init__(self) -> None:
        super().__init__(MemoryStorage(b"x" * 100_000))
        self.running = 0
        self.closed_while_running = self.used_after_close = self.is_closed = False

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        self.used_after_close |= self.is_closed
        self.running += 1
        time.sleep(0.0005)
        super().readv(buffers, offset)
        self.used_after_close |= self.is_closed
        self.running -= 1

    def close(self) -> None:
        self.closed_while_running = self.running > 0
        self.is_closed = True


def _owned(storage: WrappedStorage) -> underlay.SyncFormatAccess:
    """A disk that closes its storage, as one opened by name does."""
    disk = underlay.open_image(storage, format="raw")
    resources = disk.awaitable()._resources
    assert resources is not None
    resources.handles[0].owned = True
    return disk


def _read_on(disk: underlay.SyncFormatAccess, errors: list[BaseException]) -> None:
    buffer = bytearray(1000)
    try:
        while True:
            disk.read(buffer, 0)
            disk.read_bytes(5000, 10)
    except BaseException as error:  # noqa: BLE001 - looked at by whoever started the thread
        errors.append(error)


def test_no_read_lands_after_a_close() -> None:
    for _ in range(10):
        storage = _Recorder()
        disk = _owned(storage)
        errors: list[BaseException] = []

        threads = [threading.Thread(target=_read_on, args=(disk, errors)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.004)
        disk.close()
        assert storage.is_closed
        assert not storage.closed_while_running
        for thread in threads:
            thread.join()
        assert not storage.used_after_close
        assert [type(error) for error in errors] == [ClosedError] * 4


def test_closing_waits_for_a_call_in_flight() -> None:
    storage = PausedStorage(MemoryStorage(b"x" * 100))
    disk = underlay.open_image(storage, format="raw")
    done: list[bytes] = []
    reader = threading.Thread(target=lambda: done.append(disk.read_bytes(0, 3)))
    reader.start()
    assert storage.waiting.wait(10)
    closer = threading.Thread(target=disk.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive(), "the read has not ended"
    with pytest.raises(ClosedError):
        disk.read_bytes(0, 1)
    storage.go_on.set()
    closer.join(10)
    reader.join(10)
    assert not closer.is_alive()
    assert done == [b"xxx"]


def test_closing_waits_for_tasks_in_flight() -> None:
    async def check() -> None:
        storage = PausedStorage(MemoryStorage(b"x" * 100))
        disk = await underlay.aio.open_image(storage, format="raw")
        reading = asyncio.ensure_future(disk.read_bytes(0, 3))
        while not storage.waiting.is_set():
            await asyncio.sleep(0.001)
        closing = asyncio.ensure_future(disk.close())
        await asyncio.sleep(0.02)
        assert not closing.done()
        storage.go_on.set()
        await closing
        assert reading.done()
        assert await reading == b"xxx"

    asyncio.run(check())


class _Describing(Toy, Describable):
    """A toy that takes its time to tell about itself."""

    def hold(self) -> None:
        self.telling, self.go_on = asyncio.Event(), asyncio.Event()

    async def describe(self) -> ImageDescription:
        self.telling.set()
        await self.go_on.wait()
        return ImageDescription(cluster_size=7)


def test_closing_waits_for_a_capability_in_use() -> None:
    async def check() -> None:
        storage = StorageHandle(MemoryStorage(pack(b"x")), owned=False)
        driver = await _Describing.open(FormatOpenOptions(storage=storage))
        driver.hold()
        disk = FormatAccess(driver)
        describable = disk.capability(Describable)
        assert describable is not None
        telling = asyncio.ensure_future(describable.describe())
        await driver.telling.wait()
        closing = asyncio.ensure_future(disk.close())
        await asyncio.sleep(0.02)
        assert not closing.done()
        driver.go_on.set()
        await closing
        assert (await telling).cluster_size == 7
        with pytest.raises(ClosedError):
            await describable.describe()

    asyncio.run(check())


def test_a_cancelled_close_can_be_called_again() -> None:
    async def check() -> None:
        storage = PausedStorage(MemoryStorage(b"x" * 100))
        disk = await underlay.aio.open_image(storage, format="raw")
        reading = asyncio.ensure_future(disk.read_bytes(0, 3))
        while not storage.waiting.is_set():
            await asyncio.sleep(0.001)
        closing = asyncio.ensure_future(disk.close())
        await asyncio.sleep(0.01)
        closing.cancel()
        await asyncio.wait([closing])
        assert closing.cancelled()
        assert not disk.closed
        storage.go_on.set()
        assert await reading == b"xxx"
        assert await disk.read_bytes(0, 1) == b"x"
        await disk.close()
        assert disk.closed

    asyncio.run(check())


def test_a_close_that_is_cancelled_late_flushes_all_the_same(toy: None) -> None:
    async def check(turns: int) -> None:
        storage = MemoryStorage(pack(bytes(10_000)))
        disk = await underlay.aio.open_image(storage, format="toy", writable=True)
        await disk.write(b"kept", 0)
        closing = asyncio.ensure_future(disk.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        if not disk.closed:
            await disk.close()
        async with await underlay.aio.open_image(storage, format="toy") as again:
            assert await again.read_bytes(0, 4) == b"kept"

    for turns in range(12):
        asyncio.run(check(turns))


def test_a_blocking_close_does_not_wait_for_its_own_loop() -> None:
    async def check() -> None:
        storage = PausedStorage(MemoryStorage(b"x" * 100))
        disk = await underlay.aio.open_image(storage, format="raw")
        reading = asyncio.ensure_future(disk.read_bytes(0, 3))
        while not storage.waiting.is_set():
            await asyncio.sleep(0.001)
        with pytest.raises(RuntimeError, match="await"):
            disk.blocking().close()
        storage.go_on.set()
        assert await reading == b"xxx"
        await disk.close()

    asyncio.run(check())


def test_whoever_iterates_may_close() -> None:
    disk = underlay.open_any(MemoryStorage(100))
    extents = disk.extents()
    next(extents)
    disk.close()
    with pytest.raises(ClosedError):
        next(extents)

    async def check() -> None:
        disk = await underlay.aio.open_any(MemoryStorage(100))
        async for _ in disk.extents():
            await disk.close()
            break

    asyncio.run(check())


def test_a_closed_disk_refuses_everything() -> None:
    disk = underlay.open_image(MemoryStorage(100), format="raw", writable=True)
    disk.close()
    disk.close()
    calls: list[Callable[[], Any]] = [
        lambda: disk.read(bytearray(1), 0),
        lambda: disk.readv([bytearray(1)], 0),
        lambda: disk.read_bytes(0, 1),
        lambda: disk.write(b"x", 0),
        lambda: disk.writev([b"x"], 0),
        lambda: disk.write_zeroes(0, 1),
        lambda: disk.discard_to_zero(0, 1),
        lambda: disk.discard_to_any(0, 1),
        lambda: disk.discard_to_backing(0, 1),
        lambda: disk.get_mapping(0),
        lambda: disk.get_shallow_mapping(0),
        lambda: disk.ensure_data_mapping(0, 1),
        disk.extents,
        lambda: disk.resize(5),
        lambda: disk.resize_grow(500),
        lambda: disk.resize_shrink(5),
        disk.flush,
        disk.sync,
        disk.invalidate_cache,
        disk.info,
        disk.as_file,
        lambda: disk.slice(0, 1),
        lambda: disk.size,
        lambda: disk.capability(Describable),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="closed"):
            call()
    assert disk.closed
    assert "closed" in repr(disk)


def test_everything_is_closed_even_if_something_fails(tmp_path: Path, toy: None) -> None:
    (tmp_path / "base").write_bytes(pack(b"b"))
    (tmp_path / "top").write_bytes(pack(b"t", backing="base"))
    before = len(os.listdir("/proc/self/fd"))
    disk = underlay.open_any(tmp_path / "top", gate=underlay.DirectoryGate())

    async def fail() -> None:
        raise StorageError("cannot close")

    disk.inner.close = fail  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="cannot close"):
        disk.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert disk.closed


def test_a_failing_flush_is_heard_of_and_all_is_closed(tmp_path: Path, toy: None) -> None:
    (tmp_path / "disk").write_bytes(pack(bytes(10_000)))
    before = len(os.listdir("/proc/self/fd"))
    disk = underlay.open_any(tmp_path / "disk", writable=True)

    async def fail() -> None:
        raise StorageError("no space left")

    disk.inner.flush = fail  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="no space"):
        disk.close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- disks that nobody closed


def _leave_open(storage: MemoryStorage) -> None:
    disk: Any = underlay.open_image(storage, format="toy", writable=True)
    disk.write(b"lost", 0)
    disk.awaitable()._in_a_cycle = disk  # only the collector finds it, when it is told to


def test_a_disk_that_was_left_open_is_warned_of_and_not_flushed(toy: None) -> None:
    storage = MemoryStorage(pack(bytes(10_000)))
    _leave_open(storage)
    with pytest.warns(ResourceWarning, match="unclosed disk .*toy"):
        gc.collect()
    with underlay.open_image(storage, format="toy") as disk:
        assert disk.read_bytes(0, 4) == bytes(4)


def test_a_view_or_an_open_that_failed_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disk = underlay.open_any(MemoryStorage(100))
        part = disk.slice(0, 10)
        disk.close()
        del part, disk
        with pytest.raises(underlay.OptionError):
            underlay.open_any(MemoryStorage(100), nonsense=1)
        gc.collect()


# -- forked children


def test_a_forked_child_cannot_use_the_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x" * 100_000)
    disk = underlay.open_image(tmp_path / "disk", format="raw", writable=True)
    file = disk.as_file()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytest may have threads
        child = os.fork()
    if not child:
        answers: list[str] = []
        for call in (
            lambda: disk.read(bytearray(10), 0),
            lambda: disk.write(b"y", 0),
            lambda: disk.slice(0, 5),
            lambda: file.read(1),
        ):
            try:
                call()
                answers.append("done")
            except ClosedError as error:
                answers.append("forked" if "forked" in str(error) else str(error))
        disk.close()
        file.close()
        with underlay.open_image(tmp_path / "disk", format="raw", lock=False) as own:
            answers.append(str(own.read_bytes(0, 1)))
        os.write(writing, ",".join(answers).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as answer:
        assert answer.read() == "forked,forked,forked,forked,b'x'"
    disk.write(b"z", 0)
    assert disk.read_bytes(0, 2) == b"zx"
    disk.close()
