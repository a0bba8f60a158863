"""``underlay commit``: what it says beyond qemu-img."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.cli.conftest import Run


def test_the_chain_asks_the_gate(chain: Path, run: Run) -> None:
    before = (chain / "top.qcow2").read_bytes()
    done = run("commit", "top.qcow2")
    assert (done.status, done.out) == (1, "")
    assert "names the backing file 'middle.qcow2'" in done.err
    assert (chain / "top.qcow2").read_bytes() == before
    assert run("commit", "--gate=directory", "top.qcow2") == (0, "Image committed.\n", "")


def test_its_json(chain: Path, run: Run) -> None:
    done = run("commit", "--gate=directory", "--output=json", "-b", "low/base.raw", "top.qcow2")
    assert json.loads(done.out) == {
        "version": 1,
        "filename": "top.qcow2",
        "old-size": 2 << 20,
        "new-size": 4 << 20,
        "data-bytes": 128 << 10,
        "emptied": False,
    }


def test_its_progress_as_json(chain: Path, run: Run) -> None:
    done = run("commit", "--gate=directory", "--progress=json", "-q", "top.qcow2")
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert lines[-1] == {"done": 4 << 20, "total": 4 << 20}
    assert done.out == ""


def test_a_base_that_is_in_use_is_told_as_qemu_img_does(chain: Path, run: Run) -> None:
    import underlay

    with underlay.open_image("middle.qcow2", format="qcow2", backing=None):
        done = run("commit", "--gate=directory", "top.qcow2")
    assert done.status == 1
    assert 'Failed to get "write" lock' in done.err
