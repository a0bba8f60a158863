"""The command on each hostile image: its output, or one line on stderr; never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .bases import Bases
from .child import Warm
from .commands import CHANGING, LOOKING, Said, run, told_wrong
from .corpus import RECIPES
from .judging import files, placed
from .recipe import Recipe

#: Run as programs of their own too: whose damage, and which commands.
_BY_NAME = {recipe.name: recipe for recipe in RECIPES}
_PROGRAMS = [
    ("magic", "info -f qcow2 IMAGE", 1),
    ("cluster-bits-63", "check -f qcow2 IMAGE", 1),
    ("incompatible-63", "map IMAGE", 1),
    ("backing-json", "info --gate permissive --backing-chain IMAGE", 1),
    ("backing-itself", "digest --gate directory IMAGE", 1),
    ("bitmaps-2-40", "inspect IMAGE", 2),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.number}-{recipe.name}")
def test_commands(recipe: Recipe, bases: Bases, warm: Warm, tmp_path: Path) -> None:
    base, path = placed(recipe, bases, tmp_path)
    before = files(tmp_path, base)
    new = tmp_path / "new"
    new.mkdir()
    allowed = [*(tmp_path / name for name in before), new]
    told: list[str] = []
    for lines in (LOOKING, CHANGING):
        outcome = warm.run(run, lines, str(path), str(new / "raw"))
        told += outcome.broken(allowed)
        told += filter(None, map(told_wrong, outcome.value or ()))
        if lines is LOOKING and files(tmp_path, base) != before:
            told.append("looking at the image changed it")
        told += (f"left behind: {left.name}" for left in new.iterdir())
    assert not told, "\n".join(told)


@pytest.mark.parametrize(("name", "line", "status"), _PROGRAMS)
def test_the_program(bases: Bases, tmp_path: Path, name: str, line: str, status: int) -> None:
    _, path = placed(_BY_NAME[name], bases, tmp_path)
    words = [str(path) if word == "IMAGE" else word for word in line.split()]
    done = subprocess.run(
        [sys.executable, "-m", "underlay", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == status
    assert told_wrong(Said(line=line, status=status, out=done.stdout, err=done.stderr)) is None
