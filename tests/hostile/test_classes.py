"""Each recipe in each use keeps its rule, and those that hold for all (``child``)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from underlay_drivers.qcow2 import layout

from .bases import IMAGE, Bases
from .child import Call, Outcome, Warm
from .corpus import RECIPES
from .editing import Image
from .judging import Before, files, mending_faults, placed, reading_faults, writing_faults
from .recipe import HARMLESS, Recipe
from .uses import READ_ONLY, change, check, info, inspect, mend, probe, read, write

each = pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda recipe: f"{recipe.number}-{recipe.name}"
)


def _copied(content: dict[str, bytes], folder: Path) -> str:
    """The image's name, in a folder of its own."""
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return str(folder / IMAGE)


@each
def test_uses(recipe: Recipe, bases: Bases, warm: Warm, tmp_path: Path) -> None:
    base, path = placed(recipe, bases, tmp_path)
    original = files(tmp_path, base)
    told: list[str] = []

    def run(*calls: Call) -> list[Outcome]:
        """Uses in turn, each with the name of its image."""
        outcomes = warm.run_all(calls)
        for (use, (image, *_)), outcome in zip(calls, outcomes, strict=True):
            # Other files are of use only to what reads or writes data.
            names = (IMAGE,) if use in {probe, inspect, info, check} else original
            folder = os.path.dirname(str(image))
            broken = outcome.broken([os.path.join(folder, name) for name in names])
            told.extend(f"{use.__name__}: {fault}" for fault in broken)
        return outcomes

    found = dict(zip(READ_ONLY, run(*((use, (str(path),)) for use in READ_ONLY)), strict=True))
    if files(tmp_path, base) != original:
        told.append("what only reads changed the image")
    told += reading_faults(recipe.rule, base, found[read])
    is_qcow2 = found[probe].value == ("qcow2", False)
    if recipe.rule.refused and is_qcow2 and found[inspect].value == "safe":
        told.append("inspect: calls it safe")

    before = Before(
        base=base, rule=recipe.rule, read=found[read], check=found[check], files=original
    )
    places = {offset: _copied(original, tmp_path / f"{offset}") for offset in before.places()}
    *written, mended, _ = run(
        *((write, (copy, offset)) for offset, copy in places.items()),
        (mend, (_copied(original, tmp_path / "mended"),)),
        (change, (_copied(original, tmp_path / "changed"),)),
    )
    for (offset, copy), outcome in zip(places.items(), written, strict=True):
        told += writing_faults(before, offset, outcome, files(Path(copy).parent, base))
    told += mending_faults(before, mended)
    assert not told, "\n".join(told)


@pytest.mark.parametrize(
    "recipe",
    [one for one in RECIPES if one.base == "bitmaps" and one.rule is HARMLESS],
    ids=lambda recipe: recipe.name,
)
def test_a_writer_gives_up_bitmaps_that_lie(recipe: Recipe, bases: Bases, tmp_path: Path) -> None:
    """It clears the bit that says that they are valid: nobody takes them for what was changed."""
    _, path = placed(recipe, bases, tmp_path)
    assert Image.load(path).word(layout.AUTOCLEAR_FEATURES_OFFSET) & 1
    write(str(path), 0)
    assert not Image.load(path).word(layout.AUTOCLEAR_FEATURES_OFFSET) & 1
