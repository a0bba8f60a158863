"""``underlay rebase``: what it says beyond qemu-img."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.cli.conftest import Run


def test_the_old_chain_asks_the_gate(chain: Path, run: Run) -> None:
    before = (chain / "top.qcow2").read_bytes()
    done = run("rebase", "-b", "", "top.qcow2")
    assert (done.status, done.out) == (1, "")
    assert "names the backing file 'middle.qcow2'" in done.err
    assert "--gate directory allows" in done.err
    assert (chain / "top.qcow2").read_bytes() == before
    assert run("rebase", "--gate=directory", "-b", "", "top.qcow2") == (0, "", "")


def test_what_the_new_image_names_asks_it_too(chain: Path, plain: Path, run: Run) -> None:
    done = run("rebase", "-b", "middle.qcow2", "-F", "qcow2", plain)
    assert done.status == 1
    assert "names the backing file 'low/base.raw'" in done.err
    assert run("rebase", "-u", "-b", "middle.qcow2", "-F", "qcow2", plain) == (0, "", "")


def test_its_json(chain: Path, run: Run) -> None:
    done = run("rebase", "--gate=directory", "--output=json", "-b", "", "top.qcow2")
    assert json.loads(done.out) == {
        "version": 1,
        "filename": "top.qcow2",
        "virtual-size": 4 << 20,
        "data-bytes": 448 << 10,
        "zero-bytes": 0,
    }


def test_its_progress_as_json(chain: Path, run: Run) -> None:
    done = run("rebase", "--gate=directory", "--progress=json", "-b", "", "top.qcow2")
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert lines[-1] == {"done": 4 << 20, "total": 4 << 20}
