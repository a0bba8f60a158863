"""How the one core waits: inline on the blocking face, in workers and loops on the async one.

All that can wait is ``async def``, written once. Whoever drives such a coroutine decides how it
waits: ``run_blocking`` drives it inline, so that it never suspends and needs no loop; awaiting it
in an event loop moves blocking calls to workers. The surroundings decide nothing: ``run_blocking``
does the same inside a running loop as outside of one.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from underlay.errors import ClosedError, TimeLimitError
from underlay.time_limit import check_time_to_read, time_left

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = [
    "Caller",
    "current_loop",
    "gather",
    "home_loop",
    "in_loop",
    "in_worker",
    "is_blocking",
    "run_blocking",
    "to_the_end",
]

T = TypeVar("T")


class _Driving(threading.local):
    """Which face drives the coroutine that runs in this thread right now."""

    #: How many blocking calls this thread is in, one within the other; none: it is the async face.
    depth = 0


_driving = _Driving()


class _Shared:
    """What all disks of this process share, made when it is first needed."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget it all: a forked child has neither the threads nor the locks that they held."""
        self.start_lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        self.loop: asyncio.AbstractEventLoop | None = None


_shared = _Shared()


def is_blocking() -> bool:
    """Whether the running coroutine is driven by ``run_blocking``."""
    return _driving.depth > 0


class Caller:
    """Who is in the midst of a call: a task of an event loop, or a thread."""

    __slots__ = ("depth", "loop", "thread")

    def __init__(self) -> None:
        #: Which blocking call it is, of those that its thread is in; 0: none.
        self.depth = _driving.depth
        self.loop = None if self.depth else current_loop()
        self.thread = threading.get_ident() if self.loop is None else None

    def was_before(self, now: Caller) -> bool:
        """Whether it was of the thread of ``now``, and has ended.

        An interrupt may have kept it from saying so.
        """
        return (
            self.thread is not None and self.thread == now.thread and not 0 < self.depth < now.depth
        )

    def check_can_wait(self, others: Iterable[Caller]) -> None:
        """Look whether this one, which blocks its thread, can wait for others.

        Raises:
            RuntimeError: one of them waits, in turn, for this one.
        """
        here = current_loop()
        for other in others:
            if here is not None and other.loop is here:
                raise RuntimeError(
                    "a blocking call waits for a task of the event loop that it stops: "
                    "await the disk instead"
                )
            if other.thread == self.thread and not other.was_before(self):
                raise RuntimeError(
                    "a blocking call waits for the one that it is made in, as out of a callback: "
                    "make it when that has ended"
                )


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Drive a coroutine of this library to its end in the calling thread, and return its result."""
    before = _driving.depth
    _driving.depth = before + 1
    try:
        coroutine.send(None)
        # It suspended: let it unwind while this face still drives it.
        coroutine.close()
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        _driving.depth = before
    raise RuntimeError(
        "a coroutine suspended on the blocking face: a driver or storage awaited something that is "
        "not of underlay's making"
    )


async def in_worker(function: Callable[..., T], *args: object, cancellable: bool = True) -> T:
    """Call a function that may block: inline on the blocking face, in a worker thread otherwise.

    A system call cannot be cancelled: when the awaiting task is, this waits until the call has
    ended, and only then lets the cancellation through. What the call uses stays held until then.
    Cancelled before it has begun, the call never begins, unless ``cancellable`` is False.
    """
    if _driving.depth:
        return function(*args)
    import asyncio

    submitted = _workers().submit(function, *args)
    future = asyncio.wrap_future(submitted)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if not (cancellable and submitted.cancel()):
            await _settled(future)
        raise


async def in_loop(
    loop: asyncio.AbstractEventLoop, function: Callable[..., Coroutine[Any, Any, T]], *args: object
) -> T:
    """Call a coroutine function of a client that lives in ``loop``, from any face and any thread.

    Cancelling cancels the client's coroutine, and waits until that has ended.

    Raises:
        ClosedError: the loop has ended, and the client with it.
        RuntimeError: a blocking call in the very thread of ``loop``, which would wait for itself.
    """
    here = current_loop()
    if here is loop:
        if not _driving.depth:
            return await function(*args)
        raise RuntimeError(
            "this storage lives in the event loop of this very thread, which a blocking call would "
            "stop: await the disk instead, or open it on the blocking face"
        )
    if not loop.is_running():
        raise ClosedError(
            "the event loop in which this storage was opened has ended; open it again in another"
        )
    import asyncio

    remote = _RemoteCall(loop, function, *args)
    if _driving.depth:
        return remote.wait()
    future = asyncio.wrap_future(remote.outcome)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        remote.cancel()
        await _settled(future)
        raise


class _RemoteCall(Generic[T]):
    """A coroutine that runs in the loop of another thread."""

    __slots__ = ("_loop", "_task", "outcome")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        function: Callable[..., Coroutine[Any, Any, T]],
        *args: object,
    ) -> None:
        from concurrent.futures import Future

        self._loop = loop
        self._task: asyncio.Task[T] | None = None
        #: Nobody cancels this one: it is done when the coroutine has ended, and not before.
        self.outcome: Future[T] = Future()

        async def run() -> T:
            return await function(*args)

        def start() -> None:
            self._task = loop.create_task(run())
            self._task.add_done_callback(self._finish)

        loop.call_soon_threadsafe(start)

    def wait(self) -> T:
        """Block until it has ended; an interrupt, or the end of the time, cancels it first."""
        from concurrent import futures

        try:
            while not futures.wait((self.outcome,), timeout=min(1, time_left() or 1)).done:
                check_time_to_read()
                if not self._loop.is_running():
                    raise ClosedError("the event loop in which this storage was opened has ended")
        except (KeyboardInterrupt, TimeLimitError):
            self.cancel()
            futures.wait((self.outcome,))
            raise
        return self.outcome.result()

    def cancel(self) -> None:
        """Ask the coroutine to end; ``outcome`` tells when it has."""

        def cancel() -> None:
            if self._task is not None:
                self._task.cancel()

        self._loop.call_soon_threadsafe(cancel)

    def _finish(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.outcome.set_exception(
                ClosedError(
                    "a call to a storage was cancelled: the event loop that it ran in ended"
                )
            )
            return
        error = task.exception()
        if error is None:
            self.outcome.set_result(task.result())
        else:
            self.outcome.set_exception(error)


async def gather(limit: int, calls: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    """Run coroutines, up to ``limit`` at a time on the async face, one by one on the blocking one.

    The first error cancels the others; it is raised when all of them have ended.
    """
    if _driving.depth or limit <= 1 or len(calls) <= 1:
        for call in calls:
            await call()
        return
    import asyncio

    remaining = iter(calls)

    async def worker() -> None:
        for call in remaining:
            await call()

    tasks = [asyncio.ensure_future(worker()) for _ in range(min(limit, len(calls)))]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for task in tasks:
            await _settled(task)
        raise


async def to_the_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await what must not be left half done: cancelling waits for its end, and then goes on."""
    if _driving.depth:
        return await coroutine
    import asyncio

    task = asyncio.ensure_future(coroutine)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _settled(task)
        raise


def current_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop running in this thread, or None; imports no asyncio to find out."""
    # Another thread may be in the middle of importing it: then nothing runs here yet.
    running = getattr(sys.modules.get("asyncio"), "_get_running_loop", None)
    if running is None:
        return None
    loop: asyncio.AbstractEventLoop | None = running()
    return loop


def home_loop() -> asyncio.AbstractEventLoop:
    """The loop in which a client opened here lives: the running one, or the background one."""
    if not _driving.depth:
        here = current_loop()
        if here is not None:
            return here
    return _background_loop()


async def _settled(future: asyncio.Future[Any]) -> None:
    """Wait until ``future`` is done, however often this task is cancelled meanwhile."""
    import asyncio

    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()  # looked at, so that nobody complains that it was not


def _workers() -> ThreadPoolExecutor:
    if _shared.pool is None:
        from concurrent.futures import ThreadPoolExecutor

        with _shared.start_lock:
            if _shared.pool is None:
                workers = min(32, (os.cpu_count() or 1) + 4)
                _shared.pool = ThreadPoolExecutor(workers, thread_name_prefix="underlay-io")
    return _shared.pool


def _background_loop() -> asyncio.AbstractEventLoop:
    """The one loop, in a thread of its own, for coroutine storages of the blocking face."""
    if _shared.loop is None:
        import asyncio

        with _shared.start_lock:
            if _shared.loop is None:
                import atexit

                loop = asyncio.new_event_loop()
                started = threading.Event()
                loop.call_soon(started.set)
                thread = threading.Thread(
                    target=loop.run_forever, name="underlay-loop", daemon=True
                )
                thread.start()
                started.wait()
                atexit.register(_stop_background, loop, thread)
                _shared.loop = loop
    return _shared.loop


def _stop_background(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if loop is not _shared.loop:
        return  # a forked child: the loop and its thread are the parent's
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5)
    if not loop.is_running():
        loop.close()


os.register_at_fork(after_in_child=_shared.reset)
