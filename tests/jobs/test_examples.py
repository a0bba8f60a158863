"""The example in each job's docstring does what it says."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay
import underlay.jobs

from .conftest import Make

_MARK = "Example::\n"


#: They need a bucket: tests/storage_backends/s3/test_blocks.py runs theirs.
_ELSEWHERE = {"check_storage", "collect_storage"}
JOBS = [
    name
    for name in underlay.jobs.__all__
    if inspect.isroutine(getattr(underlay.jobs, name)) and name not in _ELSEWHERE
]


@pytest.mark.parametrize("name", JOBS)
def test_it_runs(name: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("disk.qcow2", "qcow2", "4M", "write -P 1 1M 1M")
    make("a.qcow2", "qcow2", "1M", "write -P 1 64k 64k")
    make("b.raw", "raw", "1M")
    monkeypatch.chdir(tmp_path)
    job: Callable[..., object] = getattr(underlay.jobs, name)
    told = inspect.getdoc(job) or ""
    assert _MARK in told, f"{name} has no example"
    example = told.split(_MARK)[1].split("\n\nRaises:")[0]
    exec(compile(textwrap.dedent(example), f"<{name}>", "exec"), {"underlay": underlay})  # noqa: S102
