"""The matrix as fixtures: every test that asks for ``image`` sees each image made by QEMU."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator

import pytest

from .building import BuiltImage, Done, Kitchen, start
from .matrix import RECIPES
from .recipes import Recipe


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of an ``image`` runs once for every recipe, unless ``over`` chose some."""
    chosen = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    if "recipe" in metafunc.fixturenames and "recipe" not in chosen:
        metafunc.parametrize("recipe", RECIPES, ids=[recipe.name for recipe in RECIPES])


@pytest.fixture(scope="session")
def kitchen(
    request: pytest.FixtureRequest,
    qemu_img: object,
    qemu_io: object,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Kitchen]:
    """Where images are made; each once a session. They stay for a look if a test failed."""
    root = tmp_path_factory.mktemp("matrix")
    yield Kitchen(root)
    if not request.session.testsfailed:
        shutil.rmtree(root)


@pytest.fixture
def image(
    kitchen: Kitchen, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BuiltImage]:
    """A recipe's image; the test runs in its folder, and must not touch a byte of it."""
    built = kitchen.image(recipe)
    monkeypatch.chdir(built.folder)
    yield built
    assert built.touched() == []


@pytest.fixture
def underlay_command() -> Callable[..., Done]:
    """Run our command in this process: ``underlay_command("info", path)``."""
    return run_underlay


@pytest.fixture
def both(underlay_command: Callable[..., Done]) -> Callable[..., tuple[Done, Done]]:
    """Run ``qemu-img`` and our command with the same arguments, in the folder that one is in."""

    def run(subcommand: str, *arguments: object) -> tuple[Done, Done]:
        finish = start("qemu-img", subcommand, *arguments)
        try:  # ours meanwhile
            ours = underlay_command(subcommand, "--gate", "directory", *arguments)
        finally:
            theirs = finish()
        return _prefixed(theirs, "qemu-img: "), _prefixed(ours, "underlay: ")

    return run


def _prefixed(done: Done, prefix: str) -> Done:
    """Who speaks is the one thing in which the two may differ."""
    lines = (line.removeprefix(prefix) for line in done.stderr.splitlines())
    return Done(done.status, done.stdout, "\n".join(lines))


def run_underlay(*arguments: object) -> Done:
    """Run our command in this process, as a shell would see it."""
    from underlay.cli import main

    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    before = sys.argv
    sys.argv = ["underlay", *map(os.fspath, map(str, arguments))]
    status: object = 0
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                status = main()
            except SystemExit as ending:
                status = ending.code
    finally:
        sys.argv = before
    for stream in (stdout, stderr):
        stream.flush()
        stream.seek(0)
    code = status if isinstance(status, int) else int(status is not None)
    return Done(code, stdout.read(), stderr.read())
