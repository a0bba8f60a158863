"""How the core waits: inline, in workers, and in loops of others."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import threading
import time

import pytest

from underlay.errors import ClosedError
from underlay.face import (
    current_loop,
    gather,
    home_loop,
    in_loop,
    in_worker,
    is_blocking,
    run_blocking,
)


class Gate:
    """A blocking call that a test holds up."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.passed = threading.Event()

    def call(self, answer: int = 0) -> int:
        self.entered.set()
        assert self.opened.wait(60)
        self.passed.set()
        return answer


async def entered(gate: Gate) -> None:
    while not gate.entered.is_set():
        await asyncio.sleep(0.001)


# -- the blocking face


def test_blocking_calls_run_in_the_calling_thread() -> None:
    assert run_blocking(in_worker(threading.get_ident)) == threading.get_ident()
    assert run_blocking(in_worker(is_blocking))
    assert not is_blocking()


def test_errors_come_through_as_they_are() -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_blocking(in_worker(fail))
    with pytest.raises(KeyError):
        asyncio.run(in_worker(fail))
    assert not is_blocking()


def test_the_blocking_face_works_inside_a_running_loop() -> None:
    async def check() -> None:
        assert run_blocking(in_worker(threading.get_ident)) == threading.get_ident()
        assert not is_blocking()
        assert await in_worker(threading.get_ident) != threading.get_ident()

    asyncio.run(check())


def test_a_stranger_that_suspends_is_an_error_and_not_a_hang() -> None:
    closed: list[bool] = []

    async def stranger() -> None:
        try:
            await asyncio.sleep(1)
        finally:
            closed.append(is_blocking())

    async def check() -> None:
        with pytest.raises(RuntimeError, match="not of underlay's making"):
            run_blocking(stranger())

    asyncio.run(check())
    assert closed == [True]


# -- workers


def test_a_cancelled_call_is_waited_for() -> None:
    async def check() -> None:
        gate = Gate()
        task = asyncio.ensure_future(in_worker(gate.call))
        await entered(gate)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done(), "it left while the call was still under way"
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gate.passed.is_set()

    asyncio.run(check())


def test_a_cancelled_call_that_has_not_begun_never_begins_unless_it_must() -> None:
    async def check() -> None:
        gates = [Gate() for _ in range(64)]  # more than there are workers
        tasks = [asyncio.ensure_future(in_worker(gate.call)) for gate in gates]
        await entered(gates[0])
        late, must = Gate(), Gate()
        late.opened.set()
        must.opened.set()
        cancelled = asyncio.ensure_future(in_worker(late.call))
        kept = asyncio.ensure_future(in_worker(must.call, cancellable=False))
        await asyncio.sleep(0)
        cancelled.cancel()
        kept.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        for gate in gates:
            gate.opened.set()
        await asyncio.gather(*tasks)
        with pytest.raises(asyncio.CancelledError):
            await kept
        assert must.passed.is_set()
        assert not late.entered.is_set()

    asyncio.run(check())


def test_a_failure_that_a_cancelled_task_misses_is_nobodys_trouble() -> None:
    complaints: list[object] = []

    def fail(gate: Gate) -> None:
        gate.call()
        raise KeyError

    async def check() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
        gate = Gate()
        task = asyncio.ensure_future(in_worker(fail, gate))
        await entered(gate)
        task.cancel()
        await asyncio.sleep(0)
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        import gc

        gc.collect()

    asyncio.run(check())
    assert not complaints


def test_a_timeout_ends_a_call_when_it_can_be_ended() -> None:
    async def check() -> None:
        gate, limit = Gate(), asyncio.timeout(None)

        async def call() -> None:
            async with limit:
                await in_worker(gate.call)

        task = asyncio.ensure_future(call())
        await entered(gate)
        limit.reschedule(0)
        await asyncio.sleep(0.05)
        assert not task.done()
        gate.opened.set()
        with pytest.raises(TimeoutError):
            await task
        assert gate.passed.is_set()

    asyncio.run(check())


# -- clients that live in a loop


async def where() -> asyncio.AbstractEventLoop | None:
    await asyncio.sleep(0)
    return current_loop()


def test_the_blocking_face_has_a_loop_in_the_background() -> None:
    async def check() -> asyncio.AbstractEventLoop | None:
        return await in_loop(home_loop(), where)

    background = run_blocking(check())
    assert background is not None
    assert background is run_blocking(check())

    async def from_within() -> None:
        assert run_blocking(check()) is background
        assert await check() is asyncio.get_running_loop()
        # What was opened on the blocking face is awaited from here too.
        assert await in_loop(background, where) is background

    asyncio.run(from_within())


def test_errors_come_out_of_the_other_loop() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    async def check() -> None:
        await in_loop(home_loop(), fail)

    with pytest.raises(KeyError):
        run_blocking(check())
    with pytest.raises(KeyError):
        asyncio.run(check())


def test_a_blocking_call_refuses_to_wait_for_its_own_loop() -> None:
    async def check() -> None:
        with pytest.raises(RuntimeError, match="await the disk instead"):
            run_blocking(in_loop(asyncio.get_running_loop(), where))

    asyncio.run(check())


def test_a_loop_that_has_ended_is_a_typed_error() -> None:
    ended = asyncio.new_event_loop()
    with pytest.raises(ClosedError):
        run_blocking(in_loop(ended, where))
    ended.close()
    with pytest.raises(ClosedError):
        run_blocking(in_loop(ended, where))
    with pytest.raises(ClosedError):
        asyncio.run(in_loop(ended, where))


def test_cancelling_reaches_the_client_and_waits_for_it() -> None:
    ended: list[object] = []

    async def client(started: threading.Event) -> None:
        try:
            started.set()
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.05)  # it has something to clean up
            ended.append(current_loop())

    async def check(home: asyncio.AbstractEventLoop) -> None:
        started = threading.Event()
        task = asyncio.ensure_future(in_loop(home, client, started))
        while not started.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [home]
        ended.clear()

    async def both() -> None:
        await check(asyncio.get_running_loop())
        await check(run_blocking(background()))

    async def background() -> asyncio.AbstractEventLoop:
        return home_loop()

    asyncio.run(both())


def test_an_interrupt_ends_the_wait_for_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    started, ended = threading.Event(), list[object]()

    async def client() -> None:
        try:
            started.set()
            await asyncio.sleep(600)
        finally:
            ended.append(True)

    async def call() -> None:
        await in_loop(home_loop(), client)

    def interrupted(*_: object, **__: object) -> None:
        monkeypatch.undo()
        assert started.wait(60)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(concurrent.futures, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_blocking(call())
    assert ended


# -- many at once


def test_gather_runs_as_many_as_it_may_and_no_more() -> None:
    running, most = [0], [0]

    async def work() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.001)
        running[0] -= 1

    asyncio.run(gather(3, [work] * 10))
    assert most == [3]


def test_gather_ends_with_the_first_error_when_all_have_ended() -> None:
    ended: list[object] = []

    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError

    async def linger() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(True)

    async def check() -> None:
        with pytest.raises(KeyError):
            await gather(3, [linger, fail, linger, linger])
        assert ended == [True, True]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(check())


def test_gather_on_the_blocking_face_goes_one_by_one() -> None:
    done: list[tuple[int, int]] = []

    def work(number: int) -> None:
        done.append((number, threading.get_ident()))

    run_blocking(gather(8, [lambda n=n: in_worker(work, n) for n in range(5)]))  # type: ignore[misc]
    assert done == [(n, threading.get_ident()) for n in range(5)]


# -- forks


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_makes_workers_and_a_loop_of_its_own() -> None:
    async def check() -> None:
        await in_loop(home_loop(), where)

    run_blocking(check())
    asyncio.run(in_worker(time.sleep, 0))
    child = os.fork()
    if child == 0:
        try:
            run_blocking(check())
            asyncio.run(in_worker(time.sleep, 0))
        except BaseException:  # noqa: BLE001 - nothing of this may reach the parent's tests
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status) == 0
