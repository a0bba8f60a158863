"""``underlay digest``, and the options of ``convert`` that qemu-img does not have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .conftest import Run

_LINE = re.compile(r"underlay1-sha256:[0-9a-f]{64}  (.*)")


@pytest.fixture
def copies(plain: Path, run: Run) -> list[str]:
    for flags, name in (("-O raw", "a.raw"), ("-c -O qcow2", "b.qcow2")):
        assert run("convert", *flags.split(), plain.name, name) == (0, "", "")
    return [plain.name, "a.raw", "b.qcow2"]


def test_digest_prints_a_line_for_each(copies: list[str], run: Run) -> None:
    done = run("digest", *copies)
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [_LINE.fullmatch(line)[1] for line in lines] == copies  # type: ignore[index]
    assert len({line.split()[0] for line in lines}) == 1


def test_digest_as_json(copies: list[str], run: Run) -> None:
    done = run("digest", "--output=json", "-a", "md5", *copies)
    found = json.loads(done.out)
    assert found["version"] == 1
    assert [image["filename"] for image in found["images"]] == copies
    assert all(image["digest"].startswith("underlay1-md5:") for image in found["images"])
    assert len({image["virtual-size"] for image in found["images"]}) == 1


def test_digest_needs_a_name_and_a_function(copies: list[str], run: Run) -> None:
    assert run("digest").status == 1
    done = run("digest", "-a", "nonsense", copies[0])
    assert (done.status, done.out) == (1, "")
    assert "'nonsense' is no hash function" in done.err


@pytest.mark.parametrize(("level", "status"), [("9", 0), ("0", 1), ("10", 1), ("x", 1)])
def test_a_level_of_compression(level: str, status: int, plain: Path, run: Run) -> None:
    command = ("convert", "-c", "--compress-level", level, "-O", "qcow2", plain.name, "c.qcow2")
    assert run(*command).status == status
    assert Path("c.qcow2").exists() == (status == 0)
