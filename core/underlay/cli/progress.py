"""How far a job has come, on stderr: a bar, qemu-img's percentages, or JSON lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import click

from underlay.cli.output import human_size, tell_meanwhile
from underlay.cli.problems import CommandError
from underlay.cli.signals import asked_how_far, told_to_end

if TYPE_CHECKING:
    from rich.console import RenderableType

    from underlay.jobs.progress import Progress, ProgressCallback

__all__ = ["progress_options", "reporting"]

F = TypeVar("F", bound=Callable[..., object])

#: Seconds between two lines of JSON.
_PAUSE = 0.1
#: Percent between two of qemu-img's percentages.
_STEP = 1.0
_ALL = 100.0
#: Columns from which a bar has room beside the bytes, as ``1,023.9/1,023.9 GiB``.
_WIDE = 60


def progress_options(function: F) -> F:
    """``-p`` and ``--progress``, as the arguments ``bar`` and ``progress``."""
    function = click.option(
        "--progress",
        metavar="json",
        callback=_read_style,
        help='Show progress on stderr as JSON lines: {"done": BYTES, "total": BYTES}.',
    )(function)
    return click.option("-p", "bar", is_flag=True, help="Show progress on stderr.")(function)


def _read_style(_context: object, _parameter: object, value: str | None) -> str | None:
    if value not in {None, "json"}:
        raise CommandError(f"--progress: unknown style '{value}'; say json, or -p for people")
    return value


@contextmanager
def reporting(
    *, bar: bool, progress: str | None, quiet: bool, steps: bool = False
) -> Generator[ProgressCallback]:
    """What to give a job as its ``progress``; ``steps`` where it counts other things than bytes.

    Where nothing shows how far it is, ``SIGUSR1`` asks for a line that does. An interrupt that was
    lost is raised once more.
    """
    with _showing(bar=bar, progress=progress, quiet=quiet, steps=steps) as show:

        def report(progress: Progress) -> None:
            if (ended := told_to_end()) is not None:
                raise ended
            show(progress)

        yield report


@contextmanager
def _showing(
    *, bar: bool, progress: str | None, quiet: bool, steps: bool
) -> Generator[ProgressCallback]:
    if progress == "json":
        with _json_lines() as report:
            yield report
    elif not bar or quiet:
        yield _told_when_asked
    elif sys.stderr.isatty():
        with _drawn_bar(steps=steps) as report:
            yield report
    else:
        from underlay.jobs.progress import Progress

        report = _percentages()
        report(Progress(0, 1))
        yield report
        report(Progress(1, 1))
        tell_meanwhile("\n")


@contextmanager
def _json_lines() -> Generator[ProgressCallback]:
    last = 0.0
    told: tuple[int, int] | None = None
    total = 1  # where a job has nothing to tell

    def tell(done: int) -> None:
        nonlocal told
        if told != (done, total):
            told = (done, total)
            tell_meanwhile(f'{{"done": {done}, "total": {total}}}\n')

    def report(progress: Progress) -> None:
        nonlocal last, total
        now = time.monotonic()
        total = progress.total
        if now - last >= _PAUSE or progress.done >= total:
            last = now
            tell(progress.done)

    yield report
    tell(total)


def _percentages() -> ProgressCallback:
    """For a log, or a program that reads what qemu-img shows."""
    last = -_STEP

    def report(progress: Progress) -> None:
        nonlocal last
        percent = _percent(progress)
        if percent - last >= _STEP or percent >= _ALL > last:
            last = percent
            _show(percent, end="\r")

    return report


def _told_when_asked(progress: Progress) -> None:
    if asked_how_far():
        _show(_percent(progress), end="\n")


def _percent(progress: Progress) -> float:
    return 100 * progress.done / progress.total if progress.total else _ALL


def _show(percent: float, *, end: str) -> None:
    tell_meanwhile(f"    ({percent:.2f}/100%){end}")


@contextmanager
def _drawn_bar(*, steps: bool) -> Generator[ProgressCallback]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        """Bytes a second, in the units of everything else here."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{human_size(int(speed))}/s")

    counts: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
    rate: tuple[ProgressColumn, ...] = ()
    if not steps:
        counts = (DownloadColumn(binary_units=True),)
        rate = (Rate(table_column=Column(no_wrap=True)),)
    # Colours that every terminal has: of others, one of 16 may take the nearest for grey.
    bar = BarColumn(
        style="bright_black", complete_style="cyan", finished_style="green", pulse_style="cyan"
    )
    percent, left = TaskProgressColumn(), TimeRemainingColumn(table_column=Column(no_wrap=True))

    console = Console(stderr=True)

    class Fitting(Bar):
        """On one line, however wide the terminal is by now."""

        def get_renderables(self) -> Iterator[RenderableType]:
            shown = (*counts, *rate) if console.width >= _WIDE else rate
            self.columns = (percent, bar, *shown, left)
            yield from super().get_renderables()

    with Fitting(console=console) as drawn:
        task = drawn.add_task("", total=None)
        yield lambda progress: drawn.update(task, completed=progress.done, total=progress.total)
        if drawn.tasks[0].total is None:  # there was nothing to tell
            drawn.update(task, completed=1, total=1)
