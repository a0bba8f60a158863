"""Signals that end what a program does, kept away while that would leave something behind."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

__all__ = ["ENDING", "undisturbed"]

#: Those that ask a process to end. ``timeout``, ``kill`` and service managers send SIGTERM, a
#: terminal that goes away SIGHUP. Not every system has all of them.
ENDING: Final = frozenset(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


@contextmanager
def undisturbed() -> Generator[None]:
    """Let Ctrl-C, and what else ends a program, wait until the end of the ``with`` block.

    That is for what takes a moment: imports, in whose midst it can be lost or come out as another
    exception, and what has to be known before it can be undone.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
