"""Resizing as a job."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

import underlay
from underlay.jobs import Resized, resize

from .conftest import Make

Tool = Callable[..., str]


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_qemu_sees_the_new_size_and_zeroes_behind(
    make: Make, qemu_img: Tool, qemu_io: Tool, kind: str
) -> None:
    path = make(f"disk.{kind}", kind, "1M", "write -P 1 0 1M")
    assert resize(path, "2M", format=kind) == Resized(1 << 20, 2 << 20)
    assert resize(path, 512 << 10, format=kind, shrink=True) == Resized(2 << 20, 512 << 10)
    assert resize(path, "1M", format=kind).after == 1 << 20
    facts = json.loads(qemu_img("info", "-f", kind, "--output=json", path))
    assert facts["virtual-size"] == 1 << 20
    read = ("-c", "read -P 1 0 512k", "-c", "read -P 0 512k 512k")
    assert "failed" not in qemu_io("-f", kind, *read, path)
    if kind == "qcow2":
        qemu_img("check", path)


def test_what_would_be_lost_must_be_asked_for(make: Make) -> None:
    path = make("disk.qcow2", "qcow2", "1M")
    before = path.read_bytes()
    with pytest.raises(underlay.OptionError, match="shrink=True"):
        resize(path, "512k")
    with pytest.raises(underlay.OptionError, match="growing"):
        resize(path, "512k", shrink=True, preallocation="full")
    assert path.read_bytes() == before


def test_new_bytes_can_be_allocated_at_once(make: Make) -> None:
    path = make("disk.raw", "raw", "64k")
    resize(path, "1M", format="raw", preallocation="full")
    assert path.stat().st_blocks * 512 >= 960 << 10


def test_the_gate_is_asked_for_the_image_below(make: Make) -> None:
    path = make("top.qcow2", "qcow2", "1M", backing=make("base.raw", "raw", "1M"))
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        resize(path, "2M")
    resize(path, "2M", gate=underlay.DirectoryGate())
