"""Writes that allocate: data first, then the entry that shows it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

import underlay
from underlay import plugins
from underlay.driver import WriteTicket
from underlay.errors import StorageError
from underlay.face import run_blocking
from underlay.storage import WriteBuffers
from underlay.testing import PausedStorage, WrappedStorage
from underlay_storage.memory import MemoryStorage

from . import toy_format
from .toy_format import CLUSTER, Toy, pack

pytestmark = pytest.mark.usefixtures("toy")

_OLD = random.Random(0).randbytes(6 * CLUSTER)
#: Where no cluster is allocated.
_HOLE = 2 * CLUSTER


def _image(*, compressed: bool = False) -> MemoryStorage:
    content = bytearray(_OLD)
    content[_HOLE : _HOLE + CLUSTER] = bytes(CLUSTER)
    return MemoryStorage(pack(bytes(content), compressed=compressed))


class _Recorder(Toy):
    """Remembers what became of its tickets."""

    begun: int
    ended: list[str]

    async def begin_write(self, offset: int, length: int) -> WriteTicket:
        ticket = await super().begin_write(offset, length)
        self.begun = getattr(self, "begun", 0) + 1
        return ticket

    async def commit_write(self, ticket: WriteTicket) -> None:
        await asyncio.sleep(0) if _in_loop() else None
        await super().commit_write(ticket)
        self.ended = [*getattr(self, "ended", []), "commit"]

    async def abort_write(self, ticket: WriteTicket) -> None:
        await asyncio.sleep(0) if _in_loop() else None
        await super().abort_write(ticket)
        self.ended = [*getattr(self, "ended", []), "abort"]


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_format, "Toy", _Recorder)
    monkeypatch.setattr(plugins, "_registry", toy_format.register())


class _Failing(WrappedStorage):
    """Fails to write where it is told to."""

    def __init__(self, inner: MemoryStorage) -> None:
        super().__init__(inner)
        self.refuse: Callable[[int], bool] = lambda _: False

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        if self.refuse(offset):
            self.inner.writev((b"\xbd" * 100,), offset)
            raise StorageError("the device is full", errno=28)
        super().writev(buffers, offset)


# -- what surrounds the data


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (1, 1), (CLUSTER - 1, 1), (CLUSTER - 1, 2), (5, CLUSTER), (100, 3 * CLUSTER)],
)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("below", [0, CLUSTER + 100, 3 * CLUSTER, 40 * CLUSTER])
def test_the_rest_of_a_new_cluster_keeps_what_the_disk_has_there(
    offset: int, length: int, compressed: bool, below: int
) -> None:
    """From a backing image that is shorter or longer, from a compressed cluster, from nowhere."""
    base = random.Random(1).randbytes(below)
    size = 5 * CLUSTER + 17
    model = bytearray(base[:size].ljust(size, b"\0"))
    top = MemoryStorage(pack(b"", size=size, backing="base"))
    with (
        underlay.open_image(
            MemoryStorage(pack(base, compressed=compressed)), format="toy"
        ) as backing,
        underlay.open_image(top, format="toy", backing=backing, writable=True) as disk,
    ):
        disk.write(b"\xee" * length, offset)
        model[offset : offset + length] = b"\xee" * length
        assert disk.read_bytes(0, size) == model
        disk.write(b"end", size - 3)
        model[-3:] = b"end"
        assert disk.read_bytes(0, size) == model
        disk.flush()
        # Past the end of the disk a new cluster holds zeroes, not what the backing image has there.
        disk.resize(6 * CLUSTER)
        assert disk.read_bytes(0, 6 * CLUSTER) == model.ljust(6 * CLUSTER, b"\0")


def test_a_write_makes_room_only_where_there_is_none(recorder: None) -> None:
    with underlay.open_image(_image(), format="toy", writable=True) as disk:
        driver: Any = disk.inner
        disk.write(b"x" * 100, 10)
        assert getattr(driver, "begun", 0) == 0, "it is mapped to writable data already"
        disk.write(b"x" * CLUSTER, _HOLE + 10)
        assert (driver.begun, driver.ended) == (1, ["commit"])
        disk.write(b"y" * CLUSTER, _HOLE)
        assert driver.begun == 1


# -- what goes wrong


@pytest.mark.parametrize("face", ["blocking", "async"])
def test_data_that_could_not_be_written_are_never_shown(recorder: None, face: str) -> None:
    async def check(disk: underlay.FormatAccess, storage: _Failing) -> None:
        driver: Any = disk.inner
        before = await disk.read_bytes(0, disk.size)
        end = storage.size()
        storage.refuse = lambda offset: offset >= end
        for _ in range(3):
            with pytest.raises(StorageError, match="full"):
                await disk.write(b"new" * 10, _HOLE + 100)
            assert await disk.read_bytes(0, disk.size) == before
        assert driver.ended == ["abort"] * 3
        storage.refuse = lambda _: False
        await disk.write(b"new" * 10, _HOLE + 100)
        after = bytearray(before)
        after[_HOLE + 100 : _HOLE + 130] = b"new" * 10
        assert await disk.read_bytes(0, disk.size) == after
        assert storage.size() == end + CLUSTER, "the room of the aborted writes was used again"

    _on(face, check)


@pytest.mark.parametrize("face", ["blocking", "async"])
def test_what_surrounds_the_data_and_cannot_be_read_aborts_the_write(
    recorder: None, face: str
) -> None:
    async def check(disk: underlay.FormatAccess, storage: _Failing) -> None:
        driver: Any = disk.inner
        before = await disk.read_bytes(0, disk.size)
        packed = [e for e in driver._entries if e & 2]
        assert packed
        await driver._storage.write(b"\xff" * 50, packed[0] & ~3 & (1 << 48) - 1)
        number = driver._entries.index(packed[0])
        disk._reader.forget()
        with pytest.raises(underlay.CorruptImageError):
            await disk.write(b"x", number * CLUSTER + 5)
        assert driver.ended == ["abort"]
        await disk.write(b"x" * CLUSTER, number * CLUSTER)
        expected = bytearray(before)
        expected[number * CLUSTER : (number + 1) * CLUSTER] = b"x" * CLUSTER
        assert await disk.read_bytes(0, disk.size) == expected

    _on(face, check, content=b"all work and no play " * 1200, compressed=True)


def _on(
    face: str,
    check: Callable[[underlay.FormatAccess, _Failing], Any],
    *,
    content: bytes | None = None,
    compressed: bool = False,
) -> None:
    inner = _image() if content is None else MemoryStorage(pack(content, compressed=compressed))
    storage = _Failing(inner)

    async def run() -> None:
        async with await underlay.aio.open_image(storage, format="toy", writable=True) as disk:
            await check(disk, storage)

    if face == "async":
        asyncio.run(run())
    else:
        run_blocking(run())


def test_a_cancelled_write_ends_in_commit_or_abort(recorder: None) -> None:
    async def check(turns: int) -> list[str]:
        storage = PausedStorage(_image())
        storage.go_on.set()
        async with await underlay.aio.open_image(storage, format="toy", writable=True) as disk:
            driver: Any = disk.inner
            before = await disk.read_bytes(0, disk.size)
            task = asyncio.ensure_future(disk.write(b"new" * 10, _HOLE + 100))
            for _ in range(turns):
                await asyncio.sleep(0)
            while not task.done():  # in the midst of committing and aborting, too
                task.cancel()
                await asyncio.sleep(0)
            ended: list[str] = getattr(driver, "ended", [])
            assert len(ended) == getattr(driver, "begun", 0), "a ticket was left open"
            after = bytearray(before)
            if ended == ["commit"]:
                after[_HOLE + 100 : _HOLE + 130] = b"new" * 10
            assert await disk.read_bytes(0, disk.size) == after
            await asyncio.wait_for(disk.write(b"fine", _HOLE), 10)
            assert await disk.read_bytes(_HOLE, 4) == b"fine"
            return ended

    ends = [tuple(asyncio.run(check(turns))) for turns in range(14)]
    assert () in ends
    assert ("abort",) in ends


def test_a_write_cancelled_in_the_system_call_waits_for_it(recorder: None) -> None:
    async def check() -> None:
        storage = PausedStorage(_image())
        storage.go_on.set()
        async with await underlay.aio.open_image(storage, format="toy", writable=True) as disk:
            driver: Any = disk.inner
            storage.go_on.clear()
            storage.waiting.clear()
            # Nothing surrounds it: the first request is the write itself.
            task = asyncio.ensure_future(disk.write(b"n" * CLUSTER, _HOLE))
            while not storage.waiting.is_set():
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
            assert getattr(driver, "ended", []) == []
            storage.go_on.set()
            await asyncio.wait([task])
            assert task.cancelled()
            assert driver.ended == ["abort"]
            assert await disk.read_bytes(_HOLE, CLUSTER) == bytes(CLUSTER)

    asyncio.run(check())


def test_two_writers_of_one_new_cluster_wait_for_each_other(recorder: None) -> None:
    async def check() -> None:
        async with await underlay.aio.open_image(_image(), format="toy", writable=True) as disk:
            await asyncio.gather(
                *(disk.write(bytes([n]) * 16, _HOLE + 16 * n) for n in range(1, 250))
            )
            expected = b"".join(bytes([n]) * 16 for n in range(250)).ljust(CLUSTER, b"\0")
            assert await disk.read_bytes(_HOLE, CLUSTER) == expected

    asyncio.run(check())


@pytest.mark.parametrize("length", [0, -5, 10_000])
def test_a_driver_that_gives_an_impossible_ticket_is_stopped(
    recorder: None, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    import attrs

    real = Toy.begin_write

    async def begin_write(self: Toy, offset: int, wanted: int) -> WriteTicket:
        return attrs.evolve(await real(self, offset, wanted), length=length)

    monkeypatch.setattr(_Recorder, "begin_write", begin_write)
    with underlay.open_image(_image(), format="toy", writable=True) as disk:
        driver: Any = disk.inner
        with pytest.raises(RuntimeError, match="toy"):
            disk.write(b"x" * 100, _HOLE)
        assert driver.ended == ["abort"]


def test_nothing_is_shown_on_the_storage_before_a_flush() -> None:
    storage = _image()
    with underlay.open_image(storage, format="toy", writable=True) as disk:
        disk.write(b"new" * 10, _HOLE)
        with underlay.open_image(storage, format="toy") as other:
            assert other.read_bytes(_HOLE, 30) == bytes(30)
        disk.flush()
        disk.sync()
        with underlay.open_image(storage, format="toy") as other:
            assert other.read_bytes(_HOLE, 30) == b"new" * 10
