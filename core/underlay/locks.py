"""Locks that coroutines of either face can wait for, and both faces at once.

``asyncio`` locks need a loop and belong to one; ``threading`` locks would stop a loop. These block
the thread on the blocking face and suspend the task on the async one.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from underlay.face import Caller, current_loop, is_blocking

if TYPE_CHECKING:
    import asyncio
    from types import TracebackType

__all__ = ["Lock", "RangeLocks"]


class _Holder(Caller):
    """A range that is locked, and by whom."""

    __slots__ = ("end", "exclusive", "start")

    def __init__(self, start: int, end: int, *, exclusive: bool) -> None:
        super().__init__()
        self.start = start
        self.end = end
        self.exclusive = exclusive

    def excludes(self, other: _Holder) -> bool:
        return (
            (self.exclusive or other.exclusive)
            and self.start < other.end
            and other.start < self.end
        )


class _Waiter(Protocol):
    """How one who was told to wait does so, on the face that it came from."""

    async def wait(self) -> None: ...

    def wake(self) -> bool:
        """Called from any thread; False if nobody is left to wake."""
        ...


class _ThreadWaiter:
    """Blocks the thread."""

    __slots__ = ("_woken",)

    def __init__(self) -> None:
        self._woken = threading.Event()

    async def wait(self) -> None:
        self._woken.wait()

    def wake(self) -> bool:
        self._woken.set()
        return True


class _TaskWaiter:
    """Suspends the task."""

    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()

    async def wait(self) -> None:
        await self._future

    def wake(self) -> bool:
        if current_loop() is self._loop:
            self._fulfil()
            return True
        try:
            self._loop.call_soon_threadsafe(self._fulfil)
        except RuntimeError:
            return False  # its loop was closed with the task in it
        return True

    def _fulfil(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


class RangeLocks:
    """Shared and exclusive locks on byte ranges of one object, served as they come."""

    __slots__ = ("_held", "_mutex", "_queue")

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held: list[_Holder] = []
        #: Who waits, with what wakes them.
        self._queue: list[tuple[_Holder, _Waiter]] = []

    @asynccontextmanager
    async def hold(self, start: int, end: int, *, exclusive: bool) -> AsyncGenerator[None]:
        """Hold ``[start, end)``: alone if ``exclusive``, else beside other shared holders."""
        holder = await self.acquire(start, end, exclusive=exclusive)
        try:
            yield
        finally:
            self.release(holder)

    async def acquire(self, start: int, end: int, *, exclusive: bool) -> _Holder:
        """Take a lock; give what this returns to ``release``.

        Raises:
            RuntimeError: a blocking call would wait for a task of the event loop that it stops, or
                for another blocking call that it is made in.
        """
        at_once = self.try_acquire(start, end, exclusive=exclusive)
        if at_once is not None:
            return at_once
        wanted = _Holder(start, end, exclusive=exclusive)
        with self._mutex:
            self._forget_left(wanted)
            blockers = self._blockers(wanted)
            if not blockers:
                self._held.append(wanted)
                return wanted
            waiter: _Waiter
            if is_blocking():
                wanted.check_can_wait(blockers)
                waiter = _ThreadWaiter()
            else:
                waiter = _TaskWaiter()
            self._queue.append((wanted, waiter))
        try:
            await waiter.wait()
        except BaseException:
            # Cancelled or interrupted, perhaps after the lock was granted.
            self._give_up(wanted)
            raise
        return wanted

    def try_acquire(self, start: int, end: int, *, exclusive: bool) -> _Holder | None:
        """Take a lock if that needs no waiting; None otherwise."""
        holder = _Holder(start, end, exclusive=exclusive)
        return holder if self.try_grant(holder) else None

    def try_grant(self, wanted: _Holder) -> bool:
        """Let ``wanted`` hold its range if nobody excludes it; whether it does."""
        with self._mutex:
            if (self._held or self._queue) and self._blockers(wanted):
                return False
            self._held.append(wanted)
        return True

    def release(self, holder: _Holder) -> None:
        """Give a lock back, and hand its range on."""
        with self._mutex:
            if holder in self._held:
                self._held.remove(holder)
            if self._queue:
                self._hand_on()

    def _forget_left(self, wanted: _Holder) -> None:
        """Drop what earlier calls of the asking thread hold: it would wait for them without end.

        An interrupt left it, which came as the lock was taken, or was to be given back.
        """

        def is_left(other: _Holder) -> bool:
            return other.was_before(wanted) and other.excludes(wanted)

        self._held = [held for held in self._held if not is_left(held)]
        self._queue = [entry for entry in self._queue if not is_left(entry[0])]
        self._hand_on()

    def _blockers(self, wanted: _Holder) -> list[_Holder]:
        return [held for held in self._held if held.excludes(wanted)] + [
            waiting for waiting, _ in self._queue if waiting.excludes(wanted)
        ]

    def _hand_on(self) -> None:
        """Give every waiter that nothing earlier excludes its lock, and wake it."""
        still: list[tuple[_Holder, _Waiter]] = []
        for wanted, waiter in self._queue:
            if any(held.excludes(wanted) for held in self._held) or any(
                earlier.excludes(wanted) for earlier, _ in still
            ):
                still.append((wanted, waiter))
            elif waiter.wake():
                self._held.append(wanted)
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

    __slots__ = ("_at_once", "_holder", "_ranges")

    def __init__(self) -> None:
        self._ranges = RangeLocks()
        self._holder: _Holder | None = None
        #: Whoever holds it without ever waiting: one at a time, and of no loop that could stop.
        self._at_once = _Holder(0, 1, exclusive=True)
        self._at_once.depth = 0
        self._at_once.loop = None
        self._at_once.thread = None

    def try_acquire(self) -> bool:
        """Take it if it is free; then give it to ``release`` soon, without awaiting anything."""
        if not self._ranges.try_grant(self._at_once):
            return False
        self._at_once.thread = threading.get_ident()
        self._holder = self._at_once
        return True

    def release(self) -> None:
        """Give back what ``try_acquire`` took."""
        holder, self._holder = self._holder, None
        if holder is not None:
            # Or the next to have it would, for a moment, seem to be this thread.
            self._at_once.thread = None
            self._ranges.release(holder)

    async def __aenter__(self) -> None:
        self._holder = await self._ranges.acquire(0, 1, exclusive=True)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
