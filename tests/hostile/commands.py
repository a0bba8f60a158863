"""The command on a hostile image, as a use of it (see ``uses``): all of these in one child."""

from __future__ import annotations

import io
import os
import sys
from unittest import mock

import attrs

from underlay.cli.problems import exit_status

__all__ = ["CHANGING", "LOOKING", "Said", "run", "told_wrong"]

#: What stands for the image, and for a new file beside it.
_IMAGE, _NEW = "IMAGE", "NEW"

#: Command lines that leave the image as it is.
LOOKING = (
    "probe IMAGE",
    "inspect IMAGE",
    "info IMAGE",
    "info -f qcow2 --output json IMAGE",
    "check -f qcow2 IMAGE",
    "map -f qcow2 --gate directory IMAGE",
    "map -f qcow2 --output json IMAGE",
    "digest -f qcow2 --gate directory IMAGE",
    "convert -f qcow2 --gate directory -O raw IMAGE NEW",
    "measure -f qcow2 --gate directory -O qcow2 IMAGE",
    "snapshot -l IMAGE",
    "bitmap -f qcow2 --list IMAGE",
    "bitmap -f qcow2 --dirty IMAGE dirty",
)
#: Those that change it.
CHANGING = (
    "snapshot -c taken --image-opts driver=qcow2,file.filename=IMAGE",
    "bitmap -f qcow2 --add IMAGE added",
    "amend -f qcow2 -o lazy_refcounts=on IMAGE",
    "resize -q -f qcow2 IMAGE +64k",
    "check -f qcow2 -r all IMAGE",
)


@attrs.frozen(kw_only=True)
class Said:
    """What a command line came to."""

    line: str
    status: int
    out: str
    err: str


def run(lines: tuple[str, ...], image: str, new: str) -> list[Said]:
    """Run each of the lines, one after the other, in this process."""
    return [_run(line, image, new) for line in lines]


def _run(line: str, image: str, new: str) -> Said:
    words = [word.replace(_IMAGE, image).replace(_NEW, new) for word in line.split()]
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "stdout", out), mock.patch.object(sys, "stderr", err):
        status = exit_status(words)
    if os.path.lexists(new):
        os.unlink(new)
    return Said(line=line, status=status, out=out.getvalue(), err=err.getvalue())


def told_wrong(said: Said) -> str | None:
    """What is wrong with what a command said, or None."""
    command = said.line.split()[0]
    if "Traceback" in said.err or "internal error:" in said.err:
        return f"{said.line}: {said.err}"
    # Of both the exit status tells what was found.
    verdicts = {"check": {0, 2, 3}, "inspect": {0, 1, 2}}.get(command, {0})
    if said.status in verdicts:
        return None if said.out or command in _SILENT else f"{said.line}: says nothing"
    if said.status != 1:
        return f"{said.line}: exit status {said.status}: {said.err}"
    lines = said.err.splitlines()
    own = [line for line in lines if line.startswith("underlay: ")]
    # What a check found before it could not go on stands above.
    if len(own) != 1 or lines[-1] != own[0] or (len(lines) > 1 and command != "check"):
        return f"{said.line}: not one line: {said.err!r}"
    return None if own[0].isprintable() else f"{said.line}: not printable: {own[0]!r}"


#: Commands that may have nothing to say when all is well.
_SILENT = {"convert", "snapshot", "bitmap", "amend", "resize", "map"}
