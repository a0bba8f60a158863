"""What docs/object-storage.md says is so: its table of options, and that one can try it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from underlay_storage.s3.settings import OPTIONS

from .servers import free_ports

REPOSITORY = Path(__file__).resolve().parents[3]
DOCUMENT = REPOSITORY / "docs" / "object-storage.md"


def block(language: str) -> str:
    found = re.search(
        rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert found is not None
    return found[1]


def test_the_options_are_told_as_they_are() -> None:
    rows = [
        f"| `{name}` | {spec.help} | {spec.default or 'none'} |" for name, spec in OPTIONS.items()
    ]
    told = re.findall(r"^\| `[a-z_]+` \| .* \| .* \|$", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    assert told == rows, "\n".join(["the table has to be", *rows])


def test_one_can_try_it(tmp_path: Path, program: Callable[[str], str]) -> None:
    program("weed")
    shutil.copy(REPOSITORY / "examples" / "images" / "base.qcow2", tmp_path)
    ports = free_ports(8)
    script = block("bash").replace("8333", str(ports.pop()))
    # All but this one port are left to chance, for there may be other servers here.
    others = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
    others += ["filer.port", "filer.port.grpc", "s3.port.grpc"]
    chosen = " ".join(f"-{name}={port}" for name, port in zip(others, ports, strict=True))
    script = script.replace("weed server ", f"weed server {chosen} ")
    example = tmp_path / "example.py"
    example.write_text(block("py"), encoding="utf-8")
    run = f"{sys.executable} {example}\nkill -KILL"
    script = script.replace("kill -KILL", run)
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    with subprocess.Popen(
        ["bash", "-euc", script],
        cwd=tmp_path,
        env={"PATH": path, "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            said, _ = child.communicate(timeout=240)
        finally:
            with contextlib.suppress(
                ProcessLookupError
            ):  # the server, should the script have failed
                os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 0, said
    assert "Images are identical." in said
    assert "b'hello'" in said
    assert (tmp_path / "back.raw").stat().st_size > 0


@pytest.mark.parametrize("name", ["s3", "gs", "az", "https"])
def test_every_kind_of_address_is_told(name: str) -> None:
    assert f"`{name}://" in DOCUMENT.read_text("utf-8")
