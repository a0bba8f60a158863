"""Each recipe in each use keeps its rule, and those that hold for all (``child``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .bases import IMAGE, Bases
from .child import Outcome, Warm
from .corpus import RECIPES
from .judging import Before, files, mending_faults, placed, reading_faults, writing_faults
from .recipe import Recipe
from .uses import READ_ONLY, change, check, info, inspect, mend, probe, write

each = pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda recipe: f"{recipe.number}-{recipe.name}"
)


def _copied(content: dict[str, bytes], folder: Path) -> Path:
    """The image's name, in a folder of its own."""
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder / IMAGE


@each
def test_uses(recipe: Recipe, bases: Bases, warm: Warm, tmp_path: Path) -> None:
    base, path = placed(recipe, bases, tmp_path)
    original = files(tmp_path, base)
    told: list[str] = []

    def run(use: Callable[..., object], path: Path, *arguments: object) -> Outcome:
        outcome = warm.run(use, str(path), *arguments)
        # Other files are of use only to what reads or writes data.
        names = (IMAGE,) if use in {probe, inspect, info, check} else original
        allowed = [path.parent / name for name in names]
        told.extend(f"{use.__name__}: {fault}" for fault in outcome.broken(allowed))
        return outcome

    outcomes: dict[str, Outcome] = {}
    for name, use in READ_ONLY.items():
        outcomes[name] = run(use, path)
        if files(tmp_path, base) != original:
            told.append(f"{name}: changed the image")
    told += reading_faults(recipe.rule, base, outcomes["read"])
    is_qcow2 = outcomes["probe"].value == ("qcow2", False)
    if recipe.rule.refused and is_qcow2 and outcomes["inspect"].value == "safe":
        told.append("inspect: calls it safe")

    before = Before(
        base=base,
        rule=recipe.rule,
        read=outcomes["read"],
        check=outcomes["check"],
        files=original,
    )
    for offset in before.places():
        copy = _copied(original, tmp_path / f"{offset}")
        outcome = run(write, copy, offset)
        told += writing_faults(before, offset, outcome, files(copy.parent, base))
    told += mending_faults(before, run(mend, _copied(original, tmp_path / "mended")))
    run(change, _copied(original, tmp_path / "changed"))
    assert not told, "\n".join(told)
