"""A time limit ends whatever runs inside it, in bounded time, and leaves nothing half done."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import underlay
from underlay import aio, jobs, time_limit
from underlay.jobs.workers import in_parallel
from underlay.steps import Steps
from underlay.storage import BlockingStorage, ReadBuffers, Storage
from underlay.testing import WrappedStorage
from underlay_storage.memory import MemoryStorage

#: Seconds for each request to read, and for all of them.
_READ, _LIMIT = 0.02, 0.1
#: Who reads more than fits into that waits longer for each: to go on to the end takes minutes.
_FITS, _LONG_READ = 50, 0.5
#: By then it must be over, on a busy machine too.
_OVER = 30.0
_MIB = 1 << 20


class Slow(WrappedStorage):
    """Takes its time for each read."""

    reads = 0

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        self.reads += 1
        time.sleep(_READ if self.reads <= _FITS else _LONG_READ)
        super().readv(buffers, offset)


def _bytes(storage: BlockingStorage) -> bytes:
    data = bytearray(storage.size())
    storage.readv((data,), 0)
    return bytes(data)


@pytest.fixture(scope="module")
def image() -> bytes:
    """Small clusters, so that hundreds of requests are needed to read the tables or the data."""
    storage = MemoryStorage()
    with underlay.create(storage, size=16 * _MIB, cluster_size=512) as disk:
        for at in range(0, 16 * _MIB, 16 << 10):
            disk.write(b"x" * 512, at)
    return _bytes(storage)


@pytest.fixture
def slow(image: bytes) -> Slow:
    """That image, in a slow storage."""
    return Slow(MemoryStorage(image))


def _walk(disk: Any) -> None:
    for _ in jobs.map_image(disk):
        pass


def _read_all(storage: Slow) -> None:
    with underlay.open_any(storage) as disk:
        for at in range(0, disk.size, 16 << 10):
            disk.read_bytes(at, 512)


JOBS: dict[str, Callable[[Slow, Path], object]] = {
    "reading": lambda slow, _: _read_all(slow),
    "map": lambda slow, _: _walk(slow),
    "picture": lambda slow, _: jobs.picture(slow),
    "measure": lambda slow, _: jobs.measure(slow, "qcow2"),
    "check": lambda slow, _: jobs.check(slow),
    "repair": lambda slow, _: jobs.repair(slow),
    "digest": lambda slow, _: jobs.digest(slow),
    "compare": lambda slow, _: jobs.compare(slow, slow),
    "strict compare": lambda slow, _: jobs.compare(slow, slow, strict=True),
    "convert": lambda slow, tmp: jobs.convert(slow, tmp / "new"),
    "convert -S 0": lambda slow, tmp: jobs.convert(slow, tmp / "new", sparse_size=0),
    "convert -c": lambda slow, tmp: jobs.convert(
        slow, tmp / "new", output_format="qcow2", compress=True
    ),
    "salvage": lambda slow, tmp: jobs.convert(slow, tmp / "new", salvage=lambda _: None),
    "dd": lambda slow, tmp: jobs.dd(slow, tmp / "new"),
    "bench": lambda slow, _: jobs.bench(slow, depth=4),
    "bench one by one": lambda slow, _: jobs.bench(slow, depth=1),
    "amend": lambda slow, _: jobs.amend(slow, {"compat": "v2"}),
    "resize": lambda slow, _: jobs.resize(slow, 512, shrink=True),
}


@pytest.mark.parametrize("name", JOBS)
def test_every_job_ends_soon_and_leaves_nothing_new(name: str, slow: Slow, tmp_path: Path) -> None:
    started = time.monotonic()
    over = pytest.raises(underlay.TimeLimitError, match=r"after the 0\.1 seconds")
    with over as found, underlay.TimeLimit(_LIMIT):
        JOBS[name](slow, tmp_path)
    assert time.monotonic() - started < _OVER
    assert found.value.seconds == _LIMIT
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["amend", "resize", "repair"])
def test_an_image_that_was_to_be_changed_is_left_sound(
    name: str, slow: Slow, image: bytes, tmp_path: Path
) -> None:
    with pytest.raises(underlay.TimeLimitError), underlay.TimeLimit(_LIMIT):
        JOBS[name](slow, tmp_path)
    left = MemoryStorage(_bytes(slow.inner))
    assert jobs.check(left).corruptions == 0
    if name != "resize":  # what is cut off goes bit by bit
        assert jobs.digest(left) == jobs.digest(MemoryStorage(image))


@pytest.mark.parametrize("look", [underlay.probe, underlay.inspect, underlay.open_any, jobs.info])
def test_looking_at_an_image_ends_too_and_gives_no_verdict(
    look: Callable[[Slow], object], slow: Slow
) -> None:
    with pytest.raises(underlay.TimeLimitError), underlay.TimeLimit(0):
        look(slow)
    assert slow.reads == 0


def test_a_chain_is_opened_no_further(tmp_path: Path) -> None:
    for number in range(20):
        below: dict[str, Any] = {}
        if number:
            below = {"backing_file": f"{number - 1}", "backing_fmt": "qcow2"}
        underlay.create(
            tmp_path / str(number), size=_MIB, gate=underlay.DirectoryGate(), **below
        ).close()
    asked: list[str] = []

    class Dawdling(underlay.PermissiveImplicitOpenGate):
        def decide(self, request: underlay.ImplicitOpenRequest) -> Any:
            asked.append(request.reference.name)
            time.sleep(_READ)
            return super().decide(request)

    with pytest.raises(underlay.TimeLimitError), underlay.TimeLimit(_LIMIT):
        underlay.open_any(tmp_path / "19", gate=Dawdling())
    assert len(asked) < 10


def test_in_time_nothing_is_different(slow: Slow) -> None:
    with underlay.TimeLimit(60) as limit:
        assert underlay.probe(slow).format == "qcow2"
        assert 0 < limit.left() <= 60
    time.sleep(_READ)
    assert underlay.probe(slow).format == "qcow2"


def test_the_limit_that_ends_first_counts_and_inner_ones_come_to_an_end(slow: Slow) -> None:
    with underlay.TimeLimit(60):
        with pytest.raises(underlay.TimeLimitError, match="0 seconds"), underlay.TimeLimit(0):
            underlay.probe(slow)
        assert underlay.probe(slow).format == "qcow2"
    over = pytest.raises(underlay.TimeLimitError, match="0 seconds")
    with over, underlay.TimeLimit(0), underlay.TimeLimit(60) as inner:
        assert inner.left() == 0
        underlay.probe(slow)


def test_work_inside_the_handling_of_another_error_is_limited_too(slow: Slow) -> None:
    try:
        int("")
    except ValueError:
        with pytest.raises(underlay.TimeLimitError), underlay.TimeLimit(0):
            underlay.probe(slow)


def test_an_error_that_somebody_took_for_the_images_comes_out_at_the_end(slow: Slow) -> None:
    over = pytest.raises(underlay.TimeLimitError)
    with over, underlay.TimeLimit(0), suppress(underlay.UnderlayError):
        underlay.probe(slow)


def test_who_cleans_up_may_read(slow: Slow) -> None:
    def probe_twice() -> None:
        try:
            underlay.probe(slow)
        finally:
            assert underlay.probe(slow).format == "qcow2"

    with pytest.raises(underlay.TimeLimitError), underlay.TimeLimit(0):
        probe_twice()


def test_a_task_that_takes_long_is_not_waited_for_beyond_its_stop() -> None:
    stopped: list[bool] = []

    def work(_: int) -> None:
        while not stopped:
            time.sleep(0.01)

    tasks = in_parallel(
        work, range(8), parallel=2, executor=None, stop=lambda: stopped.append(True)
    )
    with pytest.raises(underlay.TimeLimitError), underlay.TimeLimit(_LIMIT):
        list(tasks)
    assert stopped


def test_steps_end_too_but_not_the_last_which_shows_it_all() -> None:
    steps, limit = Steps(None, 2), underlay.TimeLimit(0)
    with pytest.raises(underlay.TimeLimitError), limit:
        steps.did()
    with suppress(underlay.TimeLimitError), limit:
        steps.did()
        steps.end()
    assert steps.done == steps.total


class Silent(Storage):
    """Never answers, until it is cancelled. It tells when it was asked."""

    cancelled = False

    def __init__(self, asked: Callable[[], object]) -> None:
        self._asked = asked

    def name(self) -> str:
        return "silent"

    def size(self) -> int:
        return _MIB

    async def readv(self, buffers: ReadBuffers, offset: int) -> None:
        self._asked()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


def test_a_client_in_an_event_loop_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    silent, started = Silent(asked.set), time.monotonic()
    # For the limit, time passes only while the request is under way.
    clock = SimpleNamespace(monotonic=lambda: _LIMIT if asked.is_set() else 0)
    monkeypatch.setattr(time_limit, "time", clock)
    with pytest.raises(underlay.TimeLimitError), underlay.TimeLimit(_LIMIT):
        underlay.probe(silent)
    assert silent.cancelled
    assert time.monotonic() - started < _OVER


def test_awaitable_work_has_the_timeout_of_asyncio() -> None:
    asked: list[Silent] = []

    async def look() -> None:
        async with asyncio.timeout(None) as timeout:
            now = asyncio.get_running_loop().time
            asked.append(Silent(lambda: timeout.reschedule(now() + _LIMIT)))
            await aio.probe(asked[0])

    with pytest.raises(TimeoutError):
        asyncio.run(look())
    assert asked[0].cancelled


@pytest.mark.parametrize("seconds", [-1, math.nan])
def test_a_limit_is_a_number_of_seconds(seconds: float) -> None:
    with pytest.raises(underlay.OptionError):
        underlay.TimeLimit(seconds)
