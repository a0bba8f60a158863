"""Both tools' answers to the lines of the table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .pool import make_pool
from .running import FORKING, Answer, answer, prepare, qemu_img
from .table import Line

if TYPE_CHECKING:
    from tests.cli.conftest import Run
    from tests.conftest import Tool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory, qemu_img: Tool, qemu_io: Tool) -> Path:
    """The folder with the images of the pool."""
    folder = tmp_path_factory.mktemp("pool")
    with contextlib.chdir(folder):
        make_pool(folder, qemu_img, qemu_io)
    return folder


@pytest.fixture(scope="session")
def theirs(
    request: pytest.FixtureRequest, pool: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Mapping[str, Future[Answer]]]:
    """What the real qemu-img answers to each line of this run, worked out while tests run."""
    root = tmp_path_factory.mktemp("theirs")
    lines = [line for item in request.session.items if (line := _line(item)) is not None]

    def ask(number: int, line: Line) -> Answer:
        folder = root / str(number)
        prepare(line, pool, folder)
        return answer(line, folder, qemu_img)

    with ThreadPoolExecutor(2) as executor:
        yield {line.text: executor.submit(ask, number, line) for number, line in enumerate(lines)}


def _line(item: pytest.Item) -> Line | None:
    """The line that a test is about."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return None
    line: object = item.callspec.params.get("line")
    return line if isinstance(line, Line) else None


@pytest.fixture
def ours(
    pool: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Line], Answer]:
    """Our answer to a line, in this process."""
    monkeypatch.setenv("UNDERLAY_GATE", "permissive")

    def tool(folder: Path, words: list[str]) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        with FORKING:
            return run(*words)

    def ask(line: Line) -> Answer:
        folder = tmp_path / "ours"
        prepare(line, pool, folder)
        return answer(line, folder, tool)

    return ask
