"""What an image may ask for, and how long a command may take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from underlay.cli.commands import COMMANDS

if TYPE_CHECKING:
    from tests.cli.conftest import Run
    from tests.conftest import Tool

#: What they need besides an image; those that open none are not here.
ARGUMENTS = {
    "amend": ["-o", "compat=0.10", "disk.qcow2"],
    "bench": ["disk.qcow2"],
    "bitmap": ["--add", "disk.qcow2", "b"],
    "check": ["disk.qcow2"],
    "commit": ["disk.qcow2"],
    "compare": ["disk.qcow2", "disk.qcow2"],
    "convert": ["disk.qcow2", "new"],
    "create": ["-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "new"],
    "dd": ["if=disk.qcow2", "of=new"],
    "digest": ["disk.qcow2"],
    "info": ["disk.qcow2"],
    "inspect": ["disk.qcow2"],
    "map": ["disk.qcow2"],
    "measure": ["disk.qcow2"],
    "probe": ["disk.qcow2"],
    "rebase": ["-b", "", "disk.qcow2"],
    "resize": ["disk.qcow2", "2M"],
    "snapshot": ["-c", "s", "disk.qcow2"],
}


@pytest.fixture
def disk(tmp_path: Path, qemu_img: Tool, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image of 1 MiB, in the current folder."""
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "1M")
    return tmp_path / "disk.qcow2"


def _line(name: str, err: str) -> str:
    """The one line on stderr; create has qemu-img's second one, as to what the image was for."""
    told, *more = err.splitlines()
    assert more == (["Could not open backing image."] if name == "create" else [])
    return told


def test_every_command_that_opens_an_image_is_tried_here() -> None:
    assert set(COMMANDS) - set(ARGUMENTS) == {"plugins", "storage"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_command_that_takes_too_long_says_so_in_one_line(name: str, disk: Path, run: Run) -> None:
    before = disk.read_bytes()
    done = run(name, "--time-limit", "0", *ARGUMENTS[name])
    assert done.status == (2 if name == "compare" else 1)
    assert done.out == ""
    assert "Stopped after the 0 seconds that the time limit allows" in _line(name, done.err)
    assert disk.read_bytes() == before
    assert [path.name for path in disk.parent.iterdir()] == [disk.name]


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name not in {"probe", "inspect"}])
def test_a_command_refuses_what_asks_for_more(name: str, disk: Path, run: Run) -> None:
    done = run(name, "--limit", "metadata=65535", *ARGUMENTS[name])
    assert done.status == (2 if name == "compare" else 1)
    told = _line(name, done.err)
    assert told.endswith("is 65536, more than the 65535 that --limit metadata=N allows")


def test_inspecting_it_is_a_verdict(disk: Path, run: Run) -> None:
    done = run("inspect", "--limit", "metadata=65535", "disk.qcow2")
    assert done.out.startswith("UNSAFE")


def test_in_time_nothing_is_different(disk: Path, run: Run) -> None:
    assert run("info", "--time-limit", "600", "disk.qcow2") == run("info", "disk.qcow2")


@pytest.mark.parametrize("value", ["x", "-1", "nan", "1m", ""])
def test_the_time_limit_is_a_number_of_seconds(value: str, disk: Path, run: Run) -> None:
    done = run("info", f"--time-limit={value}", "disk.qcow2")
    assert (done.status, done.out) == (1, "")
    assert done.err == f"underlay: --time-limit: '{value}' is no number of seconds\n"
