"""Looking at bitmaps, which qemu-img does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Run
    from tests.conftest import Tool


@pytest.fixture
def recorded(plain: Path, qemu_img: Tool, qemu_io: Tool) -> Path:
    """``plain.qcow2`` with two bitmaps."""
    qemu_img("bitmap", "--add", "-g", "64k", plain, "monday")
    qemu_io("-c", "write -P 1 1M 128k", "-c", "write -P 1 3M 1k", plain)
    qemu_img("bitmap", "--add", "--disable", "-g", "512", plain, "new\nline")
    return plain


def test_all_are_listed(run: Run, recorded: Path) -> None:
    assert run("bitmap", "--list", recorded.name).out == (
        "BITMAP     GRANULARITY  FLAGS\nmonday     64 KiB       auto\nnew\\nline  512 B\n"
    )
    told = json.loads(run("bitmap", "--list", "--output=json", recorded.name).out)
    assert told == {
        "version": 1,
        "filename": recorded.name,
        "bitmaps": [
            {"name": "monday", "granularity": 65536, "flags": ["auto"]},
            {"name": "new\nline", "granularity": 512, "flags": []},
        ],
    }


def test_what_is_dirty_is_listed(run: Run, recorded: Path) -> None:
    assert run("bitmap", "--dirty", recorded.name, "monday").out == (
        "Offset          Length\n0x100000        0x20000\n0x300000        0x10000\n"
    )
    told = json.loads(run("bitmap", "--dirty", "--output=json", recorded.name, "monday").out)
    assert told["ranges"] == [
        {"start": 1 << 20, "length": 128 << 10},
        {"start": 3 << 20, "length": 64 << 10},
    ]
    assert run("bitmap", "--dirty", recorded.name, "new\nline").out == ""
    told = json.loads(run("bitmap", "--dirty", "--output=json", recorded.name, "new\nline").out)
    assert told == {
        "version": 1,
        "filename": recorded.name,
        "bitmap": "new\nline",
        "ranges": [],
    }


def test_looking_changes_nothing(run: Run, recorded: Path) -> None:
    before = recorded.read_bytes()
    run("bitmap", "--list", recorded.name)
    run("bitmap", "--dirty", recorded.name, "monday")
    assert recorded.read_bytes() == before


def test_an_image_without_any_has_an_empty_list(run: Run, plain: Path) -> None:
    assert run("bitmap", "--list", plain.name) == (0, "", "")
    assert json.loads(run("bitmap", "--list", "--output=json", plain.name).out)["bitmaps"] == []
    failed = run("bitmap", "--dirty", plain.name, "monday")
    assert (failed.status, failed.err) == (1, "underlay: Dirty bitmap 'monday' not found\n")


def test_nothing_that_the_image_names_is_opened(run: Run, here: Path, qemu_img: Tool) -> None:
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "gone", "-F", "raw", "top.qcow2", "1M")
    assert run("bitmap", "--add", "top.qcow2", "a") == (0, "", "")
    assert run("bitmap", "--list", "top.qcow2").status == 0
