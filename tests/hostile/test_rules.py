"""The rules can fail: uses that break them, and a library with a check taken out, are found out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from underlay import Allow, DirectoryGate
from underlay_drivers.qcow2 import layout

from .bases import Bases
from .child import Outcome, Warm
from .commands import Said, told_wrong
from .corpus import RECIPES
from .judging import Before, files, mending_faults, placed, reading_faults, writing_faults
from .uses import Faults, Mended, check, read, write

_BY_NAME = {recipe.name: recipe for recipe in RECIPES}


# -- uses that break what holds for all


def spins() -> None:
    while True:
        pass


def waits() -> None:
    time.sleep(600)


def grows() -> int:
    return len(bytearray(b"x") * (300 << 20))


def grows_without_end() -> int:
    return len(bytearray(b"x") * (3 << 30))


def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves() -> None:
    os._exit(0)


def divides() -> float:
    return 1 / len([])


def descends() -> None:
    descends()


def opens() -> None:
    Path("/etc/passwd").read_bytes()


def connects() -> None:
    with socket.socket() as client:
        client.connect_ex(("127.0.0.1", 1))


def runs() -> None:
    subprocess.run([sys.executable, "--version"], check=True)


class Unpicklable(Exception):  # noqa: N818
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)
        self.two = two


def raises_what_does_not_pickle() -> None:
    raise Unpicklable("one", "two")


BROKEN: dict[str, tuple[Callable[[], object], str]] = {
    "spins": (spins, "not over"),
    "waits": (waits, "not over"),
    "grows": (grows, "MiB of memory"),
    "grows without end": (grows_without_end, "raised MemoryError"),
    "crashes": (crashes, "ended by signal 11"),
    "leaves": (leaves, "without an answer"),
    "divides": (divides, "raised ZeroDivisionError"),
    "descends": (descends, "raised RecursionError"),
    "opens": (opens, "reached out: open /etc/passwd"),
    "connects": (connects, "reached out: socket.connect"),
    "runs": (runs, "reached out: subprocess.Popen"),
    "does not pickle": (raises_what_does_not_pickle, "cannot be pickled"),
}


@pytest.fixture(scope="module")
def impatient() -> Iterator[Warm]:
    with Warm(seconds=2, patience=6) as parent:
        yield parent


@pytest.mark.parametrize(("use", "told"), BROKEN.values(), ids=BROKEN)
def test_a_use_that_breaks_a_rule(impatient: Warm, use: Callable[[], object], told: str) -> None:
    broken = impatient.run(use).broken([])
    assert any(told in fault for fault in broken), broken
    assert impatient.run(os.getpid).broken([]) == []  # and the parent goes on


# -- a library without one of its checks


def without_header_checks(path: str) -> object:
    with mock.patch("underlay_drivers.qcow2.loading.problems", return_value=iter(())):
        return read(path)


def without_entry_checks(path: str) -> object:
    with mock.patch.object(layout, "L2_RESERVED", 0):
        return read(path)


def with_an_open_gate(path: str) -> object:
    with mock.patch.object(DirectoryGate, "decide", return_value=Allow()):
        return read(path)


READERS: dict[str, tuple[str, Callable[[str], object], str]] = {
    "header": ("incompatible-63", without_header_checks, "it opens to be read"),
    "entries": ("l2-entry-reserved-8", without_entry_checks, "damaged bytes only 0 fail"),
    "gate": ("backing-absolute", with_an_open_gate, "reached out: open /etc/passwd"),
}


@pytest.mark.parametrize(("name", "use", "told"), READERS.values(), ids=READERS)
def test_a_reader_without_a_check(
    bases: Bases,
    warm: Warm,
    tmp_path: Path,
    *,
    name: str,
    use: Callable[[str], object],
    told: str,
) -> None:
    recipe = _BY_NAME[name]
    base, path = placed(recipe, bases, tmp_path)
    outcome = warm.run(use, str(path))
    faults = [*outcome.broken([path]), *reading_faults(recipe.rule, base, outcome)]
    assert any(told in fault for fault in faults), faults


def blind_write(path: str, offset: int) -> object:
    """Write to whatever the header says."""
    nothing: Callable[..., Iterator[object]] = lambda *_, **__: iter(())  # noqa: E731
    with mock.patch("underlay_drivers.qcow2.driver.write_obstacles", nothing):
        return write(path, offset)


def stray_write(path: str, offset: int) -> object:
    """Refuse, and change a byte all the same."""
    with open(path, "r+b") as file:
        file.seek(40_000)
        file.write(b"!")
    return write(path, offset)


WRITERS: dict[str, tuple[str, Callable[[str, int], object], str]] = {
    "obstacles": ("corrupt", blind_write, "works"),
    "refused, and changed": ("corrupt", stray_write, "changed image.qcow2"),
}


@pytest.mark.parametrize(("name", "use", "told"), WRITERS.values(), ids=WRITERS)
def test_a_writer_without_a_check(
    bases: Bases,
    warm: Warm,
    tmp_path: Path,
    *,
    name: str,
    use: Callable[[str, int], object],
    told: str,
) -> None:
    recipe = _BY_NAME[name]
    base, path = placed(recipe, bases, tmp_path)
    before = Before(
        base=base,
        rule=recipe.rule,
        read=warm.run(read, str(path)),
        check=warm.run(check, str(path)),
        files=files(tmp_path, base),
    )
    offset = before.places()[0]
    outcome = warm.run(use, str(path), offset)
    faults = list(writing_faults(before, offset, outcome, files(tmp_path, base)))
    assert any(told in fault for fault in faults), faults


def test_a_repair_that_makes_it_worse(bases: Bases, warm: Warm, tmp_path: Path) -> None:
    recipe = _BY_NAME["dirty"]
    base, path = placed(recipe, bases, tmp_path)
    before = Before(
        base=base,
        rule=recipe.rule,
        read=warm.run(read, str(path)),
        check=warm.run(check, str(path)),
        files={},
    )
    left = Faults(corruptions=1, leaks=0, errors=0)
    mended = Mended(left=left, contents=before.read.value)
    assert "it made it worse" in next(mending_faults(before, Outcome(value=mended)))


# -- the command

SAID = {
    "a traceback": Said(line="info IMAGE", status=1, out="", err="Traceback (most recent"),
    "a mistake": Said(line="info IMAGE", status=1, out="", err="underlay: internal error: x\n"),
    "two lines": Said(line="info IMAGE", status=1, out="", err="underlay: one\nunderlay: two\n"),
    "no line": Said(line="info IMAGE", status=1, out="", err=""),
    "a strange status": Said(line="info IMAGE", status=120, out="", err="underlay: x\n"),
    "nothing": Said(line="info IMAGE", status=0, out="", err=""),
    "an escape": Said(line="info IMAGE", status=1, out="", err="underlay: \x1b[2J\n"),
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_a_command_that_says_it_badly(said: Said) -> None:
    assert told_wrong(said) is not None
