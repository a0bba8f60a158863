"""The command ``underlay``, with qemu-img's flags, text, JSON and exit codes.

One module a subcommand, imported when it is used. They are thin: parse, call a job, print.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


#: How many threads numpy starts, where a command needs it, for linear algebra that none does: that
#: would be half of what importing it takes.
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, by default that of this process, and exit with its status.

    It may be called again in the same process.
    """
    # When the process ends its memory goes whole: no need to look for garbage once more.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    thresholds = gc.get_threshold()
    # What is loaded stays: looking through it again and again meanwhile costs some milliseconds.
    gc.set_threshold(50_000, *thresholds[1:])
    threads = os.environ.get(_BLAS_THREADS)
    os.environ.setdefault(_BLAS_THREADS, "1")
    try:
        from underlay.cli.problems import exit_status

        status = exit_status(sys.argv[1:] if argv is None else argv)
    finally:
        gc.set_threshold(*thresholds)
        if threads is None:
            os.environ.pop(_BLAS_THREADS, None)
    sys.exit(status)
