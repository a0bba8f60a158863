"""Taking times in turns, and the table of what came of it."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import attrs

__all__ = ["Bench", "Result", "busy_elsewhere", "table"]

Measure = Callable[[], float]


@attrs.frozen(kw_only=True)
class Result:
    """One line of the table."""

    work: str
    peer: str
    theirs: float
    ours: float
    #: What ours / theirs may be at most; None where nothing was promised.
    bar: float | None
    unit: str = "s"

    @property
    def ratio(self) -> float:
        """Ours as a part of the peer's."""
        return self.ours / self.theirs

    @property
    def kept(self) -> bool:
        """Whether the bar was not passed."""
        return self.bar is None or self.ratio <= self.bar


@attrs.frozen(kw_only=True)
class Bench:
    """How often to measure."""

    rounds: int = 5

    def compare(
        self,
        work: str,
        ours: Measure,
        peers: Mapping[str, Measure],
        *,
        bar: float | None,
        unit: str = "s",
    ) -> Result:
        """Measure all in turns, and set ours beside the best of the peers."""
        measures = {"": ours, **peers}
        taken: dict[str, list[float]] = {name: [] for name in measures}
        for _ in range(self.rounds):
            for name, measure in measures.items():
                taken[name].append(measure())
        medians = {name: statistics.median(times) for name, times in taken.items()}
        best = min(peers, key=medians.__getitem__)
        return Result(
            work=work, peer=best, theirs=medians[best], ours=medians[""], bar=bar, unit=unit
        )


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def busy_elsewhere() -> Callable[[], float]:
    """Begin to watch; the result tells which part of the processors others have used since."""
    if not Path("/proc/stat").exists():
        return lambda: 0.0
    started, mine, began = _busy(), _own(), time.perf_counter()

    def watched() -> float:
        others = (_busy() - started) - (_own() - mine)
        return max(0.0, others / (os.cpu_count() or 1) / (time.perf_counter() - began))

    return watched


def _busy() -> float:
    """Seconds for which processors were at work since the machine was started."""
    numbers = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]))
    return (sum(numbers[:8]) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    return sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


_COLUMNS = ("work", "peer", "theirs", "ours", "ratio", "bar")


def table(results: Iterable[Result]) -> str:
    """The results in columns."""
    lines: list[tuple[str, ...]] = [_COLUMNS]
    for result in results:
        bar = "" if result.bar is None else f"{result.bar:g}"
        if not result.kept:
            bar += " !"
        lines.append(
            (
                result.work,
                result.peer,
                _shown(result.theirs, result.unit),
                _shown(result.ours, result.unit),
                f"{result.ratio:.2f}",
                bar,
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)  # noqa: PLR2004 - two of text
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    shown.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(shown)


def _shown(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}"


def say(text: str) -> None:
    """Tell the user what is going on; the table alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)
