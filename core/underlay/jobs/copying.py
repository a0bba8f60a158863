"""The engine under every bulk copy: parts of disks into a writable disk, in parallel.

The source's mappings are walked in order and cut into tasks; workers fetch, look for zeroes and
write, each task on its own, in any order. Memory is bounded by the workers, not by the disks.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, NamedTuple

import attrs

from underlay.errors import UnsupportedOperationError
from underlay.jobs.loading import PIECE, Buffers, Scratch, load, pieces
from underlay.jobs.progress import Progress, ProgressCallback
from underlay.jobs.runs import Run, runs
from underlay.jobs.sparse import check_sparse_size, data_ranges
from underlay.jobs.workers import in_parallel, worker_count
from underlay.sync import SyncFormatAccess

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["Copied", "Stretch", "Zeroes", "copy"]

#: Data of one task: enough that handing it out costs nothing, little enough to stop soon.
_TASK = 4 << 20
#: Pieces of one task, however small they are.
_TASK_PIECES = 256
#: More than any disk has.
_NO_END = 1 << 63


class Zeroes(enum.Enum):
    """What is done where the source reads as zeroes."""

    #: Nothing: the target reads as zeroes there already.
    LEAVE = enum.auto()
    #: The target is made to read as zeroes, and gives its space back where it can.
    DISCARD = enum.auto()
    #: Zeroes are written like any data.
    WRITE = enum.auto()


@attrs.frozen(kw_only=True)
class Stretch:
    """A part of a source disk, and where it goes."""

    disk: SyncFormatAccess
    #: Guest bytes of the source.
    start: int
    length: int
    #: The guest offset in the target.
    to: int


@attrs.frozen(kw_only=True)
class Copied:
    """What a copy did, in guest bytes of the target."""

    size: int
    #: Written as data; the rest reads as zeroes.
    data: int


class _Task(NamedTuple):
    stretch: Stretch
    #: Runs that follow each other, each list fetched and written at once. Zeroes stand alone.
    pieces: list[list[Run]]
    #: How far the task advances the job, in bytes.
    length: int


def copy(
    stretches: Sequence[Stretch],
    target: SyncFormatAccess,
    *,
    zeroes: Zeroes,
    sparse_size: int = 4096,
    parallel: int | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
) -> Copied:
    """Copy stretches, which do not overlap, into ``target``.

    Zeroes found in data are treated as ``zeroes`` says where at least ``sparse_size`` bytes of them
    stand together; 0 looks for none. ``executor`` runs the work in threads of the caller's.

    Raises:
        OptionError: ``sparse_size`` or ``parallel`` cannot be so.
        CorruptImageError, StorageError: a source cannot be read; says at which guest offset.
        UnderlayError: the target cannot be written.
    """
    check_sparse_size(sparse_size)
    workers = worker_count(parallel)
    total = sum(stretch.length for stretch in stretches)
    report = progress or _quiet
    copier = _Copier(target, zeroes=zeroes, sparse_size=sparse_size)
    done = data = 0
    with ExitStack() as holds:
        for disk in {id(disk): disk for disk in (s.disk for s in stretches)}.values():
            holds.enter_context(disk.lease())
        report(Progress(0, total))
        results = holds.enter_context(
            closing(
                in_parallel(
                    copier.copy,
                    _tasks(stretches, zeroes),
                    parallel=workers,
                    executor=executor,
                    stop=copier.stop,
                )
            )
        )
        for length, written in results:
            done += length
            data += written
            report(Progress(done, total))
    return Copied(size=total, data=data)


def _quiet(progress: Progress) -> None:
    """Tell nobody."""


def _tasks(stretches: Sequence[Stretch], zeroes: Zeroes) -> Iterator[_Task]:
    # Zeroes that are written take as long as data, and are shared out like them.
    most_zeroes = _TASK if zeroes is Zeroes.WRITE else _NO_END
    for stretch in stretches:
        task = _Task(stretch, [], 0)
        with closing(_pieces(stretch, most_zeroes)) as found:
            for piece in found:
                length = piece[-1].end - piece[0].start
                task = _Task(stretch, [*task.pieces, piece], task.length + length)
                if task.length >= _TASK or len(task.pieces) >= _TASK_PIECES:
                    yield task
                    task = _Task(stretch, [], 0)
        if task.pieces:
            yield task


def _pieces(stretch: Stretch, most_zeroes: int) -> Generator[list[Run], None, None]:
    """The runs of a stretch, in lists of about ``PIECE`` bytes of data; zeroes stand alone."""
    piece: list[Run] = []
    length = 0
    with closing(runs(stretch.disk, stretch.start, stretch.length)) as found:
        for run in found:
            if run.storage is None:
                if piece:
                    yield piece
                    piece, length = [], 0
                for at in range(run.start, run.end, most_zeroes):
                    yield [run.part(at, min(most_zeroes, run.end - at))]
                continue
            if run.special is not None or run.length <= PIECE - length:
                parts: Iterable[Run] = (run,)
            else:
                parts = pieces(run, PIECE - length)
            for part in parts:
                if length and length + part.length > PIECE:
                    yield piece
                    piece, length = [], 0
                piece.append(part)
                length += part.length
                if length >= PIECE:
                    yield piece
                    piece, length = [], 0
    if piece:
        yield piece


class _Copier:
    """Does the tasks, in many threads at once."""

    __slots__ = ("_buffers", "_sparse_size", "_stopped", "_target", "_zeroes")

    def __init__(self, target: SyncFormatAccess, *, zeroes: Zeroes, sparse_size: int) -> None:
        self._target = target
        self._zeroes = zeroes
        self._sparse_size = sparse_size
        self._buffers = Buffers()
        self._stopped = False

    def stop(self) -> None:
        """Let the tasks end before their next piece."""
        self._stopped = True

    def copy(self, task: _Task) -> tuple[int, int]:
        """Do a task; the bytes that it covered, and those of them that it wrote as data."""
        shift = task.stretch.to - task.stretch.start
        written = 0
        # Neither disk can be closed under the requests that go to its storages directly.
        with task.stretch.disk.in_use(), self._target.in_use(), self._buffers.lend() as scratch:
            for piece in task.pieces:
                if self._stopped:
                    break
                if piece[0].storage is None:
                    written += self._write_zeroes(piece[0].start + shift, piece[0].length)
                elif self._sparse_size or not self._copy_on_host(piece, shift):
                    written += self._copy(piece, shift, scratch)
                else:
                    written += piece[0].length
        return task.length, written

    def _copy(self, piece: list[Run], shift: int, scratch: Scratch) -> int:
        start = piece[0].start
        length = piece[-1].end - start
        to = start + shift
        scratch.make_room(length)
        view = memoryview(scratch.first)
        load(piece, view[:length], scratch)
        written = at = 0
        for first, end in data_ranges(scratch.first, length, self._sparse_size):
            if first > at:
                self._write_zeroes(to + at, first - at)
            self._target.write(view[first:end], to + first)
            written += end - first
            at = end
        if length > at:
            self._write_zeroes(to + at, length - at)
        return written

    def _write_zeroes(self, offset: int, length: int) -> int:
        """Treat zeroes as was asked for; the bytes that became data."""
        if self._zeroes is Zeroes.DISCARD:
            self._target.discard_to_zero(offset, length)
        elif self._zeroes is Zeroes.WRITE:
            block = bytes(min(length, PIECE))
            for at in range(0, length, PIECE):
                if self._stopped:
                    break
                self._target.write(block[: length - at], offset + at)
            return length
        return 0

    def _copy_on_host(self, piece: list[Run], shift: int) -> bool:
        """Let the system copy plain data between two files; False if that is not how it is."""
        run = piece[0]
        if len(piece) > 1 or run.special is not None or run.storage is None:
            return False
        source = run.storage.descriptor()
        if source is None:
            return False
        offset, done = run.offset, 0
        with self._target.lease():
            while done < run.length:
                try:
                    place = self._target.ensure_data_mapping(
                        run.start + shift + done, run.length - done, overwrite=True
                    )
                    target = place.storage.descriptor()
                    if target is None:
                        return False
                    count = os.copy_file_range(
                        source, target, place.length, offset + done, place.offset
                    )
                except (OSError, UnsupportedOperationError):
                    # Not between these two, or not so: what is copied twice is the same. A real
                    # failure comes again, with its name.
                    return False
                if not count:
                    return False
                done += count
        return True
