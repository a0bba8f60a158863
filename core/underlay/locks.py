"""Locks that coroutines of either face can wait for, and both faces at once.

``asyncio`` locks need a loop and belong to one; ``threading`` locks would stop a loop. These block the
thread on the blocking face and suspend the task on the async one.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from underlay.face import current_loop, is_blocking

if TYPE_CHECKING:
    import asyncio
    from types import TracebackType

__all__ = ["Lock", "RangeLocks"]


class _Holder:
    """A range that is locked, and by whom."""

    __slots__ = ("end", "exclusive", "loop", "start")

    def __init__(self, start: int, end: int, *, exclusive: bool) -> None:
        self.start = start
        self.end = end
        self.exclusive = exclusive
        self.loop = None if is_blocking() else current_loop()

    def excludes(self, other: _Holder) -> bool:
        return (
            (self.exclusive or other.exclusive)
            and self.start < other.end
            and other.start < self.end
        )


class RangeLocks:
    """Shared and exclusive locks on byte ranges of one object, served in the order of their arrival."""

    __slots__ = ("_held", "_mutex", "_queue")

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held: list[_Holder] = []
        #: Who waits, with what wakes them.
        self._queue: list[tuple[_Holder, Callable[[], None]]] = []

    @asynccontextmanager
    async def hold(self, start: int, end: int, *, exclusive: bool) -> AsyncIterator[None]:
        """Hold ``[start, end)``: alone if ``exclusive``, else together with other shared holders."""
        holder = await self.acquire(start, end, exclusive=exclusive)
        try:
            yield
        finally:
            self.release(holder)

    async def acquire(self, start: int, end: int, *, exclusive: bool) -> _Holder:
        """Take a lock; give what this returns to ``release``."""
        wanted = _Holder(start, end, exclusive=exclusive)
        with self._mutex:
            blockers = self._blockers(wanted)
            if not blockers:
                self._held.append(wanted)
                return wanted
            if is_blocking():
                here = current_loop()
                if here is not None and any(blocker.loop is here for blocker in blockers):
                    raise RuntimeError(
                        "a blocking call waits for a task of the event loop that it stops: "
                        "await the disk instead"
                    )
                woken = threading.Event()
                self._queue.append((wanted, woken.set))
                future = None
            else:
                future, wake = _loop_waiter()
                self._queue.append((wanted, wake))
                woken = None
        if woken is not None:
            woken.wait()
        if future is not None:
            try:
                await future
            except BaseException:
                self._give_up(wanted)
                raise
        return wanted

    def release(self, holder: _Holder) -> None:
        """Give a lock back, and hand its range on."""
        with self._mutex:
            self._held.remove(holder)
            self._hand_on()

    def _blockers(self, wanted: _Holder) -> list[_Holder]:
        return [held for held in self._held if held.excludes(wanted)] + [
            waiting for waiting, _ in self._queue if waiting.excludes(wanted)
        ]

    def _hand_on(self) -> None:
        """Give every waiter that nothing earlier excludes its lock, and wake it."""
        still: list[tuple[_Holder, Callable[[], None]]] = []
        for wanted, wake in self._queue:
            if any(held.excludes(wanted) for held in self._held) or any(
                earlier.excludes(wanted) for earlier, _ in still
            ):
                still.append((wanted, wake))
            else:
                self._held.append(wanted)
                wake()
        self._queue = still

    def _give_up(self, wanted: _Holder) -> None:
        with self._mutex:
            if wanted in self._held:
                self._held.remove(wanted)
            else:
                self._queue = [entry for entry in self._queue if entry[0] is not wanted]
            self._hand_on()


class Lock:
    """Mutual exclusion: ``async with lock:`` on either face. Not reentrant."""

    __slots__ = ("_holder", "_ranges")

    def __init__(self) -> None:
        self._ranges = RangeLocks()
        self._holder: _Holder | None = None

    async def __aenter__(self) -> None:
        self._holder = await self._ranges.acquire(0, 1, exclusive=True)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        holder, self._holder = self._holder, None
        if holder is not None:
            self._ranges.release(holder)


def _loop_waiter() -> tuple[asyncio.Future[None], Callable[[], None]]:
    """A future of the running loop, and a function for any thread that fulfils it."""
    import asyncio

    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def fulfil() -> None:
        if not future.done():
            future.set_result(None)

    def wake() -> None:
        loop.call_soon_threadsafe(fulfil)

    return future, wake
