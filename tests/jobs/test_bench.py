"""Measuring a disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import underlay
from underlay.jobs import Progress, bench

from .conftest import Make

Tool = Callable[..., str]


@pytest.mark.parametrize("depth", [1, 8])
def test_each_request_is_sent_once(make: Make, qemu_io: Tool, depth: int) -> None:
    path = make("disk.qcow2", "qcow2", "1M")
    told: list[Progress] = []
    result = bench(
        path,
        count=40,
        depth=depth,
        buffer_size=4096,
        step=8192,
        offset=64 << 10,
        write=True,
        pattern=7,
        flush_interval=10,
        progress=told.append,
    )
    assert (result.requests, result.flushes) == (40, 4)
    assert result.seconds > 0
    assert result.bytes_per_second > 0
    assert told[-1] == Progress(40 * 4096, 40 * 4096)
    last = (64 << 10) + 39 * 8192
    for offset in (64 << 10, last):
        assert "failed" not in qemu_io("-f", "qcow2", "-c", f"read -P 7 {offset} 4k", path)
    for offset in (0, (64 << 10) + 4096, last + 8192):
        assert "failed" not in qemu_io("-f", "qcow2", "-c", f"read -P 0 {offset} 4k", path)


@pytest.mark.parametrize("depth", [1, 4])
def test_it_goes_round_at_the_end_of_the_disk_and_never_over_it(make: Make, depth: int) -> None:
    path = make("disk.qcow2", "qcow2", "1M")
    assert bench(path, count=5, depth=depth, buffer_size=512 << 10).requests == 5
    with pytest.raises(underlay.OutOfRangeError, match="past the disk's"):
        bench(path, count=5, depth=depth, buffer_size=512 << 10, step=300 << 10)


def test_what_a_callback_raises_ends_it(make: Make) -> None:
    path = make("disk.qcow2", "qcow2", "1M")

    def enough(_progress: Progress) -> None:
        raise KeyboardInterrupt

    for depth in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            bench(path, count=1000, depth=depth, progress=enough)


@pytest.mark.parametrize(
    "wrong", [{"count": -1}, {"depth": 0}, {"buffer_size": -1}, {"offset": -1}]
)
def test_what_makes_no_sense_is_refused(make: Make, wrong: dict[str, Any]) -> None:
    path = make("disk.raw", "raw", "1M")
    with pytest.raises(underlay.OptionError):
        bench(path, format="raw", **wrong)
