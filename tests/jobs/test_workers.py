"""Tasks on an executor: none is lost, however they come and end."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from underlay import TimeLimit
from underlay.jobs.workers import Running, in_parallel


def never() -> None:
    """For jobs that nobody stops."""


class Late(queue.SimpleQueue[int]):
    """Where somebody adds a task just as a thread has found that there is none."""

    def __init__(self, add: Callable[[], None]) -> None:
        super().__init__()
        self._add: Callable[[], None] | None = add

    def get_nowait(self) -> int:
        try:
            return super().get_nowait()
        except queue.Empty:
            add, self._add = self._add, None
            if add is not None:
                add()
            raise


def test_a_task_that_comes_as_a_thread_finds_none_is_done() -> None:
    with ThreadPoolExecutor(1) as executor, TimeLimit(60):
        running: Running[int, int] = Running(abs, executor, threads=1)
        running._to_do = Late(lambda: running.begin(-2))
        running.begin(-1)
        assert [running.result(), running.result()] == [1, 2]


def test_no_error_of_a_task_is_taken_for_the_end_of_all() -> None:
    def work(number: int) -> int:
        raise queue.Empty(number)

    with pytest.raises(queue.Empty):
        list(in_parallel(work, range(8), parallel=2, executor=None, stop=never))


def test_a_lent_executor_is_free_for_others_between_tasks() -> None:
    with ThreadPoolExecutor(1) as executor:
        done = in_parallel(abs, range(100), parallel=1, executor=executor, stop=never)
        first = next(done)
        assert executor.submit(lambda: "others").result(timeout=60) == "others"
        assert sorted([first, *done]) == list(range(100))


def test_tasks_that_a_lent_executor_drops_end_the_job() -> None:
    executor = ThreadPoolExecutor(1)

    def work(_number: int) -> None:
        executor.shutdown(wait=False, cancel_futures=True)

    with pytest.raises((CancelledError, RuntimeError)):
        list(in_parallel(work, range(8), parallel=4, executor=executor, stop=never))
