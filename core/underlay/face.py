"""How the one core waits: inline on the blocking face, in worker threads and loops on the async one.

All that can wait is ``async def``, written once. Whoever drives such a coroutine decides how it waits:
``run_blocking`` drives it inline, so that it never suspends and needs no loop; awaiting it in an event
loop moves blocking calls to workers. The surroundings decide nothing: ``run_blocking`` does the same
inside a running loop as outside of one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["current_loop", "gather", "home_loop", "in_loop", "in_worker", "is_blocking", "run_blocking"]

T = TypeVar("T")


class _Driving(threading.local):
    """Which face drives the coroutine that runs in this thread right now."""

    blocking = False


_driving = _Driving()
_start_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_background: asyncio.AbstractEventLoop | None = None


def is_blocking() -> bool:
    """Whether the running coroutine is driven by ``run_blocking``."""
    return _driving.blocking


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Drive a coroutine of this library to its end in the calling thread, and return its result."""
    before = _driving.blocking
    _driving.blocking = True
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        _driving.blocking = before
    coroutine.close()
    raise RuntimeError(
        "a coroutine suspended on the blocking face: a driver or storage awaited something that is "
        "not of underlay's making"
    )


async def in_worker(function: Callable[..., T], *args: object) -> T:
    """Call a function that may block: inline on the blocking face, in a worker thread otherwise.

    A system call cannot be cancelled: when the awaiting task is, this waits until the call has ended,
    and only then lets the cancellation through. What the call uses stays held until then.
    """
    if _driving.blocking:
        return function(*args)
    import asyncio

    submitted = _workers().submit(function, *args)
    future = asyncio.wrap_future(submitted)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if not submitted.cancel():
            await _settled(future)
        raise


async def in_loop(
    loop: asyncio.AbstractEventLoop, function: Callable[..., Coroutine[Any, Any, T]], *args: object
) -> T:
    """Call a coroutine function of a client that lives in ``loop``, from any face and any thread."""
    import asyncio

    here = current_loop()
    if not _driving.blocking and here is loop:
        task = loop.create_task(function(*args))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                task.cancel()
                await _settled(task)
            raise
    if here is loop:
        raise RuntimeError(
            "this storage lives in the event loop of this very thread, which a blocking call would "
            "stop: await the disk instead, or open it on the blocking face"
        )
    submitted = asyncio.run_coroutine_threadsafe(function(*args), loop)
    if _driving.blocking:
        return submitted.result()
    future = asyncio.wrap_future(submitted)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        submitted.cancel()
        raise


async def gather(limit: int, calls: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    """Run coroutines, up to ``limit`` at a time on the async face, one by one on the blocking one.

    The first error cancels the others; it is raised when all of them have ended.
    """
    if _driving.blocking or limit <= 1 or len(calls) <= 1:
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


def current_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop running in this thread, or None; imports no asyncio to find out."""
    import sys

    module = sys.modules.get("asyncio")
    if module is None:
        return None
    loop: asyncio.AbstractEventLoop | None = module._get_running_loop()
    return loop


def home_loop() -> asyncio.AbstractEventLoop:
    """The loop in which a client opened here lives: the running one, or the background one."""
    if not _driving.blocking:
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
    global _pool
    if _pool is None:
        from concurrent.futures import ThreadPoolExecutor

        with _start_lock:
            if _pool is None:
                workers = min(32, (os.cpu_count() or 1) + 4)
                _pool = ThreadPoolExecutor(workers, thread_name_prefix="underlay-io")
    return _pool


def _background_loop() -> asyncio.AbstractEventLoop:
    """The one loop, in a thread of its own, for coroutine storages of the blocking face."""
    global _background
    if _background is None:
        import asyncio

        with _start_lock:
            if _background is None:
                import atexit

                loop = asyncio.new_event_loop()
                thread = threading.Thread(target=loop.run_forever, name="underlay-loop", daemon=True)
                thread.start()
                atexit.register(_stop_background, loop, thread)
                _background = loop
    return _background


def _stop_background(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5)
    if not loop.is_running():
        loop.close()


def _after_fork() -> None:
    global _pool, _background, _start_lock
    _pool = None
    _background = None
    _start_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
