"""What an image names is opened by the gate's word alone, and a refusal says how to allow it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Run
    from tests.conftest import Tool

FOLLOWING = {
    "info": ("info", "--backing-chain", "top.qcow2"),
    "map": ("map", "top.qcow2"),
    "compare": ("compare", "top.qcow2", "top.qcow2"),
    "convert": ("convert", "top.qcow2", "out.raw"),
    "dd": ("dd", "if=top.qcow2", "of=out.raw"),
}

#: A list for each ``opened_files`` that is going on: a hook cannot be taken away again.
_listening: list[list[str]] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes):
        for opened in _listening:
            opened.append(os.path.basename(os.fsdecode(arguments[0])))


sys.addaudithook(_listen)


@contextmanager
def opened_files() -> Generator[list[str]]:
    """The names of the files that are opened meanwhile."""
    opened: list[str] = []
    _listening.append(opened)
    try:
        yield opened
    finally:
        _listening.remove(opened)


@pytest.mark.parametrize("command", FOLLOWING)
def test_the_default_is_to_open_nothing_that_an_image_names(
    chain: Path, run: Run, command: str
) -> None:
    with opened_files() as opened:
        done = run(*FOLLOWING[command])
    assert "top.qcow2" in opened
    assert not {"middle.qcow2", "base.raw", "out.raw"} & set(opened)
    assert done.status == (2 if command == "compare" else 1)
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert done.err.startswith("underlay: 'top.qcow2' names the backing file 'middle.qcow2'")
    assert "--gate directory" in done.err
    assert "--gate permissive" in done.err
    assert "gate=" not in done.err


@pytest.mark.parametrize("command", FOLLOWING)
@pytest.mark.parametrize(
    "gate", ["directory", "directory:{here}", "directory:/nowhere:.", "permissive"]
)
def test_a_gate_that_allows_it_lets_it_through(
    chain: Path, run: Run, command: str, gate: str
) -> None:
    done = run(*FOLLOWING[command], "--gate", gate.format(here=chain))
    assert (done.status, done.err) == (0, "")


def test_the_flag_beats_the_variable_and_the_variable_is_read_at_each_call(
    chain: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("map", "top.qcow2").status == 1
    monkeypatch.setenv("UNDERLAY_GATE", "directory")
    assert run("map", "top.qcow2").status == 0
    assert run("map", "--gate=deny", "top.qcow2").status == 1
    monkeypatch.setenv("UNDERLAY_GATE", "")
    assert run("map", "top.qcow2").status == 1


@pytest.mark.parametrize(
    "value", ["", "allow", "Deny", "directory:", "directory:a::b", "permissive:x"]
)
@pytest.mark.parametrize("command", ["info", "map", "convert", "probe", "inspect"])
def test_an_unknown_gate_is_an_error(
    plain: Path, run: Run, monkeypatch: pytest.MonkeyPatch, command: str, value: str
) -> None:
    names = ("plain.qcow2", "out.raw")[: 2 if command == "convert" else 1]
    done = run(command, "--gate", value, *names)
    assert done.status == 1
    assert done.err.startswith(f"underlay: --gate: unknown gate '{value}'")
    assert not Path("out.raw").exists()
    if value:
        monkeypatch.setenv("UNDERLAY_GATE", value)
        done = run(command, *names)
        assert (done.status, done.out) == (1, "")
        assert done.err.startswith(f"underlay: UNDERLAY_GATE: unknown gate '{value}'")


def test_a_refusal_outside_the_folder_names_the_folder_that_would_do(
    chain: Path, run: Run, qemu_img: Tool
) -> None:
    (chain / "images").mkdir()
    qemu_img(
        *("create", "-q", "-f", "qcow2", "-b", "../low/base.raw", "-F", "raw"),
        chain / "images" / "over.qcow2",
    )
    done = run("map", "--gate", "directory", "images/over.qcow2")
    assert done.status == 1
    assert "'../low/base.raw'" in done.err
    assert f"--gate 'directory:{chain / 'low'}'" in done.err
    advised = run("map", "--gate", f"directory:{chain / 'low'}", "images/over.qcow2")
    assert (advised.status, advised.err) == (0, "")


@pytest.mark.parametrize(
    "name", ["nbd://localhost:1/x", 'json:{"driver":"file"}', "/dev/zero", "null:", "memory:x"]
)
@pytest.mark.parametrize("gate", ["deny", "directory"])
def test_names_that_are_no_file_of_the_folder_lead_nowhere(
    names_backing: Callable[[str], Path], run: Run, name: str, gate: str
) -> None:
    path = names_backing(name)
    done = run("map", "--gate", gate, path.name)
    assert (done.status, done.out) == (1, "")
    assert done.err.count("\n") == 1


def test_a_link_out_of_the_folder_is_followed_before_the_decision(
    names_backing: Callable[[str], Path], run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.raw"
    secret.write_bytes(b"secret" * 100)
    path = names_backing("inside.raw")
    path.with_name("inside.raw").symlink_to(secret)
    done = run("map", "--gate", "directory", path.name)
    assert done.status == 1
    assert "outside" in done.err
    assert run("map", "--gate", f"directory:{secret.parent}", path.name).status == 0


@pytest.mark.parametrize("command", ["info", "probe", "inspect"])
@pytest.mark.parametrize("output", ["human", "json"])
def test_looking_at_an_image_opens_that_one_object(
    chain: Path, run: Run, command: str, output: str
) -> None:
    with opened_files() as opened:
        done = run(command, f"--output={output}", "--gate", "permissive", "top.qcow2")
    assert done.err == ""
    assert opened.count("top.qcow2") == 1
    assert not {"middle.qcow2", "base.raw"} & set(opened)


def test_the_chain_of_an_image_with_a_data_file_is_told_without_it(
    here: Path, run: Run, qemu_img: Tool
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "disk.qcow2", "1M")
    (here / "data.raw").unlink()
    done = run("info", "--backing-chain", "--gate", "directory", "disk.qcow2")
    assert (done.status, done.err) == (0, "")
    assert "data file: data.raw\n" in done.out


def test_chains_end_somewhere(here: Path, run: Run, qemu_img: Tool) -> None:
    for name, below in (("a.qcow2", "b.qcow2"), ("b.qcow2", "a.qcow2")):
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", below, "-F", "qcow2", name, "1M")
    done = run("info", "--backing-chain", "--gate", "directory", "a.qcow2")
    assert (done.status, done.out) == (1, "")
    assert "loops" in done.err


def test_limits_are_said_and_raised_on_the_command_line(chain: Path, run: Run) -> None:
    common = ("map", "--gate", "directory", "top.qcow2")
    done = run(*common, "--limit", "chain_depth=2")
    assert done.status == 1
    assert "--limit chain_depth=" in done.err
    assert "Limits(" not in done.err
    assert run(*common, "--limit", "chain_depth=3", "--limit", "virtual_size=1T").status == 0
    for wrong in ("chain_depth", "chain_depth=x", "nonsense=1", "=1"):
        assert run(*common, "--limit", wrong).status == 1
