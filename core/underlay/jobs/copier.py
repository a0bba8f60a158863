"""The tasks of a copy, and the worker that does them: fetch, look for zeroes, write."""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import attrs

from underlay.errors import UnsupportedOperationError
from underlay.jobs.loading import PIECE, Buffers, Scratch, load
from underlay.jobs.opened import in_use
from underlay.jobs.rate import RateLimit
from underlay.jobs.runs import Run, runs
from underlay.jobs.salvage import SalvageCallback, load_what_can_be, runs_that_can_be
from underlay.jobs.sparse import data_ranges
from underlay.sync import SyncFormatAccess

__all__ = [
    "Copier",
    "CopyTarget",
    "Stretch",
    "Task",
    "Zeroes",
    "holds_no_data",
    "through_the_chain",
]


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


class Task(NamedTuple):
    """What a worker does in one go."""

    #: None in another process, which needs no more than the runs.
    disk: SyncFormatAccess | None
    #: What is added to a guest offset of the source to have that of the target.
    shift: int
    #: Runs that follow each other, each list fetched and written at once.
    pieces: list[list[Run]]
    #: How far the task advances the job, in bytes.
    length: int


class CopyTarget(Protocol):
    """What is done to the target, which is a disk, or notes of what is to be done to one."""

    @property
    def size(self) -> int:
        """Guest bytes."""
        ...

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """See ``SyncFormatAccess.write``."""

    def discard_to_zero(self, offset: int, length: int) -> None:
        """See ``SyncFormatAccess.discard_to_zero``."""


def holds_no_data(piece: Sequence[Run]) -> bool:
    """Whether a piece is one run without data: that stands alone."""
    return len(piece) == 1 and piece[0].storage is None


def through_the_chain(
    disk: SyncFormatAccess, piece: Sequence[Run], salvage: SalvageCallback | None
) -> list[Run]:
    """A piece that holds data, with the runs of lower images where nobody walked as far."""
    if holds_no_data(piece) or not any(run.below for run in piece):
        return list(piece)
    start = piece[0].start
    length = piece[-1].end - start
    if salvage is None:
        return list(runs(disk, start, length))
    return list(runs_that_can_be(disk, start, length, salvage))


@attrs.define(kw_only=True)
class Copier:
    """Does the tasks of one copy, in many threads at once."""

    target: CopyTarget
    zeroes: Zeroes
    #: The target reads as zeroes from here on already; None where that is not known.
    clean_from: int | None = None
    sparse_size: int
    #: Let the system copy what lies in files, without a look for zeroes.
    offload: bool = False
    salvage: SalvageCallback | None = None
    rate: RateLimit | None = None
    _buffers: Buffers = attrs.field(factory=Buffers, init=False)
    _stopped: bool = attrs.field(default=False, init=False)

    def stop(self) -> None:
        """Let the tasks end before their next piece."""
        self._stopped = True

    def stopped(self) -> bool:
        """Whether they shall end."""
        return self._stopped

    def copy(self, task: Task) -> tuple[int, int]:
        """Do a task; the bytes that it covered, and those of them that it wrote as data."""
        # Neither disk can be closed under the requests that go to its storages directly.
        with in_use(task.disk), in_use(self.target), self._buffers.lend() as scratch:
            written = 0
            for piece in task.pieces:
                if self._stopped:
                    break
                written += self._copy_piece(task, piece, scratch)
            self._finish(scratch)
        return task.length, written

    def _copy_piece(self, task: Task, piece: list[Run], scratch: Scratch) -> int:
        """Copy runs that follow each other; how many bytes became data."""
        run, shift = piece[0], task.shift
        if holds_no_data(piece):
            return 0 if run.below else self._write_zeroes(run.start + shift, run.length)
        length = piece[-1].end - run.start
        if self.rate is not None:
            self.rate.take(length, self.stopped)
        if (self.offload or not self.sparse_size) and self._copy_on_host(piece, shift):
            return length
        if task.disk is not None:
            piece = through_the_chain(task.disk, piece, self.salvage)
        return self._copy(piece, shift, scratch)

    def _finish(self, scratch: Scratch) -> None:
        """Store what a task has kept back so far."""

    def _copy(self, piece: list[Run], shift: int, scratch: Scratch) -> int:
        start = piece[0].start
        length = piece[-1].end - start
        scratch.make_room(length)
        self._load(piece, memoryview(scratch.first)[:length], scratch)
        return self._write_data(scratch, 0, length, start + shift)

    def _load(self, piece: Sequence[Run], into: memoryview, scratch: Scratch) -> None:
        if self.salvage is None:
            load(piece, into, scratch)
        else:
            load_what_can_be(piece, into, scratch, self.salvage)

    def _write_data(self, scratch: Scratch, start: int, length: int, to: int) -> int:
        """Write loaded bytes, leaving zeroes out; the bytes that became data."""
        view = memoryview(scratch.first)
        written = 0
        at = start
        for first, end in data_ranges(scratch.first, start, start + length, self.sparse_size):
            if first > at:
                self._write_zeroes(to + at - start, first - at)
            self.target.write(view[first:end], to + first - start)
            written += end - first
            at = end
        if start + length > at:
            self._write_zeroes(to + at - start, start + length - at)
        return written

    def _write_zeroes(self, offset: int, length: int) -> int:
        """Treat zeroes as was asked for; the bytes that became data."""
        if self.clean_from is not None:
            length = max(0, min(length, self.clean_from - offset))
        if self.zeroes is Zeroes.DISCARD:
            if length:
                self.target.discard_to_zero(offset, length)
        elif self.zeroes is Zeroes.WRITE:
            block = bytes(min(length, PIECE))
            for at in range(0, length, PIECE):
                if self._stopped:
                    break
                self.target.write(block[: length - at], offset + at)
            return length
        return 0

    def _copy_on_host(self, piece: list[Run], shift: int) -> bool:
        """Let the system copy plain data between two files; False if that is not how it is."""
        run, disk = piece[0], self.target
        if len(piece) > 1 or run.special is not None or run.storage is None:
            return False
        source = run.storage.descriptor()
        if source is None or not isinstance(disk, SyncFormatAccess):
            return False
        offset, done = run.offset, 0
        with disk.lease():
            while done < run.length:
                try:
                    place = disk.ensure_data_mapping(
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
