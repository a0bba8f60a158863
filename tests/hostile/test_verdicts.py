"""QEMU's tools and ours on every hostile image: where they differ, it is argued, and documented."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from .bases import IMAGE, Bases
from .child import Warm
from .confined import Cell, NoCellError
from .corpus import RECIPES
from .reasons import REASONS
from .verdict_table import OPTION, PAGE, filled
from .verdicts import ASPECTS, Case, Verdict, Word, our_verdict, their_verdict

_SOUND = Verdict(info=Word.WORKS, read=Word.WORKS, check=0, write=Word.WORKS)
_WRONG_BYTES = {Word.ZEROES, Word.OTHER_BYTES}
_NO_END = {Word.CRASHES, Word.HANGS}

#: Theirs and ours, by the names of the recipes.
Verdicts = Mapping[str, tuple[Verdict, Verdict]]


@pytest.fixture(scope="session")
def cell(
    tmp_path_factory: pytest.TempPathFactory,
    qemu: Callable[[str], str],
    lacks: Callable[[str], NoReturn],
) -> Cell:
    try:
        return Cell(tmp_path_factory.mktemp("cell"), [qemu("qemu-img"), qemu("qemu-io")])
    except NoCellError as error:
        lacks(str(error))


@pytest.fixture(scope="session")
def verdicts(
    bases: Bases, cell: Cell, warm: Warm, tmp_path_factory: pytest.TempPathFactory
) -> Verdicts:
    folder = tmp_path_factory.mktemp("verdicts")
    cases: dict[str, Case] = {}
    for recipe in RECIPES:
        base = bases[recipe.base]
        image = base.image()
        recipe.damage(image)
        cases[recipe.name] = Case(bytes(image.data), base, recipe.rule)
    with ThreadPoolExecutor(2) as pool:
        theirs = {
            name: pool.submit(their_verdict, case, name, cell) for name, case in cases.items()
        }
        ours = {name: our_verdict(case, folder / name, warm) for name, case in cases.items()}
        return {name: (theirs[name].result(), ours[name]) for name in cases}


def _differing(verdicts: Verdicts, name: str) -> set[str]:
    theirs, ours = verdicts[name]
    return {aspect for aspect in ASPECTS if getattr(theirs, aspect) != getattr(ours, aspect)}


def test_each_difference_has_a_reason(verdicts: Verdicts) -> None:
    told: list[str] = []
    for name, (theirs, ours) in verdicts.items():
        argued = {aspect for one in REASONS if name in one.recipes for aspect in one.aspects}
        if unargued := _differing(verdicts, name) - argued:
            told.append(f"{name} ({', '.join(sorted(unargued))}): QEMU: {theirs}; ours: {ours}")
    assert not told, "\n".join(told)


def test_each_reason_has_a_difference(verdicts: Verdicts) -> None:
    idle = [
        f"{one.name}: {name}"
        for one in REASONS
        for name in one.recipes
        if name not in verdicts or not _differing(verdicts, name) & set(one.aspects)
    ]
    assert not idle, f"no difference any more: {idle}"
    unused = [
        f"{one.name}: {aspect}"
        for one in REASONS
        for aspect in one.aspects
        if not any(aspect in _differing(verdicts, name) for name in one.recipes)
    ]
    assert not unused, f"nothing differs in this: {unused}"
    names = [one.name for one in REASONS]
    assert names == sorted(set(names))


def test_we_are_never_the_worse_one(verdicts: Verdicts) -> None:
    """Bytes that are wrong are shown, and others changed, where QEMU does so too and nowhere else.

    There is no metadata left by which one could tell.
    """
    for name, (theirs, ours) in verdicts.items():
        assert _NO_END.isdisjoint(str(getattr(ours, aspect)) for aspect in ASPECTS), name
        assert ours.read not in _WRONG_BYTES or theirs.read in _WRONG_BYTES, name
        assert ours.write is not Word.SPOILS or theirs.write is Word.SPOILS, name


def test_the_page_tells_what_was_found(verdicts: Verdicts, request: pytest.FixtureRequest) -> None:
    page = PAGE.read_text(encoding="utf-8")
    found = filled(page, verdicts)
    if request.config.getoption(OPTION):
        PAGE.write_text(found, encoding="utf-8")
        return
    assert page == found, f"{PAGE.name} is out of date: run this test with {OPTION}"


# -- the comparison itself


@pytest.mark.parametrize("name", ["plain", "v2", "backing", "data-file", "extended-l2", "zstd"])
def test_both_take_an_undamaged_image(
    bases: Bases, cell: Cell, warm: Warm, tmp_path: Path, name: str
) -> None:
    base = bases[name]
    case = Case(base.data, base)
    assert their_verdict(case, f"sound-{name}", cell) == _SOUND
    assert our_verdict(case, tmp_path / name, warm) == _SOUND


def test_qemu_reaches_nothing_of_this_host(bases: Bases, cell: Cell, tmp_path: Path) -> None:
    """Whoever runs the tests may be root, and the images name files to be written to."""
    secret = tmp_path / "secret.raw"
    secret.write_bytes(bytes(1 << 20))
    base = bases["backing"]
    image = base.image().name_backing(os.fsencode(secret))
    verdict = their_verdict(Case(bytes(image.data), base), "reaching-out", cell)
    assert (verdict.read, verdict.write) == (Word.REFUSED, Word.REFUSED)
    (cell.root / "images").mkdir(exist_ok=True)
    assert cell.run("images", "qemu-img", "info", str(secret)).returncode
    assert cell.run("images", "qemu-img", "info", "/etc/passwd").returncode == 0  # a stand-in
    assert not (cell.root / IMAGE).exists()
