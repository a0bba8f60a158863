"""Signals: being told to end, which cleans up as Ctrl-C does; being asked how far the work is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

__all__ = ["Ended", "asked_how_far", "signals_heard", "undisturbed"]

_asked = threading.Event()


class Ended(KeyboardInterrupt):
    """A signal that asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise Ended(number)


def _ask(_number: int, _frame: FrameType | None) -> None:
    _asked.set()


def asked_how_far() -> bool:
    """Whether somebody wants to know how far the work is, since this was last called."""
    if not _asked.is_set():
        return False
    _asked.clear()
    return True


#: ``timeout``, ``kill`` and service managers send the first, a terminal that goes away the second,
#: and the third whoever waits for a long job. Not every system has all of them.
_HANDLERS: Final[Mapping[str, Callable[[int, FrameType | None], None]]] = {
    "SIGTERM": _end,
    "SIGHUP": _end,
    "SIGUSR1": _ask,
}


@contextmanager
def undisturbed() -> Generator[None]:
    """Let Ctrl-C wait until the end of the ``with`` block.

    That is for imports: in their midst it can be lost, or come out as another exception.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def signals_heard() -> Generator[None]:
    """Raise :class:`Ended`, or note that somebody asks, in place of dying.

    A signal that the process handles or ignores stays as it is, and so does everything where this
    is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    known = {
        signal.Signals[name]: heard for name, heard in _HANDLERS.items() if hasattr(signal, name)
    }
    ours = {
        number: heard
        for number, heard in known.items()
        if signal.getsignal(number) is signal.SIG_DFL
    }
    _asked.clear()
    for number, heard in ours.items():
        signal.signal(number, heard)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
