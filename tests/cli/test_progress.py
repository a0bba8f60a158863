"""Every command that can take long tells a program how far it is, in the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Run

LINES = (
    "amend -o lazy_refcounts=on plain.qcow2",
    "bench -c 100 plain.qcow2",
    "check plain.qcow2",
    "commit --gate directory overlay.qcow2",
    "compare plain.qcow2 plain.qcow2",
    "convert plain.qcow2 new.raw",
    "dd if=plain.qcow2 of=new.raw",
    "digest plain.qcow2",
    "rebase --gate directory -b plain.qcow2 -F qcow2 overlay.qcow2",
)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_json_progress_goes_up_and_ends_with_all(plain: Path, run: Run, line: str) -> None:
    if "overlay" in line:
        new = "create -q -f qcow2 -b plain.qcow2 -F qcow2 overlay.qcow2"
        assert run(*new.split())[0] == 0
    status, _, err = run(*line.split(), "--progress=json")
    assert status == 0, err
    told = [json.loads(each) for each in err.splitlines()]
    done = [each["done"] for each in told]
    assert done == sorted(set(done))
    assert told[-1]["done"] == told[-1]["total"] > 0
