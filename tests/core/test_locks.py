"""Locks that both faces wait for, alone and against each other."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from underlay.face import run_blocking
from underlay.locks import Lock, RangeLocks


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def waiters(locks: RangeLocks) -> int:
    return len(locks._queue)


def all_free(locks: RangeLocks) -> bool:
    return not locks._held and not locks._queue


def test_shared_holders_share_and_exclusive_ones_do_not() -> None:
    async def check() -> None:
        locks = RangeLocks()
        async with (
            locks.hold(0, 10, exclusive=False),
            locks.hold(5, 15, exclusive=False),
            locks.hold(15, 20, exclusive=True),
            locks.hold(20, 30, exclusive=True),
        ):
            blocked = asyncio.ensure_future(locks.acquire(9, 10, exclusive=True))
            await asyncio.sleep(0)
            assert waiters(locks) == 1
            assert not blocked.done()
        locks.release(await blocked)
        assert all_free(locks)

    asyncio.run(check())


def test_waiters_come_in_the_order_of_their_arrival() -> None:
    async def check() -> None:
        locks = RangeLocks()
        order: list[str] = []

        async def take(name: str, start: int, end: int, *, exclusive: bool) -> None:
            async with locks.hold(start, end, exclusive=exclusive):
                order.append(name)
                await asyncio.sleep(0.001)

        first = await locks.acquire(0, 100, exclusive=False)
        tasks: list[asyncio.Future[None]] = []
        for name, start, end, exclusive in (
            ("writer", 0, 50, True),
            ("reader", 40, 60, False),  # shared with the first, but not ahead of the writer
            ("elsewhere", 60, 70, False),
            ("last", 0, 100, True),
        ):
            tasks.append(asyncio.ensure_future(take(name, start, end, exclusive=exclusive)))
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert order == ["elsewhere"]
        locks.release(first)
        await asyncio.gather(*tasks)
        assert order == ["elsewhere", "writer", "reader", "last"]
        assert all_free(locks)

    asyncio.run(check())


def test_a_cancelled_waiter_stands_in_nobodys_way() -> None:
    async def check() -> None:
        locks = RangeLocks()
        first = await locks.acquire(0, 10, exclusive=False)
        writer = asyncio.ensure_future(locks.acquire(0, 10, exclusive=True))
        reader = asyncio.ensure_future(locks.acquire(0, 10, exclusive=False))
        await asyncio.sleep(0)
        writer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writer
        locks.release(await asyncio.wait_for(reader, 60))
        locks.release(first)
        assert all_free(locks)

    asyncio.run(check())


def test_a_waiter_cancelled_just_as_its_turn_comes_hands_the_lock_on() -> None:
    async def check() -> None:
        locks = RangeLocks()
        first = await locks.acquire(0, 10, exclusive=True)
        second = asyncio.ensure_future(locks.acquire(0, 10, exclusive=True))
        third = asyncio.ensure_future(locks.acquire(0, 10, exclusive=True))
        await asyncio.sleep(0)
        locks.release(first)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        locks.release(await asyncio.wait_for(third, 60))
        assert all_free(locks)

    asyncio.run(check())


def test_threads_and_tasks_exclude_each_other() -> None:
    lock = Lock()
    count = [0]
    loops, rounds = 2, 200

    async def add() -> None:
        async with lock:
            seen = count[0]
            await give_way()
            count[0] = seen + 1

    async def give_way() -> None:
        from underlay.face import is_blocking

        if is_blocking():
            time.sleep(0)
        else:
            await asyncio.sleep(0)

    async def many() -> None:
        await asyncio.gather(*(add() for _ in range(rounds)))

    def thread() -> None:
        for _ in range(rounds):
            run_blocking(add())

    threads = [threading.Thread(target=thread) for _ in range(2)]
    threads += [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(loops)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert count == [4 * rounds]


def held_by_another_thread(locks: RangeLocks) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run_blocking, locks.acquire(0, 10, exclusive=True)).result()


def test_a_lock_is_free_again_after_an_error() -> None:
    lock = Lock()

    async def fail() -> None:
        async with lock:
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            run_blocking(fail())
        with pytest.raises(KeyError):
            asyncio.run(fail())


def test_an_interrupted_thread_waits_no_longer() -> None:
    locks = RangeLocks()
    holder = held_by_another_thread(locks)

    def interrupt() -> None:
        wait_until(lambda: waiters(locks))
        time.sleep(0.05)  # until it waits, and no longer stands between its place and the waiting
        signal.pthread_kill(waiting, signal.SIGINT)

    waiting = threading.get_ident()
    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(KeyboardInterrupt):
        run_blocking(locks.acquire(0, 10, exclusive=True))
    helper.join()
    locks.release(holder)
    assert all_free(locks)


def test_a_thread_does_not_wait_for_what_an_interrupt_let_it_keep() -> None:
    locks = RangeLocks()
    left = run_blocking(locks.acquire(0, 10, exclusive=True))
    other = run_blocking(locks.acquire(20, 30, exclusive=True))
    holder = run_blocking(locks.acquire(5, 15, exclusive=True))
    locks.release(left)
    assert not all_free(locks)
    locks.release(holder)
    locks.release(other)
    assert all_free(locks)


def test_who_waits_for_what_an_interrupt_left_has_it_when_that_is_found() -> None:
    locks = RangeLocks()
    run_blocking(locks.acquire(0, 10, exclusive=True))  # never given back
    order: list[str] = []

    async def take(name: str) -> None:
        async with locks.hold(0, 10, exclusive=True):
            order.append(name)

    other = threading.Thread(target=run_blocking, args=(take("the one who waited"),))
    other.start()
    wait_until(lambda: waiters(locks))
    run_blocking(take("the interrupted one"))
    other.join(30)
    assert order == ["the one who waited", "the interrupted one"]
    assert all_free(locks)


def test_a_call_out_of_a_callback_says_that_it_would_wait_for_itself() -> None:
    locks = RangeLocks()

    async def working() -> None:
        async with locks.hold(0, 10, exclusive=True):
            with pytest.raises(RuntimeError, match="callback"):
                run_blocking(locks.acquire(5, 6, exclusive=False))
            assert not all_free(locks)

    run_blocking(working())
    assert all_free(locks)


def test_nobody_loses_a_lock_to_the_thread_that_had_it_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock = Lock()
    assert lock.try_acquire()
    lock.release()
    granted, real = threading.Event(), RangeLocks.try_grant
    order: list[str] = []

    def slow(self: RangeLocks, wanted: Any) -> bool:
        done = real(self, wanted)
        if threading.current_thread() is other:
            granted.set()
            wait_until(lambda: waiters(lock._ranges) or order)
        return done

    def have() -> None:
        assert lock.try_acquire()
        order.append("the first")
        lock.release()

    async def take() -> None:
        async with lock:
            order.append("the waiter")

    monkeypatch.setattr(RangeLocks, "try_grant", slow)
    other = threading.Thread(target=have)
    other.start()
    granted.wait(30)
    run_blocking(take())
    other.join()
    assert order == ["the first", "the waiter"]
    assert all_free(lock._ranges)


def test_a_blocking_call_does_not_wait_for_the_loop_that_it_stops() -> None:
    async def check() -> None:
        locks = RangeLocks()
        async with locks.hold(0, 10, exclusive=True):
            with pytest.raises(RuntimeError, match="await the disk instead"):
                run_blocking(locks.acquire(5, 6, exclusive=False))
        assert all_free(locks)
        locks.release(run_blocking(locks.acquire(5, 6, exclusive=False)))

    asyncio.run(check())


def test_a_blocking_call_inside_a_loop_waits_for_another_thread() -> None:
    locks = RangeLocks()
    holder = held_by_another_thread(locks)

    def let_go() -> None:
        wait_until(lambda: waiters(locks))
        locks.release(holder)

    async def check() -> None:
        locks.release(run_blocking(locks.acquire(0, 10, exclusive=True)))

    helper = threading.Thread(target=let_go)
    helper.start()
    asyncio.run(check())
    helper.join()
    assert all_free(locks)


def test_a_waiter_whose_loop_has_died_is_passed_over() -> None:
    locks = RangeLocks()
    holder = held_by_another_thread(locks)
    loop = asyncio.new_event_loop()
    abandoned = locks.acquire(0, 10, exclusive=True)

    async def wait() -> None:
        await abandoned

    task = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0))
    assert waiters(locks) == 1
    loop.close()
    locks.release(holder)
    assert all_free(locks)
    # The loop's user would see this warning; here it is about the test's own doing.
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    abandoned.close()
    assert all_free(locks)


def test_a_lock_that_is_free_is_had_at_once() -> None:
    lock = Lock()

    assert lock.try_acquire()
    assert not lock.try_acquire()
    lock.release()
    assert lock.try_acquire()
    lock.release()


def test_whoever_waits_for_a_lock_taken_at_once_gets_it_next() -> None:
    lock = Lock()
    order: list[str] = []

    async def take() -> None:
        async with lock:
            order.append("the waiter")

    assert lock.try_acquire()
    waiter = threading.Thread(target=run_blocking, args=(take(),))
    waiter.start()
    wait_until(lambda: waiters(lock._ranges))
    assert not lock.try_acquire()
    order.append("the first")
    lock.release()
    waiter.join(30)

    assert order == ["the first", "the waiter"]
    assert all_free(lock._ranges)


def test_a_range_is_had_at_once_unless_somebody_has_or_wants_part_of_it() -> None:
    async def check() -> None:
        locks = RangeLocks()
        first = locks.try_acquire(0, 10, exclusive=True)
        assert first is not None
        beside = locks.try_acquire(10, 20, exclusive=True)
        assert beside is not None
        assert locks.try_acquire(5, 6, exclusive=False) is None
        waiting = asyncio.ensure_future(locks.acquire(9, 30, exclusive=True))
        await asyncio.sleep(0)
        assert locks.try_acquire(25, 26, exclusive=True) is None
        locks.release(first)
        locks.release(beside)
        locks.release(await waiting)
        assert all_free(locks)

    asyncio.run(check())
