"""Being told to end: what a command has begun is cleaned up, as after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

__all__ = ["Ended", "ended_cleanly"]

#: ``timeout``, ``kill`` and service managers send the one, a terminal that goes away the other.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """A signal that asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise Ended(number)


@contextmanager
def ended_cleanly() -> Generator[None]:
    """Raise :class:`Ended` in place of dying.

    A signal that the process handles or ignores stays as it is, and so does everything where this
    is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
