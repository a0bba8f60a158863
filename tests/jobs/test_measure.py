"""How large images get: qemu-img's numbers, and what a real copy takes."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

import underlay
from underlay import jobs
from underlay.capabilities import Measurement
from underlay.errors import OptionError, UnsupportedOperationError

from .conftest import Make, Tool

_NAMES = {"True": "on", "False": "off"}


def theirs(qemu_img: Tool, target: str, options: dict[str, Any], *rest: object) -> Measurement:
    """What qemu-img says."""
    told = ",".join(f"{name}={_NAMES.get(str(value), value)}" for name, value in options.items())
    given = ("-o", told) if told else ()
    said = json.loads(qemu_img("measure", "--output=json", "-O", target, *given, *rest))
    return Measurement(
        required=said["required"],
        fully_allocated=said["fully-allocated"],
        bitmaps=said.get("bitmaps"),
    )


@pytest.mark.parametrize("seed", range(40))
def test_new_disks_of_every_kind_take_what_qemu_says(qemu_img: Tool, seed: int) -> None:
    chance = random.Random(seed)
    cluster = 1 << chance.randrange(9, 22)
    extended = cluster >= 16384 and chance.random() < 0.4
    options: dict[str, Any] = {
        "cluster_size": cluster,
        "extended_l2": extended,
        "refcount_bits": 1 << chance.randrange(7),
        "compat": "1.1",
        "preallocation": chance.choice(["off", "metadata", "falloc", "full"]),
    }
    if chance.random() < 0.2:
        options |= {"compat": "0.10", "refcount_bits": 16}
    most = cluster * (cluster // (16 if extended else 8)) << 22
    size = chance.choice([0, 1, cluster * chance.randrange(1 << 16), chance.randrange(1 << 44)])
    size = min(size, most)
    assert jobs.measure(size, "qcow2", options=options) == theirs(
        qemu_img, "qcow2", options, "--size", size
    )


@pytest.mark.parametrize("seed", range(8))
def test_what_images_hold_takes_what_qemu_says(make: Make, qemu_img: Tool, seed: int) -> None:
    chance = random.Random(seed)
    commands = [
        f"{chance.choice(['write', 'write -z', 'discard'])} "
        f"{chance.randrange(4000) * 512} {chance.randrange(1, 90) * 512}"
        for _ in range(5)
    ]
    make("base.raw", "raw", "1M", "write -P 5 64k 33k")
    images = [
        make("plain.raw", "raw", "3M", *commands),
        make("plain.qcow2", "qcow2", "3M", *commands, options="cluster_size=4k"),
        make("extended.qcow2", "qcow2", "3M", *commands, options="extended_l2=on"),
        make("full.qcow2", "qcow2", "3M", *commands, options="preallocation=metadata"),
        make("top.qcow2", "qcow2", "3M", *commands, backing=Path("base.raw")),
    ]
    qemu_img("bitmap", "--add", "-g", "512", images[1], "a bitmap")
    options = {"cluster_size": 1 << chance.randrange(9, 22)}
    for path in images:
        with underlay.open_any(path, gate=underlay.PermissiveImplicitOpenGate()) as disk:
            format_name = disk.format_name
            for target, given in (("qcow2", options), ("raw", {})):
                expected = theirs(qemu_img, target, given, "-f", format_name, path)
                assert jobs.measure(disk, target, options=given) == expected, path.name


def test_a_copy_takes_no_more(make: Make) -> None:
    path = make("disk.qcow2", "qcow2", "32M", "write -P 1 1M 3M", "write -P 2 20M 100k")
    measured = jobs.measure(path, "qcow2")
    jobs.convert(path, path.with_name("copy.qcow2"), output_format="qcow2")
    assert path.with_name("copy.qcow2").stat().st_size <= measured.required
    assert measured.required < measured.fully_allocated


def test_snapshots_are_measured_as_they_were(make: Make, qemu_img: Tool, qemu_io: Tool) -> None:
    path = make("disk.qcow2", "qcow2", "8M", "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "then", path)
    qemu_io("-c", "write -P 1 4M 2M", path)
    now = jobs.measure(path, "qcow2")
    then = jobs.measure(path, "qcow2", snapshot="then")
    assert now.required - then.required == 2 << 20
    assert then == theirs(qemu_img, "qcow2", {}, "-l", "then", path)


def test_progress_comes_to_its_end(make: Make) -> None:
    path = make("disk.qcow2", "qcow2", "3G", "write -P 1 2G 64k")
    told: list[jobs.Progress] = []
    jobs.measure(path, "qcow2", progress=told.append)
    assert told[-1] == jobs.Progress(3 << 30, 3 << 30)
    assert told == sorted(told, key=lambda one: one.done)


def test_what_cannot_be_is_refused(make: Make) -> None:
    with pytest.raises(OptionError, match="too large"):
        jobs.measure(1 << 62, "qcow2")
    with pytest.raises(OptionError, match="Unknown option 'colour'"):
        jobs.measure(1, "qcow2", options={"colour": "red"})
    with pytest.raises(OptionError, match="Cluster size"):
        jobs.measure(1, "qcow2", options={"cluster_size": 1000})
    with pytest.raises(OptionError, match="must be from 0"):
        jobs.measure(-1)


def test_a_format_that_cannot_say_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> bool:
        return False

    monkeypatch.setattr(sys.modules["underlay.jobs.measure"], "offers", nothing)
    with pytest.raises(UnsupportedOperationError, match="does not support size measurement"):
        jobs.measure(1, "raw")
