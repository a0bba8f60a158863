"""Signals that end what a program does, kept away while that would leave something behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

__all__ = ["ENDING", "undisturbed"]

#: Those that ask a process to end. ``timeout``, ``kill`` and service managers send SIGTERM, a
#: terminal that goes away SIGHUP. Not every system has all of them.
ENDING: Final = frozenset(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


@contextmanager
def undisturbed() -> Generator[None]:
    """Let Ctrl-C, and what else a program hears as its end, wait until the ``with`` block is over.

    That is for what takes a moment: imports, in whose midst it can be lost or come out as another
    exception, and what has to be known before it can be undone. A signal that nobody handles still
    ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in that one alone
        return
    # Not by a signal mask: that is one thread's, and the system takes another to tell Python by.
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {
        number: handler for number in ENDING if callable(handler := signal.getsignal(number))
    }
    come: list[tuple[int, FrameType | None]] = []
    over = False

    def hear(number: int, frame: FrameType | None) -> None:
        if over:  # an interrupt came as the handlers were being put back, and kept this one
            handlers[number](number, frame)
        else:
            come.append((number, frame))

    try:
        for number in handlers:
            signal.signal(number, hear)
        yield
    finally:
        over = True
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in come:
            handlers[number](number, frame)
