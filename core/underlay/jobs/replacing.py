"""Letting an overlay have of its own what it would lose with its backing image.

Whatever the overlay does not say itself is looked up below it and in the image that is to take that
place; equal places are equal unseen, the rest is read and compared. What differs is written to the
overlay while the old image is still below it: so whatever else belongs to a cluster is copied from
there, and the overlay shows the same at any time.

Zeroes over data of the new image are only marked, last of all and in whole units, with the new
image laid below: over the old one they might be zeroes already, and be left unsaid.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import attrs

from underlay.gate import Reference, ReferenceKind
from underlay.jobs.loading import PIECE, Buffers, Scratch, load
from underlay.jobs.places import Places, padded_runs
from underlay.jobs.progress import Progress, ProgressCallback
from underlay.jobs.runs import Run, runs
from underlay.jobs.sparse import data_ranges
from underlay.jobs.workers import in_parallel, worker_count
from underlay.sync import SyncFormatAccess

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["keep_content"]

#: Bytes to read of each image for one task.
_TASK = 4 << 20
_TASK_PIECES = 256
#: Bytes of which one is reason enough to write all.
_LEAST, _MOST = 4 << 10, 64 << 10


def keep_content(
    disk: SyncFormatAccess,
    new: SyncFormatAccess | None,
    *,
    parallel: int | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[int, int]:
    """Write to ``disk`` what it shows and would not show over ``new``.

    The bytes that became data, and those that were marked as zeroes. Nothing is synced.
    """
    workers = worker_count(parallel)
    job = _Job(disk, new)
    total = disk.size
    done = data = 0
    if progress is not None:
        progress(Progress(0, total))
    results = in_parallel(job.do, job.tasks(), parallel=workers, executor=executor, stop=job.stop)
    with closing(results):
        for length, written in results:
            done += length
            data += written
            if progress is not None:
                progress(Progress(done, total))
    return data, job.mark_zeroes()


class _Difference(NamedTuple):
    """A part of the disk where the images below it lie in different places."""

    old: Run
    new: Run
    #: The guest bytes around it that are the same run of the old image, and not the disk's own.
    start: int
    end: int


class _Stretch(NamedTuple):
    """As many guest bytes in a row as are the disk's own, or are not."""

    start: int
    end: int
    owned: bool


class _Task(NamedTuple):
    #: What the two images have in the same ranges, each pair of lists to be compared at once.
    pieces: list[tuple[list[Run], list[Run]]]
    #: Guest bytes to be written as zeroes: starts and lengths.
    zeroes: list[tuple[int, int]]
    #: How far the task advances the job, in bytes.
    length: int


@attrs.define
class _Job:
    disk: SyncFormatAccess
    new: SyncFormatAccess | None
    #: Bytes that can be marked as zeroes, or None where nothing can.
    unit: int | None = attrs.field(init=False)
    _old: SyncFormatAccess | None = attrs.field(init=False)
    _places: Places = attrs.field(factory=Places, init=False)
    _buffers: Buffers = attrs.field(factory=Buffers, init=False)
    _stopped: bool = attrs.field(default=False, init=False)
    _zeroes_left: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.unit = self.disk.inner.zero_granularity()
        self._old = self.disk.backing

    def stop(self) -> None:
        """Let the tasks end before their next piece."""
        self._stopped = True

    # -- in the caller's thread

    def tasks(self) -> Iterator[_Task]:
        """What has to be compared and written."""
        task = _Task([], [], 0)
        begun = size = 0
        with closing(self._differences()) as found:
            for difference in found:
                old, new, _, _ = difference
                if self._can_mark(old):
                    self._zeroes_left = True
                    task.zeroes.extend(self._odd_ends(difference))
                    if len(task.zeroes) >= _TASK_PIECES:
                        yield task._replace(length=old.end - begun)
                        task, size, begun = _Task([], [], 0), 0, old.end
                    continue
                for at in range(old.start, old.end, PIECE):
                    length = min(PIECE, old.end - at)
                    _append(task.pieces, old.part(at, length), new.part(at, length))
                    size += length
                    if size >= _TASK or len(task.pieces) >= _TASK_PIECES:
                        yield task._replace(length=at + length - begun)
                        task, size, begun = _Task([], [], 0), 0, at + length
        yield task._replace(length=self.disk.size - begun)

    def _differences(self) -> Generator[_Difference, None, None]:
        total = self.disk.size
        own = _Stretch(0, 0, owned=False)
        old = new = Run(0, 0)
        at = 0
        with (
            closing(_owned(self.disk)) as owns,
            closing(padded_runs(self._old, total)) as olds,
            closing(padded_runs(self.new, total)) as news,
        ):
            while at < total:
                if own.end == at:
                    own = next(owns)
                if old.end == at:
                    old = next(olds)
                if new.end == at:
                    new = next(news)
                end = min(own.end, old.end, new.end)
                if not own.owned and not self._places.same(old, new):
                    yield _Difference(
                        old.part(at, end - at),
                        new.part(at, end - at),
                        max(own.start, old.start),
                        min(own.end, old.end),
                    )
                at = end

    # -- zeroes

    def mark_zeroes(self) -> int:
        """Mark whole units of zeroes, and return how many bytes these are."""
        if not self._zeroes_left:
            return 0
        marked = done = 0
        with self._laid_upon_new(), closing(self._differences()) as found:
            for difference in found:
                if not self._can_mark(difference.old):
                    continue
                start, end = self._whole_units(difference)
                # Such that begin in the middle of what was marked as the one before touched it.
                start = max(start, done)
                if start < end:
                    self.disk.write_zeroes(start, end - start)
                    marked += end - start
                    done = end
                for at, length in self._odd_ends(difference):
                    # None is left, unless a format allocates otherwise than it zeroes.
                    self.disk.write(bytes(length), at)
        return marked

    @contextmanager
    def _laid_upon_new(self) -> Generator[None]:
        """For a while, let the new image be what the disk lies upon."""
        driver = self.disk.inner
        reference = Reference(kind=ReferenceKind.BACKING, name="")
        before = driver.backing()
        driver.attach(reference, None if self.new is None else self.new.inner)
        try:
            yield
        finally:
            driver.attach(reference, before)

    def _can_mark(self, old: Run) -> bool:
        return old.storage is None and self.unit is not None

    def _whole_units(self, difference: _Difference) -> tuple[int, int]:
        """The whole units that a difference touches, as far as they hold nothing but zeroes."""
        unit = self.unit or 1
        start = max(difference.start, difference.old.start // unit * unit)
        end = min(difference.end, -(-difference.old.end // unit) * unit)
        start = -(-start // unit) * unit
        return start, end if end >= self.disk.size else end // unit * unit

    def _odd_ends(self, difference: _Difference) -> Iterator[tuple[int, int]]:
        """What is left of a difference beside its whole units."""
        first, last = difference.old.start, difference.old.end
        start, end = self._whole_units(difference)
        if start >= end:
            yield first, last - first
            return
        if first < start:
            yield first, start - first
        if end < last:
            yield end, last - end

    # -- in workers

    def do(self, task: _Task) -> tuple[int, int]:
        """Do a task; the bytes that it covered, and those of them that it wrote as data."""
        written = 0
        with self.disk.in_use(), self._buffers.lend() as scratch:
            for start, length in task.zeroes:
                self.disk.write(bytes(length), start)
                written += length
            for old, new in task.pieces:
                if self._stopped:
                    break
                written += self._write_difference(old, new, scratch)
        return task.length, written

    def _write_difference(self, old: list[Run], new: list[Run], scratch: Scratch) -> int:
        start = old[0].start
        length = old[-1].end - start
        scratch.make_room(length, twice=True)
        view = memoryview(scratch.first)
        load(old, view[:length], scratch)
        least = min(max(self.unit or _MOST, _LEAST), _MOST)
        if all(run.storage is None for run in new):
            differing = data_ranges(scratch.first, 0, length, least)
        else:
            load(new, memoryview(scratch.second)[:length], scratch)
            differing = _differing(scratch, start, length, least)
        written = 0
        for first, end in differing:
            self.disk.write(view[first:end], start + first)
            written += end - first
        return written


def _owned(disk: SyncFormatAccess) -> Generator[_Stretch, None, None]:
    """What the disk says itself, and what it does not, in turns."""
    stretch = _Stretch(0, 0, owned=False)
    with closing(runs(disk, 0, disk.size, layers=1)) as found:
        for run in found:
            owned = not (run.below or run.nowhere)
            if owned == stretch.owned:
                stretch = stretch._replace(end=run.end)
            else:
                if stretch.end > stretch.start:
                    yield stretch
                stretch = _Stretch(run.start, run.end, owned)
    if stretch.end > stretch.start:
        yield stretch


def _append(pieces: list[tuple[list[Run], list[Run]]], old: Run, new: Run) -> None:
    """Add a pair to the last piece, if it goes on there and there is room, or as a new piece."""
    if pieces:
        olds, news = pieces[-1]
        if olds[-1].end == old.start and old.end - olds[0].start <= PIECE:
            olds.append(old)
            news.append(new)
            return
    pieces.append(([old], [new]))


def _differing(scratch: Scratch, offset: int, length: int, least: int) -> list[tuple[int, int]]:
    """Where two buffers differ: starts and ends, at multiples of ``least`` guest bytes."""
    ours, theirs = scratch.first, memoryview(scratch.second)
    # startswith() compares memory without a copy, as == of two memoryviews does not.
    if ours.startswith(theirs[:length]):
        return []
    found: list[tuple[int, int]] = []
    at = 0
    while at < length:
        end = min(at + least - (offset + at) % least, length)
        if not ours.startswith(theirs[at:end], at):
            start = found.pop()[0] if found and found[-1][1] == at else at
            found.append((start, end))
        at = end
    return found
