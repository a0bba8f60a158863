"""Images to start from, closed in the end; and the count of all states that were judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from .judging import Report
from .shapes import Prepared, Shape

_JUDGED = pytest.StashKey[dict[str, Report]]()


@pytest.fixture
def prepare() -> Iterator[Callable[[Shape], Prepared]]:
    """Make an image of a shape."""
    with ExitStack() as stack:

        def make(shape: Shape) -> Prepared:
            prepared = shape.prepared()
            stack.callback(prepared.close)
            return prepared

        yield make


@pytest.fixture
def judged(pytestconfig: pytest.Config) -> dict[str, Report]:
    """What came of each shape's states, by its name: put it in, and it is told at the end."""
    return pytestconfig.stash.setdefault(_JUDGED, {})


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how many states after a power loss were judged."""
    reports: dict[str, Report] = config.stash.get(_JUDGED, dict[str, Report]())
    if reports:
        total = Report()
        for report in reports.values():
            total.add(report)
        terminalreporter.write_line(
            f"crash states: {total.states} judged on {len(reports)} kinds of images, "
            f"{total.leaking} of them with leaks, {total.again} of repairs that were cut off, "
            f"{total.shown} shown to QEMU, {total.bad} bad"
        )
