"""Running a line through a tool, and comparing what two tools left behind."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import attrs

from .pool import copy_sparse, needed
from .table import Line

__all__ = ["FORKING", "Answer", "Tool", "answer", "file_differences", "like", "prepare"]

#: Runs a tool in a folder: status, stdout, stderr.
Tool = Callable[[Path, list[str]], tuple[int, str, str]]


@attrs.frozen
class Answer:
    """What a line left behind."""

    status: int
    out: str
    err: str
    folder: Path


def prepare(line: Line, pool: Path, folder: Path) -> None:
    """Make a folder with fresh copies of the images that a line works on."""
    folder.mkdir(parents=True)
    for name in needed(line.text + " " + line.images):
        copy_sparse(pool / name, folder / name)


def answer(line: Line, folder: Path, tool: Tool) -> Answer:
    """Run the commands of a line in its folder."""
    status, outs, errs = 0, "", ""
    for words in line.commands:
        status, out, err = tool(folder, [word.replace("{here}", str(folder)) for word in words])
        outs += out
        errs += err
    return Answer(status, _plain(outs, folder), _plain(errs, folder), folder)


#: Held while a process is started, and while our command works in this one: what has just been
#: forked has our open images, and their locks, until it has become the other program.
FORKING = threading.Lock()


def qemu_img(folder: Path, words: list[str]) -> tuple[int, str, str]:
    """The real one."""
    with FORKING:
        process = subprocess.Popen(
            ["qemu-img", *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="surrogateescape",
        )
    with process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


#: What two runs of one tool do not agree on.
_UNSTEADY = (
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE"),
    (r"(?m)^disk size: .*", "disk size: N"),
    (r'("actual-size"|"date-n?sec"): \d+', r"\1: N"),
    (r"completed in [\d.]+ seconds", "completed in N seconds"),
    (r"(?m)^underlay: ", "qemu-img: "),
    (r"(?m)^Try 'underlay --help'", "Try 'qemu-img --help'"),
)


def _plain(text: str, folder: Path) -> str:
    text = text.replace(str(folder), "{here}")
    for pattern, steady in _UNSTEADY:
        text = re.sub(pattern, steady, text)
    return text


def like(expected: str, text: str) -> bool:
    """Whether a text is as the table has it."""
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    return re.fullmatch(pattern, text.removesuffix("\n"), re.DOTALL) is not None


def file_differences(ours: Path, theirs: Path, pool: Path) -> Iterator[tuple[str, str]]:
    """Names of files that differ, with what differs in them."""
    names = {path.name for path in [*ours.iterdir(), *theirs.iterdir()]}
    for name in sorted(names):
        our, their = ours / name, theirs / name
        if not our.exists() or not their.exists():
            yield name, f"only {'they' if their.exists() else 'we'} leave it"
            continue
        our_bytes = our.read_bytes()
        if our_bytes == their.read_bytes():
            continue
        if (pool / name).exists() and our_bytes == (pool / name).read_bytes():
            yield name, "only they changed it"
            continue
        yield from ((name, what) for what in _images_differ(our, their))


def _images_differ(our: Path, their: Path) -> Iterator[str]:
    """What qemu-img says of two images."""
    facts = _info(our), _info(their)
    if facts[0] != facts[1]:
        yield f"info: {facts[0]}, they have {facts[1]}"
        return
    name = facts[0].get("format")
    if name == "raw":
        yield "raw bytes"
        return
    status, out, err = qemu_img(our.parent, ["compare", str(our), str(their)])
    if status:
        yield f"compare: {out}{err}"
    verdicts = [qemu_img(path.parent, ["check", str(path)]) for path in (our, their)]
    if verdicts[0][0] != verdicts[1][0] and verdicts[0][0]:
        yield f"check: {verdicts[0]}"


def _info(path: Path) -> dict[str, Any]:
    status, out, err = qemu_img(path.parent, ["info", "-U", "--output=json", str(path)])
    if status:
        return {"error": err}
    facts = cast("dict[str, Any]", json.loads(_plain(out, path.parent).replace(": N", ": 0")))
    facts.pop("filename")
    return facts
