"""When an open disk may be used: not after it was closed, not in a forked child.

Closing waits for the calls in flight: a descriptor that is closed under a running system call is
soon somebody else's file.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from underlay.errors import ClosedError
from underlay.face import current_loop, is_blocking

if TYPE_CHECKING:
    import asyncio

__all__ = ["Lifecycle"]

_CLOSED = "it is closed"
_BACKING_CLOSED = "the disk that it has as backing image was closed"
#: How many seconds an interrupted close waits for calls: one may be counted that never ends.
_PATIENCE = 2.0
_FORKED = "it was opened before this process was forked; open it anew in the child"


class Lifecycle:
    """Shared by all faces and views of one open disk. Thread-safe."""

    __slots__ = ("__weakref__", "_users", "calls", "ended", "reason", "tasks")

    def __init__(self) -> None:
        #: Why the disk cannot be used; None while it can.
        self.reason: str | None = None
        #: One item for each blocking call in flight. Appending and popping are atomic.
        self.calls: deque[None] = deque()
        #: Asynchronous calls in flight, each with its loop.
        self.tasks: dict[object, asyncio.AbstractEventLoop | None] = {}
        #: Whether it was closed, or is being closed.
        self.ended = False
        #: Disks that read through this one, as their backing image.
        self._users: weakref.WeakSet[Lifecycle] = weakref.WeakSet()
        _all.add(self)

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a forked child."""
        return self.reason == _FORKED

    def check(self) -> None:
        """Raise ClosedError unless the disk can be used."""
        if self.reason is not None:
            raise ClosedError(f"The disk cannot be used: {self.reason}")

    def serve(self, user: Lifecycle) -> None:
        """Let another disk read through this one: when this one ends, that one can do no more."""
        self.check()
        self._users.add(user)

    @contextmanager
    def call(self) -> Generator[None]:
        """A call in flight, on whichever face drives it."""
        if is_blocking():
            try:
                # Inside: an interrupt comes when this returns, and not before.
                self.calls.append(None)
                self.check()
                yield
            finally:
                self.calls.pop()
        else:
            token = object()
            self.tasks[token] = current_loop()
            try:
                self.check()
                yield
            finally:
                del self.tasks[token]

    async def end(self) -> bool:
        """Refuse new calls and wait for those in flight; False if the disk was closed before.

        Cancelled while it waits, the disk stays open.
        """
        if self.ended or self.forked:
            return False
        self.ended = True
        refused = [(life, life.reason) for life in self._with_users()]
        for life, _ in refused:
            life.reason = life.reason or _BACKING_CLOSED
        self.reason = _CLOSED
        try:
            for life, _ in refused:
                await life._idle()
        except BaseException:
            self.ended = False
            for life, reason in refused:
                life.reason = _CLOSED if life.ended else reason
            raise
        return True

    async def _idle(self) -> None:
        """Wait until no call is in flight."""
        pause = 0.0001
        patient_until = time.monotonic() + _PATIENCE
        while self.calls or self.tasks:
            if is_blocking():
                if time.monotonic() > patient_until and _interrupted():
                    return
                here = current_loop()
                if here is not None and here in tuple(self.tasks.values()):
                    raise RuntimeError(
                        "a blocking close waits for a task of the event loop that it stops: "
                        "await the disk's close() instead"
                    )
                time.sleep(pause)  # noqa: ASYNC251 - the blocking face blocks
            else:
                import asyncio

                await asyncio.sleep(pause)
            pause = min(pause * 2, 0.01)

    def _with_users(self) -> list[Lifecycle]:
        found: list[Lifecycle] = [self]
        for life in found:  # grows while it is walked
            found += [user for user in life._users if user not in found]
        return found


def _interrupted() -> bool:
    """Whether an interrupt is being handled, which may have come as a call was being counted."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


_all: weakref.WeakSet[Lifecycle] = weakref.WeakSet()


def _after_fork() -> None:
    for lifecycle in _all:
        lifecycle.reason = _FORKED
        lifecycle.calls.clear()
        lifecycle.tasks.clear()


os.register_at_fork(after_in_child=_after_fork)
