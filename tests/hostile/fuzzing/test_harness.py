"""What the fuzzing is to find it does find: here is something to be found."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import underlay
from underlay import jobs
from underlay.errors import UnderlayError

from ..bases import Bases
from .crew import Crew
from .damage import damage
from .fields import Group, fields
from .opinion import new_faults, opinion
from .trial import MemoryPlace, Trial


def test_a_worker_that_dies_or_hangs_is_pinned_on_its_image(tmp_path: Path) -> None:
    crew = Crew(
        bases=tmp_path,
        seed="",
        end=6,
        processes=2,
        folder=tmp_path,
        program="tests.hostile.fuzzing.bad_worker",
        seconds=4.0,
    )
    found = {broken.number: broken.problems for broken in crew.run()}
    assert found == {
        1: ["read: the process died (-11)"],
        2: ["write: not over after 5 s of processor time"],
        3: ["read: not over after 4.0 s"],
        4: ["read: wrong"],
    }


def test_an_error_that_is_not_ours_is_found(monkeypatch: pytest.MonkeyPatch, bases: Bases) -> None:
    def check(_target: object) -> None:
        raise IndexError("oh")

    monkeypatch.setattr(jobs, "check", check)
    trial = Trial(bases["small-clusters"].data, MemoryPlace(), random.Random(1))
    trial.look()
    (problem,) = trial.problems
    assert problem.startswith("check: ")
    assert "IndexError: oh" in problem


def test_an_error_of_two_lines_is_found(monkeypatch: pytest.MonkeyPatch, bases: Bases) -> None:
    class TwoLinesError(UnderlayError):
        def __str__(self) -> str:
            return "one\ntwo"

    def check(_target: object) -> None:
        raise TwoLinesError("")

    monkeypatch.setattr(jobs, "check", check)
    trial = Trial(bases["small-clusters"].data, MemoryPlace(), random.Random(1))
    trial.look()
    assert "check: the error is not one line: 'one\\ntwo'" in trial.problems


def test_a_change_by_looking_is_found(monkeypatch: pytest.MonkeyPatch, bases: Bases) -> None:
    place = MemoryPlace()

    def probe(_target: object) -> None:
        place.put(b"changed")

    trial = Trial(bases["small-clusters"].data, place, random.Random(1))
    monkeypatch.setattr(underlay, "probe", probe)
    trial.look()
    assert trial.problems == ["looking at it has changed it"]


def test_damage_done_by_writing_is_found(bases: Bases) -> None:
    before = bases["plain"].data
    image = bases["plain"].image()
    image.put(image.l2(4), "Q", 1 << 63 | len(image.data))
    assert new_faults(before, opinion(before), bytes(image.data)) == [
        "entry 0, L2 entry 4 leads past the end of the file"
    ]


def test_every_group_of_fields_is_damaged(bases: Bases) -> None:
    names = ("plain", "zlib", "snapshots", "bitmaps")
    assert {field.group for name in names for field in fields(bases[name].data)} == set(Group)
    for group in Group:
        with_it = [name for name in names if _has(bases[name].data, group)]
        base = bases[with_it[0]].data
        made = {bytes(damage(base, random.Random(seed), [group])[0]) for seed in range(20)}
        assert len(made - {base}) > 10, group


def _has(data: bytes, group: Group) -> bool:
    return any(field.group is group for field in fields(data))


def test_the_same_seed_does_the_same_damage(bases: Bases) -> None:
    base = bases["plain"].data
    twice = [bytes(damage(base, random.Random("7"))[0]) for _ in range(2)]
    assert twice[0] == twice[1] != base
