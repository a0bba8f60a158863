"""A job takes an open disk or a name; what a named disk names still has to pass the gate."""

from __future__ import annotations

from pathlib import Path

import pytest

import underlay
from underlay import jobs

from .conftest import Make


@pytest.mark.parametrize("kind", [str, Path])
def test_a_name_does_as_well_as_an_open_disk(make: Make, kind: type[str] | type[Path]) -> None:
    path = make("disk.qcow2", "qcow2", "4M", "write -P 1 1M 1M")
    name = kind(path)
    with underlay.open_any(path) as disk:
        assert jobs.digest(name) == jobs.digest(disk)
        assert jobs.compare(name, disk).identical
        assert jobs.compare(disk, name, strict=True).identical
        assert list(jobs.map_image(name)) == list(jobs.map_image(disk))
        assert jobs.picture(name).data == jobs.picture(disk).data
        assert disk.read_bytes(1 << 20, 1) == b"\1"  # what was given open stays open


def test_the_gate_is_asked_for_what_a_named_disk_names(make: Make) -> None:
    path = make("base.qcow2", "qcow2", "4M", "write -P 1 1M 1M").parent / "overlay.qcow2"
    underlay.create(path, backing_file="base.qcow2", backing_fmt="qcow2").close()
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        jobs.digest(path)
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        jobs.picture(path)
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        next(jobs.map_image(path))
    gate = underlay.DirectoryGate()
    assert jobs.digest(path, gate=gate) == jobs.digest(path.parent / "base.qcow2")
    assert jobs.compare(path, path.parent / "base.qcow2", gate=gate).identical
