"""``underlay convert`` as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("flags", ["-O raw", "-O qcow2", "-c -O qcow2", "-O raw -m 1"])
def test_ctrl_c_ends_it_at_once_and_leaves_nothing(flags: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source.raw", tmp_path / "target"
    source.write_bytes(b"some data " * (4 << 20))
    command = [sys.executable, "-m", "underlay", "convert", *flags.split(), "-r", "64K"]
    with subprocess.Popen(
        [*command, "--progress=json", source, target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stderr is not None
        assert '"done": 0' in child.stderr.readline()  # it is at work
        os.kill(child.pid, signal.SIGINT)
        out, err = child.communicate(timeout=60)  # to its end it would go on for minutes
    assert child.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["source.raw"]
