"""No power loss leaves a corrupt image, loses what was synced, or invents anything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .guest import Operation
from .judging import chance_of
from .oracle import Oracle
from .running import Trial
from .shapes import SHAPES, Prepared, Shape
from .workloads import long_workload, pairs, singles, triple

pytestmark = pytest.mark.slow


def _short_workloads(shape: Shape) -> list[list[Operation]]:
    """All of one operation, and this shape's share of all of two."""
    share = itertools.islice(pairs(shape), SHAPES.index(shape), None, len(SHAPES))
    return [*singles(shape), *share]


def _more_workloads(shape: Shape) -> Iterator[list[Operation]]:
    """One long one for ten short ones; it never ends."""
    chance = chance_of(shape.name)
    rest = list(pairs(shape))
    chance.shuffle(rest)
    while True:
        yield long_workload(shape, chance, 60 // shape.thinned)
        for _ in range(10):
            yield rest.pop() if rest else triple(shape, chance)


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_a_power_loss_leaves_a_good_image(
    shape: Shape,
    prepare: Callable[[Shape], Prepared],
    qemu: Callable[[str], str],
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    states = pytestconfig.getoption("--crash-states")
    assert isinstance(states, int)
    shares = sum(1 / other.thinned for other in SHAPES)
    wanted = math.ceil(states / shares / shape.thinned)
    trial = Trial(
        prepared=prepare(shape),
        chance=chance_of(shape.name, "states"),
        oracle=Oracle(qemu("qemu-img"), tmp_path),
    )

    for operations in _short_workloads(shape):
        if shape.thinned == 1 or trial.report.states < wanted:
            trial.run(operations)
    for operations in _more_workloads(shape):
        if trial.report.states >= wanted or len(trial.failures) >= 3:
            break
        trial.run(operations)

    assert not trial.failures, "\n\n".join(trial.failures)
    assert trial.report.states >= wanted
