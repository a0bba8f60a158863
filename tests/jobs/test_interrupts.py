"""A signal may come at any moment of a job: it ends, and never waits for ever."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import underlay
from underlay import jobs
from underlay.jobs.workers import in_parallel
from underlay_drivers.qcow2.allocation import Allocator
from underlay_drivers.qcow2.writeback import Writeback
from underlay_storage.file import descriptors

_ROUNDS = """
import random, signal, sys
from contextlib import closing
from underlay.jobs.workers import in_parallel

def end(*_):
    raise KeyboardInterrupt

def again(unraisable):
    # Python cannot raise it out of what it calls on its own, as when an object goes away.
    if unraisable.exc_type is KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0.001)

sys.unraisablehook = again
signal.signal(signal.SIGALRM, end)
random.seed(1)
hit = 0
for _ in range(300):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.004))
        work = in_parallel(abs, range(10**9), parallel=4, executor=None, stop=lambda: None)
        with closing(work) as results:
            for _ in results:
                pass
    except KeyboardInterrupt:
        hit += 1
print(hit)
"""


def test_tasks_are_interrupted_at_any_moment() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ROUNDS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "300\n"), done.stderr


@pytest.mark.parametrize("options", [{}, {"output_format": "qcow2"}])
def test_an_interrupt_as_the_target_comes_to_be_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    (tmp_path / "source").write_bytes(b"data" * 1000)
    real = descriptors.create_new

    def interrupted(path: str) -> int:
        made = real(path)
        signal.raise_signal(signal.SIGINT)
        return made

    monkeypatch.setattr(descriptors, "create_new", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jobs.convert(tmp_path / "source", tmp_path / "target", **options)
    assert not (tmp_path / "target").exists()


def test_a_call_that_an_interrupt_left_counted_holds_no_close_up(tmp_path: Path) -> None:
    jobs.create(tmp_path / "disk", size="1M")
    disk = underlay.open_any(tmp_path / "disk")
    disk._life.call().__enter__()
    left = disk.in_use()
    left.__enter__()
    disk.close()
    assert disk.closed


def test_an_interrupted_close_waits_for_other_threads(tmp_path: Path) -> None:
    jobs.create(tmp_path / "disk", size="1M")
    disk = underlay.open_any(tmp_path / "disk")
    begun, ended = threading.Event(), threading.Event()

    def use() -> None:
        with disk.in_use():
            begun.set()
            time.sleep(0.05)
            assert not disk.inner.collect_storage_dependencies()[0].closed
            ended.set()

    def interrupted() -> None:
        with disk:
            begun.wait(30)
            raise KeyboardInterrupt

    thread = threading.Thread(target=use)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ended.is_set()
    thread.join()


def test_a_disk_that_is_closed_out_of_its_own_call_says_so(tmp_path: Path) -> None:
    jobs.create(tmp_path / "disk", size="1M")

    def close(*_: int) -> None:
        disk.close()

    with underlay.open_any(tmp_path / "disk", writable=True) as disk:
        with pytest.raises(RuntimeError, match="make it when that has ended"):
            disk.resize("2M", "full", close)
        assert not disk.closed


class _Complaining(ThreadPoolExecutor):
    """Interrupted in a lock of its own, which it then does not hold: as may happen at any time."""

    def submit(self, *_args: Any, **_kwargs: Any) -> Any:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("cannot release un-acquired lock")


def test_an_interrupt_inside_the_executor_is_still_one() -> None:
    with _Complaining(1) as executor, pytest.raises(KeyboardInterrupt):
        list(in_parallel(abs, [1], parallel=1, executor=executor, stop=lambda: None))


def test_an_executor_that_was_shut_down_says_so() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(in_parallel(abs, [1], parallel=1, executor=executor, stop=lambda: None))


@pytest.mark.parametrize("moment", [1, 2, 50, 120])
@pytest.mark.parametrize("where", ["let go", "freed"])
def test_a_shrinking_that_is_interrupted_leaks_at_worst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, moment: int
) -> None:
    """At the worst moments: when half of what belongs together has happened."""
    path = tmp_path / "disk.qcow2"
    jobs.create(path, size="64k", cluster_size=512, preallocation="metadata")
    calls = 0

    def hit() -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt

    release, change = Writeback.release, Allocator.change

    def interrupted_release(self: Writeback, offset: int, clusters: int = 1) -> None:
        release(self, offset, clusters)
        hit()

    async def interrupted_change(self: Allocator, offset: int, delta: int) -> int:
        left = await change(self, offset, delta)
        hit()
        return left

    if where == "let go":
        monkeypatch.setattr(Writeback, "release", interrupted_release)
    else:
        monkeypatch.setattr(Allocator, "change", interrupted_change)
    with pytest.raises(KeyboardInterrupt):
        jobs.resize(path, "1k", shrink=True)
    monkeypatch.undo()
    found = jobs.check(path)
    assert not found.corruptions
    assert found.leaks <= (64 if where == "let go" else 1)
    assert jobs.info(path)[0].virtual_size == 1024
    assert not jobs.info(path)[0].description.corrupt
