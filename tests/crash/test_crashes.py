"""No power loss leaves a corrupt image, loses what was synced, or invents anything.

``--crash-states=100000`` judges more than the 20,000 states of each run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .guest import Operation
from .judging import Report, chance_of
from .oracle import Oracle
from .running import Trial
from .shapes import SHAPES, Prepared, Shape
from .states import Effort
from .workloads import long_workload, pairs, singles, triple

pytestmark = pytest.mark.slow


def _short_workloads(shape: Shape) -> list[list[Operation]]:
    """All of one operation, and this shape's share of all of two."""
    share = itertools.islice(pairs(shape), SHAPES.index(shape), None, len(SHAPES))
    alone = list(singles(shape))
    if shape.thinned > 1:
        alone.reverse()  # what makes it special is tried at all
    return [*alone, *share]


def _more_workloads(shape: Shape) -> Iterator[list[Operation]]:
    """One long one for ten short ones; it never ends."""
    chance = chance_of(shape.name)
    rest = list(pairs(shape))
    chance.shuffle(rest)
    while True:
        yield long_workload(shape, chance, 60 // shape.thinned)
        for _ in range(5):
            yield rest.pop() if rest else triple(shape, chance)
            yield triple(shape, chance)


@pytest.fixture
def start(
    prepare: Callable[[Shape], Prepared], qemu: Callable[[str], str], tmp_path: Path
) -> Callable[[Shape], Trial]:
    """Begin a trial of a shape."""
    return lambda shape: Trial(
        prepared=prepare(shape),
        chance=chance_of(shape.name, "states"),
        oracle=Oracle(qemu("qemu-img"), tmp_path),
        effort=Effort(samples=200 if shape.thinned == 1 else 50),
        step=1 if shape.thinned == 1 else 5,
    )


@pytest.fixture
def wanted(pytestconfig: pytest.Config) -> int:
    """How many states are to be judged."""
    states = pytestconfig.getoption("--crash-states")
    assert isinstance(states, int)
    return states


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_a_power_loss_leaves_a_good_image(
    shape: Shape, start: Callable[[Shape], Trial], wanted: int, judged: dict[str, Report]
) -> None:
    shares = sum(1 / other.thinned for other in SHAPES)
    share = math.ceil(wanted / shares / shape.thinned)
    trial = start(shape)

    for operations in _short_workloads(shape):
        if shape.thinned == 1 or trial.report.states < share:
            trial.run(operations)
    for operations in _more_workloads(shape):
        if trial.report.states >= share or len(trial.failures) >= 3:
            break
        trial.run(operations)

    judged[shape.name] = trial.report
    assert not trial.failures, "\n\n".join(trial.failures)
    assert trial.report.states >= share


def test_enough_states_were_judged(judged: dict[str, Report], wanted: int) -> None:
    """After all kinds of images; where only some of them were chosen there is nothing to count."""
    if len(judged) < len(SHAPES):
        pytest.skip("not all kinds of images were tried")
    assert sum(report.states for report in judged.values()) >= wanted
    assert all(report.leaking for report in judged.values())
    assert sum(report.shown for report in judged.values()) > wanted // 200
    assert sum(report.again for report in judged.values()) > wanted // 50


def test_all_refcount_widths_are_tried() -> None:
    widths = {shape.options.get("refcount_bits", 16) for shape in SHAPES}

    assert widths == {1, 2, 4, 8, 16, 32, 64}
