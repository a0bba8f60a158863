"""Tasks on an executor: none is lost, however they come and end."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from underlay.jobs.workers import in_parallel


def never() -> None:
    """For jobs that nobody stops."""


@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_tasks_that_come_slowly_are_all_done(parallel: int) -> None:
    """Threads find nothing to do again and again, just as another task comes."""

    def trickle() -> Iterator[int]:
        for number in range(20_000):
            if number % 7 == 0:
                sum(range(number % 1000))  # a little while
            yield number

    done = in_parallel(abs, trickle(), parallel=parallel, executor=None, stop=never)
    assert sorted(done) == list(range(20_000))


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
