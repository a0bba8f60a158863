"""The crash test finds a driver that is broken in one place."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from .judging import chance_of
from .mutants import MUTANTS, Mutant
from .running import record
from .shapes import SHAPES, Prepared, Shape
from .states import Effort
from .workloads import long_workload, singles

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_broken_driver_is_caught(
    mutant: Mutant, prepare: Callable[[Shape], Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    (shape,) = (shape for shape in SHAPES if shape.name == mutant.shape)
    prepared = prepare(shape)
    chance = chance_of(mutant.name)
    effort = Effort(samples=50)
    mutant.breaks(monkeypatch)

    tried = itertools.chain(
        [mutant.operations] if mutant.operations else [],
        singles(shape),
        (long_workload(shape, chance) for _ in range(3)),
    )
    for operations in tried:
        recorded = record(prepared, operations)
        states = itertools.islice(recorded.states(chance, effort), 0, None, shape.thinned)
        report = recorded.judge().report(states, enough=1)
        if report.problems:
            return

    raise AssertionError(f"nobody noticed that {mutant.name}")
