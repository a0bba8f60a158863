"""Signals: being told to end, which cleans up as Ctrl-C does; being asked how far the work is."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, NoReturn

from underlay.interrupts import ENDING

__all__ = [
    "Ended",
    "asked_how_far",
    "nobody_listens",
    "signals_heard",
    "told_to_end",
]

_asked = threading.Event()
#: The signals that asked the command to end.
_ended: list[int] = []


class Ended(KeyboardInterrupt):
    """A signal that asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    _ended.append(number)
    # It may come between the making of a coroutine and its first step, which is no mistake then.
    warnings.simplefilter("ignore", RuntimeWarning)
    raise Ended(number)


def _ask(_number: int, _frame: FrameType | None) -> None:
    _asked.set()


def told_to_end() -> Ended | None:
    """The interrupt that came while this command ran, if any.

    In the midst of an import, or of what Python calls on its own, as when an object goes
    away, it can be lost, or come out as another exception.
    """
    return Ended(_ended[0]) if _ended else None


def asked_how_far() -> bool:
    """Whether somebody wants to know how far the work is, since this was last called."""
    if not _asked.is_set():
        return False
    _asked.clear()
    return True


#: Not every system has it.
_ASKING: Final = [signal.Signals[name] for name in ("SIGUSR1",) if hasattr(signal, name)]


@contextmanager
def signals_heard() -> Generator[None]:
    """Raise :class:`Ended`, or note that somebody asks, in place of dying.

    A signal that the process handles or ignores stays as it is, and so does everything where this
    is not the main thread. Questions are heard from then on: who asks when all is done must not end
    what is left of the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ending: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler}
    ending |= dict.fromkeys(ENDING - {signal.SIGINT}, signal.SIG_DFL)
    ending = {number: was for number, was in ending.items() if signal.getsignal(number) is was}
    for number in ending:
        signal.signal(number, _end)
    for number in _ASKING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _ask)
    _asked.clear()
    _ended.clear()
    tell_unraisable = sys.unraisablehook

    def tell_others(unraisable: sys.UnraisableHookArgs) -> None:
        if told_to_end() is None:  # else it comes of that, which is known
            tell_unraisable(unraisable)

    try:
        sys.unraisablehook = tell_others
        with warnings.catch_warnings():
            yield
    finally:
        sys.unraisablehook = tell_unraisable
        for number, was in ending.items():
            signal.signal(number, was)


def nobody_listens() -> None:
    """For the end of the process: there is nobody left to tell of Ctrl-C, or of a question."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in _ASKING:
        if signal.getsignal(number) is _ask:
            signal.signal(number, signal.SIG_IGN)
