"""Getting what can be read off a damaged disk; the rest becomes zeroes, and is reported."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from typing import TypeAlias

import attrs

from underlay.errors import CorruptImageError, StorageError, UnderlayError
from underlay.jobs.loading import Scratch, load
from underlay.jobs.runs import Run, runs
from underlay.sync import SyncFormatAccess

__all__ = ["SalvageCallback", "Unreadable", "load_what_can_be", "runs_that_can_be"]

_SECTOR = 512


@attrs.frozen(kw_only=True)
class Unreadable:
    """Guest bytes of a source that could not be read: they are zeroes in the target."""

    start: int
    length: int
    error: UnderlayError
    #: It could not even be found out where they lie.
    unmapped: bool = False


#: Called in any thread, in any order. What it raises ends the job.
SalvageCallback: TypeAlias = Callable[[Unreadable], None]


def runs_that_can_be(
    disk: SyncFormatAccess,
    start: int,
    length: int,
    lost: SalvageCallback,
    *,
    layers: int | None = None,
) -> Generator[Run, None, None]:
    """As ``runs``, with zeroes for sectors of which nobody knows where they are."""
    end = start + length
    while start < end:
        try:
            with closing(runs(disk, start, end - start, layers=layers)) as found:
                for run in found:
                    yield run
                    start = run.end
        except (CorruptImageError, StorageError) as error:
            sector = min(_SECTOR - start % _SECTOR, end - start)
            lost(Unreadable(start=start, length=sector, error=error, unmapped=True))
            yield Run(start, sector)
            start += sector
        else:
            return


def load_what_can_be(
    found: Sequence[Run], into: memoryview, scratch: Scratch, lost: SalvageCallback
) -> None:
    """As ``load``, with zeroes for sectors, and for encoded units, that cannot be read."""
    with suppress(CorruptImageError, StorageError):
        load(found, into, scratch)
        return
    base = found[0].start
    for run in found:
        view = into[run.start - base : run.end - base]
        step = run.length if run.special is not None else _SECTOR
        if not _load_or_zero(run, view, scratch, None if step < run.length else lost):
            for at in range(0, run.length, step):
                length = min(step, run.length - at)
                part = run.part(run.start + at, length)
                _load_or_zero(part, view[at : at + length], scratch, lost)


def _load_or_zero(
    run: Run, view: memoryview, scratch: Scratch, lost: SalvageCallback | None
) -> bool:
    """Load a run; if that fails, it becomes zeroes. False if it may be tried in parts."""
    try:
        load([run], view, scratch)
    except (CorruptImageError, StorageError) as error:
        if lost is None:
            return False
        view[:] = bytes(run.length)
        lost(Unreadable(start=run.start, length=run.length, error=error))
    return True
