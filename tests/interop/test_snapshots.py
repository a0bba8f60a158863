"""Internal snapshots: each one reads as QEMU reads it, by its ID and by its name."""

from __future__ import annotations

from typing import Any

import pytest

import underlay
from underlay import DirectoryGate, ReadOnlyError
from underlay.capabilities import Snapshottable

from .building import BuiltImage
from .matrix import over

over_snapshots = over(lambda recipe: recipe.has_snapshots)


def _listed(image: BuiltImage) -> list[dict[str, Any]]:
    """The snapshots as QEMU tells them."""
    snapshots: list[dict[str, Any]] = image.told["snapshots"]
    return snapshots


@over_snapshots
def test_every_snapshot_reads_as_qemu_reads_it(image: BuiltImage) -> None:
    listed = _listed(image)
    names = [snapshot["name"] for snapshot in listed]
    ids = [snapshot["id"] for snapshot in listed]
    for snapshot in listed:
        keys = [snapshot["id"]]
        # A name that is another one's ID means the other one.
        if names.count(snapshot["name"]) == 1 and snapshot["name"] not in ids:
            keys.append(snapshot["name"])
        theirs = image.snapshot_raw(snapshot["id"]).read_bytes()
        for key in keys:
            with underlay.open_image(
                image.path, format="qcow2", snapshot=key, gate=DirectoryGate()
            ) as disk:
                assert disk.size == len(theirs)
                assert disk.read_bytes(0, disk.size) == theirs
                assert not disk.writable
                with pytest.raises(ReadOnlyError):
                    disk.write(b"x", 0)


@over_snapshots
def test_snapshots_are_listed_as_qemu_lists_them(image: BuiltImage) -> None:
    with underlay.open_any(image.path, gate=DirectoryGate()) as disk:
        store = disk.capability(Snapshottable)
        assert store is not None
        ours = store.snapshots()
    assert [
        {
            "id": snapshot.id,
            "name": snapshot.name,
            "vm-state-size": snapshot.vm_state_size,
            "date-sec": snapshot.date_sec,
            "date-nsec": snapshot.date_nsec,
            "vm-clock-sec": snapshot.vm_clock_nsec // 1_000_000_000,
            "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
        }
        for snapshot in ours
    ] == [
        {key: value for key, value in theirs.items() if key != "icount"}
        for theirs in _listed(image)
    ]
