"""The command ``underlay``, with qemu-img's flags, text, JSON and exit codes.

One module a subcommand, imported when it is used. They are thin: parse, call a job, print.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys

TYPE_CHECKING = False  # in place of typing's: while that is imported Ctrl-C shows a traceback
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

__all__ = ["main"]


#: How many threads numpy starts, where a command needs it, for linear algebra that none does: that
#: would be half of what importing it takes.
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
#: What a shell reports of a program that the signal of this number ended.
_SIGNAL = 128
#: Ctrl-C's.
_SIGINT = 2


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, by default that of this process, and exit with its status.

    It may be called again in the same process.
    """
    try:
        status = _status(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as told:
        status = _SIGNAL + getattr(told, "number", _SIGINT)
    sys.exit(status)


def _status(argv: Sequence[str]) -> int:
    atexit.unregister(_leave)
    atexit.register(_leave)
    thresholds = gc.get_threshold()
    # What is loaded stays: looking through it again and again meanwhile costs some milliseconds.
    gc.set_threshold(50_000, *thresholds[1:])
    threads = os.environ.get(_BLAS_THREADS)
    os.environ.setdefault(_BLAS_THREADS, "1")
    try:
        from underlay.cli.signals import signals_heard
        from underlay.interrupts import undisturbed

        with signals_heard():
            with undisturbed():
                from underlay.cli.problems import exit_status
            return exit_status(argv)
    finally:
        if not gc.get_freeze_count():  # else somebody else's objects would thaw
            # Call what was loaded old: with the thresholds back it would be looked through at once.
            gc.freeze()
            gc.unfreeze()
        gc.set_threshold(*thresholds)
        if threads is None:
            os.environ.pop(_BLAS_THREADS, None)


def _leave() -> None:
    """What is to be done when the process ends."""
    from underlay.cli.signals import nobody_listens

    # Its memory goes whole: no need to look for garbage once more.
    gc.freeze()
    nobody_listens()
