"""How long work on the blocking face may take."""

from __future__ import annotations

import sys
import time
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

from underlay.errors import OptionError, TimeLimitError

__all__ = ["TimeLimit", "check_time", "check_time_to_read", "time_left"]


class TimeLimit:
    """Ends what runs inside its ``with`` block with ``TimeLimitError`` when the time is over.

    ::

        with underlay.TimeLimit(30):
            underlay.jobs.convert("disk.qcow2", "disk.raw")

    It covers whatever is done there in this thread: probing, opening, every job with its threads,
    reading. All of it stops as it does when a ``progress`` callback raises: a new image is removed
    again, one that was changed is left sound. That takes some time of its own, and a request that
    a storage is busy with is waited for. Inside another one, the limit that ends first counts.

    In coroutines use ``asyncio.timeout``, which does the same for what is awaited.
    """

    __slots__ = ("_end", "_handled", "_outer", "_raised", "_token", "seconds")

    def __init__(self, seconds: float) -> None:
        """Raises ``OptionError`` if ``seconds`` is negative, or no number."""
        if not seconds >= 0:
            raise OptionError(
                f"The time limit is {seconds} seconds, and cannot be less than 0",
                option="time_limit",
            )
        self.seconds = seconds
        self._end = 0.0
        self._outer: TimeLimit | None = None
        #: The error in whose handling all this is done, if any.
        self._handled: BaseException | None = None
        self._raised = False
        self._token: Token[TimeLimit | None] | None = None

    def __enter__(self) -> Self:
        self._outer = _current.get()
        self._handled = sys.exc_info()[1]
        self._end = time.monotonic() + self.seconds
        self._raised = False
        self._token = _current.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._token is not None
        _current.reset(self._token)
        # Somebody took the error for one of an image: what came of that is not the answer.
        if error is None and self._raised:
            raise self._error()

    def left(self) -> float:
        """Seconds until this one, or one around it, ends; 0 when it has."""
        own = max(0.0, self._end - time.monotonic())
        return own if self._outer is None else min(own, self._outer.left())

    def check(self) -> None:
        """Raise ``TimeLimitError`` if the time is over."""
        if time.monotonic() >= self._end:
            self._raised = True
            raise self._error()
        if self._outer is not None:
            self._outer.check()

    def cleaning_up(self) -> bool:
        """Whether an error is being handled that came up inside."""
        return sys.exc_info()[1] is not self._handled

    def _error(self) -> TimeLimitError:
        return TimeLimitError(
            f"Stopped after the {self.seconds:g} seconds that the time limit allows; allow more, "
            "or ask for less",
            seconds=self.seconds,
        )


_current: ContextVar[TimeLimit | None] = ContextVar("underlay_time_limit", default=None)


def check_time() -> None:
    """For every loop that may take long, where it can stop.

    Raises:
        TimeLimitError: the time is over.
    """
    limit = _current.get()
    if limit is not None:
        limit.check()


def check_time_to_read() -> None:
    """For each request to read: so even what looks small ends when a storage is slow.

    Whoever cleans up after an error may go on reading.

    Raises:
        TimeLimitError: the time is over.
    """
    limit = _current.get()
    if limit is not None and not limit.cleaning_up():
        limit.check()


def time_left() -> float | None:
    """How many seconds one may wait before looking at ``check_time``; None: for ever."""
    limit = _current.get()
    return None if limit is None else limit.left()
