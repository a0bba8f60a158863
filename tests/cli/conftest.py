"""The command as a shell sees it, run in this process; and images to run it on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from underlay.cli import main

if TYPE_CHECKING:
    from tests.conftest import Tool


class Done(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


#: Runs the command with these arguments: ``run("info", path)``.
Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run our command in this process, with ``sys.argv`` as a console script has it."""

    def command(*arguments: object) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["underlay", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            main()
        status = ending.value.code
        assert isinstance(status, int)
        out, err = capsys.readouterr()
        return Done(status, out, err)

    return command


@pytest.fixture
def oracle(qemu_img: Tool) -> Run:
    """Run the real ``qemu-img``, whatever comes of it."""

    def command(*arguments: object) -> Done:
        done = subprocess.run(
            ["qemu-img", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the test works in, as a user in a shell."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def chain(here: Path, qemu_img: Tool, qemu_io: Tool) -> Path:
    """``top.qcow2`` on ``middle.qcow2`` on ``low/base.raw``; the folder of the first two."""
    (here / "low").mkdir()
    qemu_img("create", "-q", "-f", "raw", "low/base.raw", "2M")
    qemu_io("-f", "raw", "-c", "write -P 1 0 512k", "low/base.raw")
    low = ("-b", "low/base.raw", "-F", "raw")
    qemu_img("create", "-q", "-f", "qcow2", *low, "middle.qcow2", "3M")
    qemu_io("-c", "write -P 2 256k 64k", "-c", "write -z 1M 64k", "middle.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2", "4M")
    qemu_io("-c", "write -P 3 0 64k", "top.qcow2")
    return here


@pytest.fixture
def plain(here: Path, qemu_img: Tool, qemu_io: Tool) -> Path:
    """``plain.qcow2``, 4 MiB, with a little data in it."""
    qemu_img("create", "-q", "-f", "qcow2", "plain.qcow2", "4M")
    qemu_io("-c", "write -P 7 64k 100k", "-c", "write -P 8 2M 64k", "plain.qcow2")
    return here / "plain.qcow2"


@pytest.fixture
def names_backing(here: Path, qemu_img: Tool) -> Callable[[str], Path]:
    """An image that stores this name for its backing file, whatever it is."""

    def make(name: str) -> Path:
        path = here / "names.qcow2"
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path, "1M")
        return path

    return make
