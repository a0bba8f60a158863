"""Whoever writes at the same time, to one cluster even: nothing is lost, and nothing is broken."""

from __future__ import annotations

import asyncio
import faulthandler
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest

import underlay
from underlay import FormatAccess
from underlay.capabilities import CompressedWriter, Snapshottable
from underlay.errors import UnderlayError
from underlay.face import run_blocking
from underlay.locks import RangeLocks
from underlay_drivers.qcow2.writing import ImageWriter

from .judging import chance_of
from .structure import Verdict, look_at

_CLUSTER = 64 << 10
_PIECE = 512
#: Seconds after which nobody is thought to go on any more.
_PATIENCE = 60


@pytest.fixture(params=["plain", "subclusters", "backing", "compressed"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, bytes]]:
    """An image of four clusters, and what it holds."""
    size = 4 * _CLUSTER
    path = tmp_path / "disk.qcow2"
    content = bytes(size)
    options: dict[str, Any] = {}
    if request.param == "subclusters":
        options["extended_l2"] = True
    if request.param == "backing":
        content = bytes(range(256)) * (size // 256)
        (tmp_path / "base.raw").write_bytes(content)
        options |= {"backing_file": "base.raw", "backing_fmt": "raw"}
    gate = underlay.DirectoryGate()
    with underlay.create(path, size=size, gate=gate, **options) as disk:
        if request.param == "compressed":
            content = b"compressed cluster" * (size // 18 + 1)
            content = content[:size]
            writer = disk.capability(CompressedWriter)
            for offset in range(0, size, _CLUSTER):
                encoded = writer.encode(memoryview(content)[offset : offset + _CLUSTER])
                writer.write_encoded(offset, encoded)
    yield path, content
    assert look_at(path.read_bytes()) == Verdict()


def _run_all(work: Sequence[Callable[[], None]]) -> None:
    """Run each in a thread of its own; none of them may wait for ever."""
    threads = [threading.Thread(target=one, daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE)
    if any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback(all_threads=True)
        raise AssertionError("they wait for each other")


def _pieces(size: int) -> list[int]:
    """Where to write, in an order in which neighbours come far from each other."""
    places = list(range(0, size, 2 * _PIECE))
    chance_of("pieces").shuffle(places)
    return places


def _with_pieces(content: bytes) -> bytes:
    after = bytearray(content)
    for place in _pieces(len(content)):
        after[place : place + _PIECE] = _data(place)
    return bytes(after)


def _data(place: int) -> bytes:
    return (place // _PIECE + 1).to_bytes(4, "big") * (_PIECE // 4)


def test_tasks_write_to_one_cluster_at_once(image: tuple[Path, bytes]) -> None:
    path, content = image

    async def write() -> None:
        gate = underlay.DirectoryGate()
        async with await underlay.aio.open_any(path, writable=True, gate=gate) as disk:
            work = [disk.write(_data(place), place) for place in _pieces(len(content))]
            work.insert(len(work) // 2, disk.flush())
            work.insert(len(work) // 4, disk.sync())
            await asyncio.gather(*work)
            assert await disk.read_bytes(0, disk.size) == _with_pieces(content)

    asyncio.run(write())

    with underlay.open_any(path, gate=underlay.DirectoryGate()) as disk:
        assert disk.read_bytes(0, disk.size) == _with_pieces(content)


def test_threads_write_to_one_cluster_at_once(image: tuple[Path, bytes]) -> None:
    path, content = image
    errors: list[BaseException] = []
    gate = underlay.DirectoryGate()
    with underlay.open_any(path, writable=True, gate=gate) as disk:

        def write(places: list[int]) -> None:
            try:
                for number, place in enumerate(places):
                    disk.write(_data(place), place)
                    if number % 50 == 49:
                        disk.flush()
                        disk.sync()
            except BaseException as error:  # noqa: BLE001 - shown below
                errors.append(error)

        places = _pieces(len(content))
        _run_all([partial(write, places[n::4]) for n in range(4)])
        assert not errors
        assert disk.read_bytes(0, disk.size) == _with_pieces(content)

    with underlay.open_any(path, gate=underlay.DirectoryGate()) as disk:
        assert disk.read_bytes(0, disk.size) == _with_pieces(content)


def test_threads_may_write_discard_and_read_at_once(tmp_path: Path) -> None:
    """Each thread has clusters of its own, interleaved with the others' in all tables."""
    path = tmp_path / "disk.qcow2"
    cluster, count = 4096, 64
    errors: list[BaseException] = []
    with underlay.create(path, size=cluster * count, cluster_size=cluster) as disk:

        def work(mine: int) -> None:
            try:
                chance = chance_of("threads", mine)
                held = dict.fromkeys(range(mine, count, 4), bytes(cluster))
                for _ in range(150):
                    number = chance.choice(list(held))
                    data = bytes([chance.randrange(256)]) * cluster
                    if chance.random() < 0.3:
                        data = bytes(cluster)
                        disk.discard_to_zero(number * cluster, cluster)
                    else:
                        disk.write(data, number * cluster)
                    held[number] = data
                    if chance.random() < 0.1:
                        disk.flush()
                        disk.sync()
                    other = chance.choice(list(held))
                    assert disk.read_bytes(other * cluster, cluster) == held[other]
            except BaseException as error:  # noqa: BLE001 - shown below
                errors.append(error)

        _run_all([partial(work, mine) for mine in range(4)])
        assert not errors
    assert look_at(path.read_bytes()) == Verdict()


# -- everything at once


@attrs.define
class Owner:
    """Writes to every fourth cluster, and knows what is there and has ever been there."""

    number: int
    cluster: int
    count: int
    chance: random.Random = attrs.field(init=False)
    now: dict[int, int] = attrs.field(init=False)
    ever: dict[int, set[int]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.chance = chance_of("owner", self.number)
        self.now = dict.fromkeys(range(self.number, self.count, 4), 0)
        self.ever = {number: {0} for number in self.now}

    async def work(self, disk: FormatAccess, rounds: int) -> None:
        """Write, zero, discard, compress and read, and see nothing but what was written."""
        compressed = disk.capability(CompressedWriter)
        assert compressed is not None
        for _ in range(rounds):
            number = self.chance.choice(list(self.now))
            offset, kind = number * self.cluster, self.chance.random()
            value = self.chance.randrange(1, 256) if kind < 0.7 else 0
            self.ever[number].add(value)
            data = bytes([value]) * self.cluster
            if kind < 0.5:
                await disk.write(data, offset)
            elif kind < 0.6:
                middle = self.chance.randrange(1, self.cluster)
                await disk.writev([data[:middle], data[middle:]], offset)
            elif kind < 0.7:
                encoded = compressed.encode(memoryview(data))
                assert encoded is not None
                await compressed.write_encoded(offset, encoded)
            elif kind < 0.85:
                await disk.discard_to_zero(offset, self.cluster)
            else:
                await disk.write_zeroes(offset, self.cluster)
            self.now[number] = value
            other = self.chance.choice(list(self.now))
            seen = await disk.read_bytes(other * self.cluster, self.cluster)
            assert seen == bytes([self.now[other]]) * self.cluster


async def _manage(disk: FormatAccess, owners: Sequence[Owner], rounds: int) -> None:
    """Flush, sync, resize, and take, look at and delete snapshots, whatever others do."""
    size, cluster = disk.size, owners[0].cluster
    snapshots = disk.capability(Snapshottable)
    assert snapshots is not None
    for turn in range(rounds):
        await snapshots.create_snapshot(f"at {turn}")
        await disk.flush()
        await disk.resize(size + (turn % 3 + 1) * 5 * cluster)
        await disk.sync()
        if turn:
            await snapshots.delete_snapshot(f"at {turn - 1}")
        await disk.resize(size)
        content = await disk.read_bytes(0, size)
        _is_from_then(content, owners)


def _is_from_then(content: bytes, owners: Sequence[Owner]) -> None:
    """Every cluster holds what it has held at some time, and nothing else."""
    for owner in owners:
        for number, values in owner.ever.items():
            start = number * owner.cluster
            assert set(content[start : start + owner.cluster]) <= values


_BUSY: dict[str, dict[str, Any]] = {
    "plain": {"cluster_size": 4096},
    "small caches": {"cluster_size": 512},
    "subclusters": {"cluster_size": 16384, "extended_l2": True},
    "small counts": {"cluster_size": 4096, "refcount_bits": 8},
}


@pytest.mark.parametrize("face", ["threads", "tasks"])
@pytest.mark.parametrize("options", _BUSY.values(), ids=_BUSY)
def test_all_of_it_may_happen_at_once(tmp_path: Path, options: dict[str, Any], face: str) -> None:
    path = tmp_path / "disk.qcow2"
    cluster, count = options["cluster_size"], 160
    underlay.create(path, size=cluster * count, **options).close()
    owners = [Owner(number, cluster, count) for number in range(4)]
    caches = {"cache_size": 4096, "refcount_cache_size": 4096} if cluster == 512 else {}

    (_with_threads if face == "threads" else _with_tasks)(path, owners, caches)

    assert look_at(path.read_bytes()) == Verdict()
    with underlay.open_any(path) as disk:
        content = disk.read_bytes(0, disk.size)
        (last,) = disk.capability(Snapshottable).snapshots()
    for owner in owners:
        for number, value in owner.now.items():
            piece = content[number * cluster : (number + 1) * cluster]
            assert piece == bytes([value]) * cluster
    with underlay.open_image(path, format="qcow2", snapshot=last.name) as disk:
        _is_from_then(disk.read_bytes(0, disk.size), owners)


def _with_tasks(path: Path, owners: Sequence[Owner], options: dict[str, Any]) -> None:
    async def work() -> None:
        async with await underlay.aio.open_any(path, writable=True, **options) as disk:
            tasks = [owner.work(disk, 120) for owner in owners]
            async with asyncio.timeout(_PATIENCE):
                await asyncio.gather(*tasks, _manage(disk, owners, 6))

    asyncio.run(work())


class _AsIfAwaited:
    """The blocking face, so that one program serves both."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def size(self) -> int:
        return int(self._inner.size)

    def capability(self, kind: type) -> _AsIfAwaited:
        return _AsIfAwaited(self._inner.capability(kind))

    def encode(self, data: memoryview) -> object:
        return self._inner.encode(data)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*arguments: object) -> object:
            return getattr(self._inner, name)(*arguments)

        return call


def _with_threads(path: Path, owners: Sequence[Owner], options: dict[str, Any]) -> None:
    errors: list[BaseException] = []

    def run(work: Coroutine[Any, Any, None]) -> None:
        try:
            run_blocking(work)
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    with underlay.open_any(path, writable=True, **options) as disk:
        face: Any = _AsIfAwaited(disk)
        work = [*(owner.work(face, 120) for owner in owners), _manage(face, owners, 6)]
        _run_all([partial(run, one) for one in work])
    assert not errors, errors


def _no_tickets(patch: pytest.MonkeyPatch) -> None:
    def give(self: RangeLocks, *arguments: object, **named: object) -> object:
        return object()

    async def acquire(self: RangeLocks, *arguments: object, **named: object) -> object:
        return object()

    patch.setattr(RangeLocks, "acquire", acquire)
    patch.setattr(RangeLocks, "try_acquire", give)
    patch.setattr(RangeLocks, "release", give)


def _no_rest(patch: pytest.MonkeyPatch) -> None:
    def at_rest(self: ImageWriter) -> nullcontext[None]:
        return nullcontext()

    patch.setattr(ImageWriter, "at_rest", at_rest)


@pytest.mark.parametrize("breaks", [_no_tickets, _no_rest])
def test_a_driver_that_waits_for_nobody_is_caught(
    tmp_path: Path,
    breaks: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breaks(monkeypatch)

    def try_again_and_again() -> None:
        """It takes luck to be hit; nearly always once is enough."""
        for number in range(20):
            folder = tmp_path / str(number)
            folder.mkdir()
            test_all_of_it_may_happen_at_once(folder, _BUSY["plain"], "tasks")

    with pytest.raises((AssertionError, UnderlayError)):
        try_again_and_again()
