"""When an open disk may be used: not after it was closed, not in a forked child.

Closing waits for the calls in flight: a descriptor that is closed under a running system call is
soon somebody else's file.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager

from underlay.errors import ClosedError
from underlay.face import Caller, is_blocking

__all__ = ["Lifecycle"]

_CLOSED = "it is closed"
_BACKING_CLOSED = "the disk that it has as backing image was closed"
_FORKED = "it was opened before this process was forked; open it anew in the child"


class Lifecycle:
    """Shared by all faces and views of one open disk. Thread-safe."""

    __slots__ = ("__weakref__", "_calls", "_users", "ended", "quick", "reason")

    def __init__(self) -> None:
        #: Why the disk cannot be used; None while it can.
        self.reason: str | None = None
        #: One item for each call in flight that goes without ``call``, which costs a tenth.
        #: Appending and popping are atomic, and in a ``try`` no interrupt comes between them.
        self.quick: deque[None] = deque()
        #: The others. An interrupt can leave one there that has ended.
        self._calls: set[Caller] = set()
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
        call = Caller()
        try:
            self._calls.add(call)
            self.check()
            yield
        finally:
            self._calls.discard(call)

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
        while self.quick or self._in_flight():
            if is_blocking():
                time.sleep(pause)  # noqa: ASYNC251 - the blocking face blocks
            else:
                import asyncio

                await asyncio.sleep(pause)
            pause = min(pause * 2, 0.01)

    def _in_flight(self) -> bool:
        """Whether a call is, that whoever closes the disk can wait for.

        Raises:
            RuntimeError: it waits, in turn, for whoever closes the disk.
        """
        closing = Caller()
        calls = list(self._calls)
        if is_blocking():
            calls = [call for call in calls if not call.was_before(closing)]
            closing.check_can_wait(calls)
        return bool(calls)

    def _with_users(self) -> list[Lifecycle]:
        found: list[Lifecycle] = [self]
        for life in found:  # grows while it is walked
            found += [user for user in life._users if user not in found]
        return found


_all: weakref.WeakSet[Lifecycle] = weakref.WeakSet()


def _after_fork() -> None:
    for lifecycle in _all:
        lifecycle.reason = _FORKED
        lifecycle.quick.clear()
        lifecycle._calls.clear()


os.register_at_fork(after_in_child=_after_fork)
