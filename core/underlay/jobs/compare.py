"""Whether two disks hold the same."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import attrs

from underlay.errors import UnderlayError
from underlay.gate import ImplicitOpenGate
from underlay.jobs.loading import PIECE, Buffers, Scratch, load
from underlay.jobs.map import map_image
from underlay.jobs.opened import Source, opened
from underlay.jobs.places import Places, padded_runs
from underlay.jobs.progress import Progress, ProgressCallback
from underlay.jobs.runs import Run
from underlay.jobs.workers import in_parallel, sent, worker_count
from underlay.limits import Limits
from underlay.sync import SyncFormatAccess
from underlay.targets import options_for

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["ComparisonResult", "Difference", "compare"]

_SECTOR = 512
#: Bytes to read of each disk for one task.
_TASK = 4 << 20
_TASK_PIECES = 256


class Difference(enum.Enum):
    """In which respect two disks differ."""

    CONTENT = "content"
    #: Only with ``strict``: the sizes differ.
    SIZE = "size"
    #: Only with ``strict``: one has allocated what the other has not, or has it in another way.
    ALLOCATION = "allocation"


@attrs.frozen(kw_only=True)
class ComparisonResult:
    """The verdict on two disks, and where they first differ."""

    identical: bool
    #: None if they are identical.
    difference: Difference | None = None
    #: The guest offset of the first difference (of the sector of 512 bytes that holds it).
    offset: int | None = None
    #: The virtual sizes differ. Unless ``strict``, what the longer disk has more must be zeroes.
    size_differs: bool = False
    #: The bytes up to which both disks reach, in whole sectors.
    common_size: int = 0

    @property
    def lines(self) -> tuple[str, ...]:
        """The verdict in qemu-img's words."""
        if self.difference is Difference.SIZE:
            return ("Strict mode: Image size mismatch!",)
        if self.difference is Difference.ALLOCATION:
            return (f"Strict mode: Offset {self.offset} block status mismatch!",)
        verdict = "Images are identical."
        if self.offset is not None:
            verdict = f"Content mismatch at offset {self.offset}!"
        if self.size_differs and (self.offset is None or self.offset >= self.common_size):
            return ("Warning: Image size mismatch!", verdict)
        return (verdict,)


def compare(
    first: Source,
    second: Source,
    *,
    strict: bool = False,
    parallel: int | None = None,
    executor: Executor | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    storage_options: Mapping[str, object] | None = None,
    progress: ProgressCallback | None = None,
) -> ComparisonResult:
    """Compare what two disks hold, as ``qemu-img compare`` does.

    What both disks know to be zeroes, and what both take from the same place of one storage (as an
    overlay and its backing image do), is equal without being read. Sizes count in whole sectors of
    512 bytes. With ``strict`` the sizes must be equal too, and so must what is allocated. ``gate``,
    ``limits`` and ``storage_options`` are for disks that are given by their names; each gets those
    options that its storage has.

    An error's ``step`` says whether it came from looking up where data lies (``"map"``) or from
    fetching it (``"read"``). An error behind the first difference is not raised.

    Example::

        with underlay.open_any("a.qcow2") as first, underlay.open_any("b.raw") as second:
            result = underlay.jobs.compare(first, second)
            if not result.identical:
                print(f"they differ at byte {result.offset}")

    Raises:
        UnderlayError: a disk cannot be opened or read.
    """
    workers = worker_count(parallel)
    told = options_for((first, second), storage_options)
    with (
        opened(first, gate=gate, limits=limits, storage_options=told[0]) as one,
        opened(second, gate=gate, limits=limits, storage_options=told[1]) as other,
    ):
        return _compare(one, other, workers, executor, progress or _quiet, strict=strict)


def _compare(
    first: SyncFormatAccess,
    second: SyncFormatAccess,
    workers: int,
    executor: Executor | None,
    report: ProgressCallback,
    *,
    strict: bool,
) -> ComparisonResult:
    sizes = _whole_sectors(first.size), _whole_sectors(second.size)
    common, total = min(sizes), max(sizes)
    if strict and common != total:
        return ComparisonResult(
            identical=False, difference=Difference.SIZE, size_differs=True, common_size=common
        )
    outcome = _Outcome()
    if strict:
        _compare_allocation(first, second, outcome)
    # What lies behind a difference in allocation nobody wants to know.
    wanted = total if outcome.offset is None else outcome.offset
    comparer = _Comparer(first, second, outcome)
    done = 0
    with ExitStack() as holds:
        holds.enter_context(first.lease())
        holds.enter_context(second.lease())
        report(Progress(0, wanted))
        results = in_parallel(
            comparer.compare,
            comparer.tasks(wanted),
            parallel=workers,
            executor=executor,
            stop=comparer.stop,
            elsewhere=sent(_compare_content),
        )
        for length, found in holds.enter_context(closing(results)):
            if found is not None:
                outcome.found(*found)
            done += length
            report(Progress(done, wanted))
    if outcome.error is not None:
        raise outcome.error
    return ComparisonResult(
        identical=outcome.offset is None,
        difference=outcome.difference,
        offset=outcome.offset,
        size_differs=common != total,
        common_size=common,
    )


def _quiet(progress: Progress) -> None:
    """Tell nobody."""


def _whole_sectors(size: int) -> int:
    return size + _SECTOR - 1 & -_SECTOR


@attrs.define
class _Outcome:
    """The first thing found so far, by guest offset: a difference, or an error."""

    offset: int | None = None
    difference: Difference | None = None
    error: UnderlayError | None = None

    def found(self, offset: int, what: Difference | UnderlayError) -> None:
        """Take note, unless something nearer to the start is known."""
        if self.offset is None or offset < self.offset:
            self.offset = offset
            self.difference = what if isinstance(what, Difference) else None
            self.error = what if isinstance(what, UnderlayError) else None


# -- content


class _Task(NamedTuple):
    #: What the two disks have in the same ranges, each pair of lists to be compared at once.
    pieces: list[tuple[list[Run], list[Run]]]
    #: How far the task advances the job, in bytes.
    length: int


#: The bytes that a task covered, and the first difference or error in them.
_Compared: TypeAlias = "tuple[int, tuple[int, Difference | UnderlayError] | None]"


class _Comparer:
    """Finds what has to be read, and reads and compares it, in many threads at once."""

    def __init__(
        self, first: SyncFormatAccess, second: SyncFormatAccess, outcome: _Outcome
    ) -> None:
        self._first = first
        self._second = second
        self._outcome = outcome
        self._places = Places()
        self._buffers = Buffers()
        self._stopped = False

    def stop(self) -> None:
        """Let the tasks end before their next piece."""
        self._stopped = True

    # -- in the caller's thread

    def tasks(self, total: int) -> Iterator[_Task]:
        """What has to be compared of the first ``total`` bytes; no more after a difference."""
        pieces: list[tuple[list[Run], list[Run]]] = []
        at = begun = size = 0
        try:
            for first, second in self._pairs(total):
                if not self._places.same(first, second):
                    _append(pieces, first, second)
                    size += first.length
                at = first.end
                if size >= _TASK or len(pieces) >= _TASK_PIECES:
                    yield _Task(pieces, at - begun)
                    pieces, size, begun = [], 0, at
                if self._outcome.offset is not None and self._outcome.offset < at:
                    return
        except UnderlayError as error:
            error.step = "map"
            self._outcome.found(at, error)
        if at > begun:
            yield _Task(pieces, at - begun)

    def _pairs(self, total: int) -> Iterator[tuple[Run, Run]]:
        """The runs of both disks, cut where either has another one, and to pieces that fit."""
        with (
            closing(padded_runs(self._first, total)) as ours,
            closing(padded_runs(self._second, total)) as theirs,
        ):
            first, second, at = Run(0, 0), Run(0, 0), 0
            while at < total:
                if first.end == at:
                    first = next(ours)
                if second.end == at:
                    second = next(theirs)
                length = min(first.end, second.end, total) - at
                if not self._places.same(first, second):
                    length = min(length, PIECE)
                yield first.part(at, length), second.part(at, length)
                at += length

    # -- in workers

    def compare(self, task: _Task) -> _Compared:
        """Do a task."""
        with self._first.in_use(), self._second.in_use(), self._buffers.lend() as scratch:
            return _compare_pieces(task, scratch, lambda: self._stopped)


def _compare_content(task: _Task) -> _Compared:
    """Do a task in another process."""
    return _compare_pieces(task, Scratch(), lambda: False)


def _compare_pieces(task: _Task, scratch: Scratch, stopped: Callable[[], bool]) -> _Compared:
    for first, second in task.pieces:
        if stopped():
            break
        start, length = first[0].start, first[-1].end - first[0].start
        scratch.make_room(length, twice=True)
        try:
            load(first, memoryview(scratch.first)[:length], scratch)
            load(second, memoryview(scratch.second)[:length], scratch)
        except UnderlayError as error:
            error.step = "read"
            return task.length, (start, error)
        at = _first_difference(scratch.first, scratch.second, length)
        if at is not None:
            return task.length, (start + at & -_SECTOR, Difference.CONTENT)
    return task.length, None


def _append(pieces: list[tuple[list[Run], list[Run]]], first: Run, second: Run) -> None:
    """Add a pair to the last piece, if it goes on there and there is room, or as a new piece."""
    if pieces:
        firsts, seconds = pieces[-1]
        if firsts[-1].end == first.start and first.end - firsts[0].start <= PIECE:
            firsts.append(first)
            seconds.append(second)
            return
    pieces.append(([first], [second]))


def _first_difference(ours: bytearray, theirs: bytearray, length: int) -> int | None:
    """Where the first ``length`` bytes of two buffers begin to differ."""
    other = memoryview(theirs)
    # startswith() compares memory without a copy, as == of two memoryviews does not.
    if ours.startswith(other[:length]):
        return None
    low, high = 0, length
    while high - low > 1:
        middle = (low + high) // 2
        if ours.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle
    return low


# -- allocation


def _compare_allocation(
    first: SyncFormatAccess, second: SyncFormatAccess, outcome: _Outcome
) -> None:
    """The first guest offset at which two disks of one size say other things of their bytes."""
    ours, theirs = _statuses(first), _statuses(second)
    at = end = other_end = 0
    status: _Status | None = None
    other: _Status | None = None
    try:
        while True:
            if end == at:
                end, status = next(ours, (end, None))
            if other_end == at:
                other_end, other = next(theirs, (other_end, None))
            if status != other:
                outcome.found(at, Difference.ALLOCATION)
                return
            if status is None:
                return
            at = min(end, other_end)
    except UnderlayError as error:
        error.step = "map"
        outcome.found(at, error)


#: Whether a run is present, zero, data, has a host offset, and reaches the end of the disk. The
#: last is QEMU's: to it one run and two that follow each other differ at the end of a disk.
_Status: TypeAlias = tuple[bool, bool, bool, bool, bool]


def _statuses(disk: SyncFormatAccess) -> Iterator[tuple[int, _Status]]:
    """The end of each run, and its status; a half sector at the end is filled up by a hole."""
    size = _whole_sectors(disk.size)
    end = 0
    for entry in map_image(disk):
        end = entry.start + entry.length
        has_offset = entry.offset is not None
        yield end, (entry.present, entry.zero, entry.data, has_offset, end == size)
    if end < size:
        yield size, (True, True, False, True, True)
