"""What the documents say is so: names exist, hooks are as described, snippets run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from underlay import hookspecs
from underlay.limits import Limits
from underlay.units import parse_size

if TYPE_CHECKING:
    from tests.conftest import Tool
    from tests.packaging.conftest import RunPython

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "SECURITY.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]


def rows() -> Iterator[tuple[str, str]]:
    """Each row of the table of names: imago's side and ours."""
    text = (REPOSITORY / "docs" / "imago-names.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            assert cells[1] != "none" or cells[2], f"no reason for {cells[0]}"
            yield cells[0], cells[1]


def resolve(name: str) -> object:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(name)


OURS = sorted({name for _, cell in rows() for name in re.findall(r"`([\w.]+)`", cell)})


@pytest.mark.parametrize("name", OURS)
def test_each_name_that_the_table_promises_exists(name: str) -> None:
    assert resolve(name) is not None


def test_the_table_tells_of_each_of_imagos_names_once() -> None:
    names = [name for name, _ in rows()]
    assert len(names) == len(set(names)) >= 70


def test_the_plugin_guide_describes_every_hook_with_its_signature() -> None:
    text = (REPOSITORY / "docs" / "plugins.md").read_text(encoding="utf-8")
    described = re.findall(r"^### `(underlay_.*)`$", text, re.MULTILINE)
    specs = [
        name + str(inspect.signature(function)).replace("'", "")
        for name, function in inspect.getmembers(hookspecs, inspect.isfunction)
        if name.startswith("underlay_")
    ]
    assert sorted(described) == sorted(specs)


def test_the_error_tree_is_drawn_as_it_is() -> None:
    errors = importlib.import_module("underlay.errors")
    drawn = re.findall(r"^ *(?:[|+ -]*) ?(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    defined = [
        name
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if cls.__module__ == "underlay.errors"
    ]
    assert sorted(drawn) == sorted(defined)


def test_the_documents_tell_of_each_limit_and_its_default() -> None:
    told = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \|", told, re.MULTILINE)
    assert {name: parse_size(size) for name, size in listed} == attrs.asdict(Limits())


def test_links_between_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


# -- snippets


def blocks(language: str) -> list[object]:
    """Every fenced block of a language, as a test parameter."""
    found: list[object] = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[1], id=f"{document.name}:{line}"))
    return found


@pytest.fixture
def workplace(tmp_path: Path, qemu_img: Tool) -> Path:
    """A folder with the images that the snippets speak of."""
    for name in ("base.qcow2", "overlay.qcow2"):
        shutil.copy(REPOSITORY / "examples" / "images" / name, tmp_path)
    qemu_img("create", "-q", "-f", "raw", tmp_path / "plain.img", "1M")
    return tmp_path


#: As a program of its own: it may start processes, which read it again.
_RUN = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"


@pytest.mark.parametrize("code", blocks("python"))
def test_a_python_snippet_runs(code: str, workplace: Path, run_python: RunPython) -> None:
    script = workplace / "snippet.py"
    script.write_text(code, encoding="utf-8")
    out = run_python(_RUN, script, cwd=workplace)
    # What a snippet prints stands behind its print, as a comment.
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    if promised:
        checker = doctest.OutputChecker()
        assert checker.check_output("\n".join(promised) + "\n", out, doctest.ELLIPSIS), out


@pytest.mark.parametrize("session", blocks("console"))
def test_a_console_snippet_prints_what_it_shows(
    session: str, workplace: Path, clean_environment: dict[str, str]
) -> None:
    path = sysconfig.get_path("scripts") + os.pathsep + clean_environment["PATH"]
    for command in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
        line, _, expected = command.partition("\n")
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=workplace,
            env={**clean_environment, "PATH": path, "COLUMNS": "100"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        checker = doctest.OutputChecker()
        assert checker.check_output(expected, done.stdout, options), f"$ {line}\n{done.stdout}"


def test_public_names_are_listed_and_exist() -> None:
    package: ModuleType = importlib.import_module("underlay")
    listed: list[str] = package.__all__
    assert listed == sorted(listed, key=listed.index)
    assert len(listed) == len(set(listed))
    for name in listed:
        assert getattr(package, name) is not None
