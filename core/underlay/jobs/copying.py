"""The engine under every bulk copy: parts of disks into a writable disk, in parallel.

The source's mappings are walked in order and cut into tasks; workers fetch, look for zeroes and
write, each task on its own, in any order. Memory is bounded by the workers, not by the disks.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING

import attrs

from underlay.jobs.copier import Copier, Stretch, Task, Zeroes
from underlay.jobs.loading import PIECE
from underlay.jobs.pieces import in_pieces, in_whole_units
from underlay.jobs.rate import RateLimit
from underlay.jobs.runs import Run, runs
from underlay.jobs.salvage import SalvageCallback, runs_that_can_be
from underlay.jobs.sparse import check_sparse_size
from underlay.jobs.workers import in_parallel, worker_count
from underlay.steps import StepsCallback
from underlay.sync import SyncFormatAccess

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from underlay.jobs.fetching import FetchingCopier

__all__ = ["Compress", "Copied", "Stretch", "Zeroes", "copy"]

#: Data of one task: enough that handing it out costs nothing, little enough to stop soon.
_TASK = 8 << 20
#: Pieces of one task, however small they are.
_TASK_PIECES = 256
#: More than any disk has.
_NO_END = 1 << 63


@attrs.frozen(kw_only=True)
class Compress:
    """Store data compressed, in the way that was chosen when the target was created."""

    #: The codec's own; None is a quick one of good size.
    level: int | None = None


@attrs.frozen(kw_only=True)
class Copied:
    """What a copy did, in guest bytes of the target."""

    size: int
    #: Written as data; the rest reads as zeroes, or was left to a backing image.
    data: int


def copy(
    stretches: Sequence[Stretch],
    target: SyncFormatAccess,
    *,
    zeroes: Zeroes,
    clean_from: int | None = None,
    sparse_size: int = 4096,
    layers: int | None = None,
    offload: bool = False,
    compress: Compress | None = None,
    salvage: SalvageCallback | None = None,
    rate: int | None = None,
    parallel: int | None = None,
    executor: Executor | None = None,
    progress: StepsCallback | None = None,
) -> Copied:
    """Copy stretches, which do not overlap, into ``target``.

    Zeroes found in data are treated as ``zeroes`` says where at least ``sparse_size`` bytes of them
    stand together (with ``compress``: where they fill whole units); 0 looks for none. From guest
    offset ``clean_from`` of the target on they need not be discarded. With ``layers``, only what
    the first so many images of a source's chain have is copied. ``offload`` copies from file to
    file without looking for zeroes. What cannot be read ends the copy, or becomes zeroes and is
    told to ``salvage``. At most ``rate`` bytes a second are written. ``executor`` is the
    caller's; one of other processes fetches and encodes, while the writing stays here. ``progress``
    counts the bytes of the stretches.

    Raises:
        OptionError: ``sparse_size``, ``parallel`` or the level cannot be so.
        UnsupportedOperationError: the target cannot ``compress``.
        CorruptImageError, StorageError: a source cannot be read; says at which guest offset.
        UnderlayError: the target cannot be written.
    """
    check_sparse_size(sparse_size)
    workers = worker_count(parallel)
    total = sum(stretch.length for stretch in stretches)
    copier = Copier(
        target=target,
        zeroes=zeroes,
        clean_from=clean_from,
        sparse_size=sparse_size,
        offload=offload,
        salvage=salvage,
        rate=None if not rate else RateLimit(rate),
    )
    unit = None
    if compress is not None:
        from underlay.jobs.encoding import encoding_copier

        copier, unit = encoding_copier(copier, target, compress.level)
    report = progress or _quiet
    done = data = 0
    with ExitStack() as holds:
        for disk in {id(disk): disk for disk in (s.disk for s in stretches)}.values():
            holds.enter_context(disk.lease())
        report(0, total)
        results = holds.enter_context(
            closing(
                in_parallel(
                    copier.copy,
                    _tasks(stretches, copier, unit=unit, layers=layers),
                    parallel=workers,
                    executor=executor,
                    stop=copier.stop,
                    elsewhere=partial(_fetching, copier),
                )
            )
        )
        for length, written in results:
            done += length
            data += written
            report(done, total)
    return Copied(size=total, data=data)


def _quiet(_done: int, _total: int) -> None:
    """Tell nobody."""


def _fetching(copier: Copier, executor: Executor) -> FetchingCopier:
    from underlay.jobs.fetching import FetchingCopier

    return FetchingCopier(copier, executor)


def _tasks(
    stretches: Sequence[Stretch], copier: Copier, *, unit: int | None, layers: int | None
) -> Iterator[Task]:
    # Where a limit makes them slow, somebody still wants to see how far it is, and to stop soon.
    most = _TASK if copier.rate is None else min(_TASK, max(copier.rate.a_second, PIECE))
    # Zeroes that are written take as long as data, and are shared out like them.
    most_zeroes = most if copier.zeroes is Zeroes.WRITE else _NO_END
    for stretch in stretches:
        disk, shift = stretch.disk, stretch.to - stretch.start
        task = Task(disk, shift, [], 0)
        with closing(_pieces(stretch, copier.salvage, unit, most_zeroes, layers)) as found:
            for piece in found:
                length = piece[-1].end - piece[0].start
                task = Task(disk, shift, [*task.pieces, piece], task.length + length)
                if task.length >= most or len(task.pieces) >= _TASK_PIECES:
                    yield task
                    task = Task(disk, shift, [], 0)
        if task.pieces:
            yield task


def _pieces(
    stretch: Stretch,
    salvage: SalvageCallback | None,
    unit: int | None,
    most_zeroes: int,
    layers: int | None,
) -> Generator[list[Run], None, None]:
    disk, start, length = stretch.disk, stretch.start, stretch.length
    if salvage is None:
        walk = runs(disk, start, length, layers=layers)
    else:
        walk = runs_that_can_be(disk, start, length, salvage, layers=layers)
    with closing(walk) as found:
        if unit is None:
            yield from in_pieces(found, most_zeroes)
        else:
            yield from in_whole_units(
                found, unit, shift=stretch.to - stretch.start, most=most_zeroes
            )
