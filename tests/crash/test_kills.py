"""A program that is killed while it writes leaves a good image, at whatever time that is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay

from .judging import chance_of, differences
from .killed import SHAPE, follow
from .structure import look_at

pytestmark = pytest.mark.slow


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """As many kills as ``--crash-kills`` says."""
    kills = metafunc.config.getoption("--crash-kills")
    assert isinstance(kills, int)
    metafunc.parametrize("seed", range(kills))


def test_a_killed_writer_leaves_what_it_promised(
    seed: int, tmp_path: Path, qemu_img: Callable[..., str]
) -> None:
    image = tmp_path / "disk.qcow2"
    underlay.create(image, size=SHAPE.size, cluster_size=SHAPE.cluster).close()

    said = _kill(image, str(seed), after=chance_of("kill", seed).uniform(0.0, 0.25))
    begun, promised = said.get("begun", 0), said.get("promised", 0)

    assert not look_at(image.read_bytes()).corruptions
    if seed % 4 == 0:
        # It finds leaks only, which is what may be, and mends them.
        qemu_img("check", "-q", "-r", "leaks", image)
    allowed = _contents(str(seed), promised, begun)
    with underlay.open_image(image, format="qcow2") as disk:
        content = disk.read_bytes(0, disk.size)
    assert not differences(content, allowed, "the disk")


def _kill(image: Path, seed: str, *, after: float) -> dict[str, int]:
    """Start the program, kill it some time after its first word, and hear what it said last."""
    tests = str(Path(__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-m", "crash.killed", image, seed],
        env=os.environ | {"PYTHONPATH": tests},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(after)
        process.kill()
        lines = [first, *process.stdout]
    assert process.returncode == -signal.SIGKILL, "it ended by itself"
    said: dict[str, int] = {}
    for line in lines:
        if line.endswith(b"\n"):
            word, number = line.split()
            said[word.decode()] = int(number)
    assert said, "it never began"
    return said


def _contents(seed: str, promised: int, begun: int) -> list[bytes]:
    """What the disk may hold, as mixtures."""
    for number, _, history in follow(seed):
        if number >= begun:
            return [moment.content for moment in history.moments[promised:]]
    raise AssertionError
