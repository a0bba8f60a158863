"""Every command that can take long tells a program how far it is, in the same way."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from underlay import jobs

if TYPE_CHECKING:
    from tests.cli.conftest import Run

DRAWN = "map --picture picture.svg plain.qcow2"
LINES = (
    "amend -o lazy_refcounts=on plain.qcow2",
    "bench -c 100 plain.qcow2",
    "bitmap --add --clear --disable --remove plain.qcow2 b",
    "check plain.qcow2",
    "check -r all plain.qcow2",
    "commit --gate directory overlay.qcow2",
    "compare plain.qcow2 plain.qcow2",
    "convert plain.qcow2 new.raw",
    "convert -O qcow2 -o preallocation=metadata plain.qcow2 new.qcow2",
    "convert -O qcow2 --bitmaps plain.qcow2 new.qcow2",
    "create -q -f qcow2 -o preallocation=full new.qcow2 1M",
    "dd if=plain.qcow2 of=new.raw",
    "digest plain.qcow2",
    DRAWN,
    "measure -O qcow2 plain.qcow2",
    "rebase --gate directory -b plain.qcow2 -F qcow2 overlay.qcow2",
    "resize --preallocation=full plain.qcow2 +1M",
    "resize --shrink plain.qcow2 -- -512k",
    "snapshot -c new plain.qcow2",
)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_json_progress_goes_up_and_ends_with_all(plain: Path, run: Run, line: str) -> None:
    if "overlay" in line:
        new = "create -q -f qcow2 -b plain.qcow2 -F qcow2 overlay.qcow2"
        assert run(*new.split())[0] == 0
    command, *words = line.split()
    status, _, err = run(command, "--progress=json", *words)
    assert status == 0, err
    told = [json.loads(each) for each in err.splitlines()]
    pairs = [(each["done"], each["total"]) for each in told]
    assert pairs == sorted(set(pairs))
    assert told[-1]["done"] == told[-1]["total"] > 0


@pytest.mark.parametrize(
    "line",
    ["snapshot -c new large.qcow2", "resize --shrink large.qcow2 1G"],
    ids=lambda line: line[:6],
)
def test_ctrl_c_leaves_an_image_sound(here: Path, oracle: Run, line: str) -> None:
    jobs.create(here / "large.qcow2", size="128G", preallocation="metadata")
    command, *words = line.split()
    with subprocess.Popen(
        [sys.executable, "-m", "underlay", command, "--progress=json", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stderr is not None
        assert '"done": 0' in child.stderr.readline()  # it is at work
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert all(told.startswith("{") for told in err.splitlines())
    # It may leak a little where a system call or a change in memory was cut off.
    assert oracle("check", "-q", "large.qcow2").status in {0, 3}
    assert jobs.snapshots("large.qcow2") == ()


def test_progress_is_no_part_of_what_a_command_prints(run: Run, plain: Path) -> None:
    status, out, err = run("resize", "-p", plain.name, "+1M")
    assert (status, out) == (0, "Image resized.\n")
    assert err.endswith("(100.00/100%)\r\n")
    for line in (f"snapshot -p -c new {plain.name}", f"bitmap -p --add {plain.name} b"):
        assert run(*line.split())[:2] == (0, "")
    assert run("resize", "-p", "-q", plain.name, "+1M") == (0, "", "")


@pytest.mark.parametrize("columns", [30, 40, 80, 200])
def test_a_bar_fits_on_one_line_of_any_terminal(plain: Path, columns: int) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    environment = {key: text for key, text in os.environ.items() if key != "COLUMNS"}
    command = [sys.executable, "-m", "underlay", "digest", "-p", plain.name]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env={**environment, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"},
    ) as running:
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # nobody has the other end any more
            while piece := os.read(ours, 65536):
                written += piece
    os.close(ours)
    assert running.returncode == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode()).replace("\r\n", "\n")
    assert shown.count("\n") == 1
    last = shown.rstrip("\n").rpartition("\r")[2].strip()
    assert len(last) <= columns
    assert re.fullmatch(r"100% ━+ (.* )?[0-9.]+ .?i?B/s \d:\d\d:\d\d", last)
    assert last.count("/") == (1 if columns < 60 else 2)  # of bytes, too, where there is room


#: What qemu-img has in JSON too has its layout, which bears no version.
_UNVERSIONED = ("check", "map", "measure")


@pytest.mark.parametrize("line", [*sorted({*LINES} - {DRAWN}), "snapshot -d one plain.qcow2"])
def test_each_command_answers_a_program_in_json(plain: Path, run: Run, line: str) -> None:
    jobs.create("overlay.qcow2", backing_file=plain.name, backing_fmt="qcow2")
    jobs.create_snapshot(plain.name, "one")
    command, *words = line.split()
    status, out, _ = run(command, "--output=json", *words)
    assert status == 0
    assert json.loads(out).get("version") == (None if command in _UNVERSIONED else 1)


def test_a_change_is_answered_with_what_there_is_then(plain: Path, run: Run) -> None:
    done = run("snapshot", "--output=json", "-c", "one", plain.name)
    assert [one["name"] for one in json.loads(done.out)["snapshots"]] == ["one"]
    assert run("snapshot", "--output=json", "-l", plain.name) == done
    done = run("bitmap", "--output=json", "--add", "--disable", plain.name, "b")
    assert [(one["name"], one["flags"]) for one in json.loads(done.out)["bitmaps"]] == [("b", [])]
    assert run("bitmap", "--output=json", "--list", plain.name) == done
