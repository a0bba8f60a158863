"""Running a job's tasks on an executor, a bounded number of them at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, TypeVar

from underlay.errors import OptionError

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

__all__ = ["MOST_WORKERS", "in_parallel", "worker_count"]

T = TypeVar("T")
R = TypeVar("R")

#: More at a time would need more memory than a job may have.
MOST_WORKERS = 16
#: As many by default at most: a disk or a memory bus has enough of them by then.
_DEFAULT_MOST = 8


def worker_count(parallel: int | None) -> int:
    """How many tasks to run at a time: what was asked for, or what this machine is good for.

    Raises:
        OptionError: it is not from 1 to 16.
    """
    if parallel is None:
        return min(len(os.sched_getaffinity(0)), _DEFAULT_MOST)
    if not 1 <= parallel <= MOST_WORKERS:
        raise OptionError(
            f"parallel is {parallel}; it can be from 1 to {MOST_WORKERS}", option="parallel"
        )
    return parallel


def in_parallel(
    work: Callable[[T], R],
    tasks: Iterable[T],
    *,
    parallel: int,
    executor: Executor | None,
    stop: Callable[[], None],
) -> Generator[R, None, None]:
    """The results of ``work`` for each task, as they are ready; ``tasks`` is read no faster.

    However this ends (an error, an interrupt, or because it was closed), it then tells the tasks to
    ``stop`` and waits for those that run.
    """
    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

    own = None
    if executor is None:
        executor = own = ThreadPoolExecutor(parallel, thread_name_prefix="underlay-job")
    pending: set[Future[R]] = set()
    try:
        for task in tasks:
            pending.add(executor.submit(work, task))
            # One waits for each that runs, so that no worker does.
            if len(pending) >= 2 * parallel:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BaseException:
        stop()
        raise
    finally:
        for future in pending:
            future.cancel()
        wait(pending)
        if own is not None:
            own.shutdown(cancel_futures=True)
