"""How far a job has come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import attrs

from underlay.steps import StepsCallback

__all__ = ["Progress", "ProgressCallback", "counting"]


@attrs.frozen
class Progress:
    """How many of a job's bytes are dealt with; zeroes that need no work count too.

    ``check``, ``repair`` and ``amend`` count tables.
    """

    done: int
    total: int


#: Called in the thread that called the job, with ``done`` never falling. What it raises cancels the
#: job: everything is stopped and cleaned up, and then that exception goes on to the caller.
ProgressCallback: TypeAlias = Callable[[Progress], None]


def counting(progress: ProgressCallback | None) -> StepsCallback | None:
    """The same, for a driver to call."""
    if progress is None:
        return None
    return lambda done, total: progress(Progress(done, total))
