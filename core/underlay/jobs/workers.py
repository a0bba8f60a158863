"""Running a job's tasks on an executor, a bounded number of them at a time."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import TYPE_CHECKING, Generic, NoReturn, Protocol, TypeGuard, TypeVar

from underlay.errors import OptionError, UnsupportedOperationError
from underlay.interrupts import undisturbed
from underlay.time_limit import check_time, time_left

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

__all__ = [
    "MOST_WORKERS",
    "Running",
    "Worker",
    "in_parallel",
    "is_elsewhere",
    "sent",
    "worker_count",
]

T = TypeVar("T")
R = TypeVar("R")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

#: More at a time would need more memory than a job may have.
MOST_WORKERS = 16
#: As many by default at most: a disk or a memory bus has enough of them by then.
_DEFAULT_MOST = 8
#: Seconds between two looks at whether all tasks have ended.
_PAUSE = 0.001


class Worker(Protocol[T_contra, R_co]):
    """Does the tasks of a job."""

    def do(self, task: T_contra, /) -> R_co:
        """Do one; called in threads of the job."""
        ...

    def stop(self) -> None:
        """Let the tasks end."""


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
    elsewhere: Callable[[Executor], Worker[T, R]] | None = None,
) -> Generator[R, None, None]:
    """The results of ``work`` for each task, as they are ready; ``tasks`` is read no faster.

    However this ends (an error, an interrupt, or because it was closed), it then tells the tasks to
    ``stop`` and waits for those that run. With an executor of other processes, what ``elsewhere``
    makes of it does the work; twice as many tasks are on their way at a time then.

    Raises:
        UnsupportedOperationError: such an executor cannot do this work.
        WorkerError: it does none.
    """
    from concurrent.futures import ThreadPoolExecutor

    if is_elsewhere(executor):
        if elsewhere is None:
            raise UnsupportedOperationError(
                "This job works with threads, and its executor has other processes; leave it out, "
                "or give one of threads"
            )
        worker = elsewhere(executor)
        work, stop, executor, parallel = worker.do, worker.stop, None, 2 * parallel
    own = None
    if executor is None:
        executor = own = ThreadPoolExecutor(parallel, thread_name_prefix="underlay-job")
    running = Running(work, executor, threads=None if own is None else parallel)
    try:
        for task in tasks:
            running.begin(task)
            # One waits for each that runs, so that no worker does.
            while running.count >= 2 * parallel:
                yield running.result()
        while running.count:
            yield running.result()
    except BaseException:
        stop()
        raise
    finally:
        running.stop()
        if own is not None:
            with undisturbed():  # see begin(); none of them works any more
                own.shutdown(cancel_futures=True)


def is_elsewhere(executor: Executor | None) -> TypeGuard[Executor]:
    """Whether an executor works out of reach of this process's objects: in other processes.

    Raises:
        WorkerError: it does no work.
    """
    if executor is None:
        return False
    from underlay.jobs.elsewhere import shares_memory

    return not shares_memory(executor)


def sent(work: Callable[[T], R]) -> Callable[[Executor], Worker[T, R]]:
    """What lets an executor of other processes do tasks by ``work``, which pickles."""

    def make(executor: Executor) -> Worker[T, R]:
        from underlay.jobs.elsewhere import Elsewhere

        return Elsewhere(executor, work)

    return make


class Running(Generic[T, R]):
    """The tasks that have begun; what each came to arrives in a queue.

    No future is waited for: an exception that a signal raises while a future's lock is being taken
    would leave it locked, and its worker waiting for ever.
    """

    def __init__(
        self, work: Callable[[T], R], executor: Executor, *, threads: int | None = None
    ) -> None:
        """``threads`` is how many the executor has; None: it is lent, and others wait for it too.

        A lent one is called for each task. Any other goes from task to task by itself: calling it
        takes longer than much of what is to be done.
        """
        from queue import SimpleQueue

        self._work = work
        self._executor = executor
        self._threads = threads
        self._to_do: SimpleQueue[T] = SimpleQueue()
        self._ended: SimpleQueue[Callable[[], R]] = SimpleQueue()
        #: How many have begun whose result nobody has; an interrupt can leave it too high.
        self.count = 0
        self._stopped = False
        #: An entry for each thread that goes from task to task, which that one removes.
        self._going: deque[None] = deque()
        #: An entry for each that works, which that one removes.
        self._at_work: deque[None] = deque()

    def begin(self, task: T) -> None:
        """Let the executor do a task."""
        self.count += 1
        self._to_do.put(task)
        if self._threads is None or len(self._going) < self._threads:
            # In its midst, an interrupt leaves threads half started, or locks of the executor held.
            with undisturbed():
                self._call()

    def _call(self) -> None:
        try:
            if self._threads is None:
                self._executor.submit(self._do_next).add_done_callback(self._see_dropped)
            else:
                self._going.append(None)
                self._executor.submit(self._go)
        except RuntimeError as error:
            # Interrupted in a lock of its own, an executor complains of that lock.
            interrupt = error.__context__
            if isinstance(interrupt, KeyboardInterrupt):
                raise interrupt from None
            raise

    def result(self) -> R:
        """What the next task that ends came to; raises what it raised."""
        ended = self._next_ended()
        self.count -= 1
        return ended()

    def _next_ended(self) -> Callable[[], R]:
        from queue import Empty

        while True:
            check_time()
            try:
                return self._ended.get(timeout=time_left())
            except Empty:
                continue

    def stop(self) -> None:
        """Let no more of them begin to work, and wait for those that do."""
        self._stopped = True
        while self._at_work:
            time.sleep(_PAUSE)

    # -- in threads of the executor

    def _go(self) -> None:
        """Do tasks until there are none."""
        while True:
            while self._do_next():
                pass
            self._going.pop()
            # One may have come before that, for which nobody was called.
            if self._stopped or self._to_do.empty():
                return
            self._going.append(None)

    def _do_next(self) -> bool:
        """Do the next task; False if there is none, or none shall begin."""
        from queue import Empty

        self._at_work.append(None)  # before the look at what stop() sets before it looks at this
        try:
            if self._stopped:
                return False
            try:
                task = self._to_do.get_nowait()
            except Empty:
                return False
            result = self._work(task)
        except BaseException as error:  # noqa: BLE001 - it is raised again by result()
            self._ended.put(partial(_fail, error))
        else:
            self._ended.put(lambda: result)
        finally:
            self._at_work.pop()
        return True

    def _see_dropped(self, future: Future[bool]) -> None:
        from concurrent.futures import CancelledError

        if future.cancelled():
            self._ended.put(partial(_fail, CancelledError()))


def _fail(error: BaseException) -> NoReturn:
    raise error
