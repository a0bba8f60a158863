"""``underlay map --picture``: into files, and in terminals of every kind."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from .conftest import Run

_GATE = ("--gate", "permissive")


def test_a_name_that_ends_with_svg_or_html_is_written(chain: Path, run: Run) -> None:
    for name in ("out.svg", "out.HTML", "out.htm"):
        assert run("map", *_GATE, "--picture", name, "top.qcow2") == (0, "", "")
    drawn = ET.fromstring(Path("out.svg").read_bytes())  # noqa: S314 - it is our own
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    assert Path("out.HTML").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert Path("out.htm").read_bytes() == Path("out.HTML").read_bytes()


def test_nothing_else_can_be_drawn_into(chain: Path, run: Run) -> None:
    before = Path("middle.qcow2").read_bytes()
    done = run("map", *_GATE, "--picture", "middle.qcow2", "top.qcow2")
    assert (done.status, done.out) == (1, "")
    assert "neither FILE.svg nor FILE.html" in done.err
    assert Path("middle.qcow2").read_bytes() == before

    done = run("map", *_GATE, "--picture=out.svg", "--output=json", "top.qcow2")
    assert "mutually exclusive" in done.err
    done = run("map", *_GATE, "--picture=no/such/out.svg", "top.qcow2")
    assert done.err == (
        "underlay: Could not write the picture 'no/such/out.svg': No such file or directory\n"
    )
    assert not list(Path().glob("out*"))


def test_no_image_is_drawn_over(here: Path, run: Run) -> None:
    Path("disk.svg").write_bytes(b"x" * 4096)
    done = run("map", "-f", "raw", "--picture=./disk.svg", "disk.svg")
    assert done == (1, "", "underlay: --picture: './disk.svg' is what is to be drawn\n")
    assert Path("disk.svg").read_bytes() == b"x" * 4096


def test_a_pipe_gets_letters_for_images_and_no_colours(chain: Path, run: Run) -> None:
    done = run("map", *_GATE, "--picture=-", "top.qcow2")

    assert done.status == 0
    assert "\x1b" not in done.out
    assert {"AA top.qcow2", "BB middle.qcow2", "CC low/base.raw"} <= {
        line.rsplit("  ", 1)[0] for line in done.out.splitlines()
    }
    assert any(line.startswith("      0 B ") for line in done.out.splitlines())


def test_what_shows_ascii_alone_gets_ascii(
    chain: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "underlay", "map", *_GATE, "--picture=-", "top.qcow2"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True
    )
    assert done.stdout.isascii()
    assert b"\\u" not in done.stdout


def _in_a_terminal(command: list[str], **variables: str) -> str:
    """What a program writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "40", **variables}
    with subprocess.Popen(command, stdout=theirs, env=environment) as running:
        os.close(theirs)
        written = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # nobody has the other end any more
                break
            if not piece:
                break
            written += piece
    os.close(ours)
    assert running.returncode == 0
    return written.decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours_unless_it_wants_none(chain: Path) -> None:
    command = [sys.executable, "-m", "underlay", "map", *_GATE, "--picture=-", "top.qcow2"]
    hued = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONIOENCODING": "utf-8"}

    drawn = _in_a_terminal(command, **hued)
    assert "\x1b[38;2;61;133;216m█" in drawn
    assert "AA" not in drawn
    for plain in ({**hued, "NO_COLOR": "1"}, {**hued, "TERM": "dumb"}):
        assert "\x1b[38" not in _in_a_terminal(command, **plain)


def test_a_name_steers_no_terminal(here: Path, run: Run) -> None:
    Path("a\x1b[2J\u202e.raw").write_bytes(b"x" * 4096)
    drawn = run("map", "-f", "raw", "--picture=-", "a\x1b[2J\u202e.raw").out
    assert r"a\x1b[2J\u202e.raw" in drawn
    assert "\x1b" not in drawn
    assert "\u202e" not in drawn


def test_a_part_can_be_drawn(chain: Path, run: Run) -> None:
    drawn = run("map", *_GATE, "--picture=-", "-s", "1M", "-l", "1M", "top.qcow2").out
    assert "from 1 MiB on" in drawn
