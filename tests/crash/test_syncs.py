"""A guest's flush costs as few syncs as the order on disk allows, and never none."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay
from underlay import SyncFormatAccess
from underlay_storage.memory import MemoryStorage

from .journal import Journal, Recorder, Sync
from .shapes import SHAPES, Prepared, Shape


def _shape(name: str) -> Shape:
    return next(shape for shape in SHAPES if shape.name == name)


def _syncs(
    prepared: Prepared, work: Callable[[SyncFormatAccess], None], before: Callable[..., None]
) -> Counter[int]:
    """How often each file is synced for ``work`` and a flush after it."""
    journal = Journal(prepared.contents)
    memory = map(MemoryStorage, prepared.contents)
    recorders = [Recorder(storage, journal, file=file) for file, storage in enumerate(memory)]
    with prepared.open(recorders, writable=True) as disk:
        # Opening and the first change have costs of their own.
        before(disk)
        disk.flush()
        disk.sync()
        start = len(journal.events)
        work(disk)
        disk.flush()
        disk.sync()
        happened = journal.events[start:]
    return Counter(event.file for event in happened if isinstance(event, Sync))


def _rewrite(disk: SyncFormatAccess) -> None:
    disk.write(b"again" * 100, 3 * 512)


def _write_new(disk: SyncFormatAccess) -> None:
    for cluster in range(16, 40):
        disk.write(b"new" * 100, cluster * 512)


def _discard(disk: SyncFormatAccess) -> None:
    disk.discard_to_zero(512, 4 * 512)


def _write_past_a_block(disk: SyncFormatAccess) -> None:
    disk.write(b"n" * (64 * 512), 16 * 512)


def _grow(disk: SyncFormatAccess) -> None:
    disk.resize(4 << 20)


def _write_past_the_table(disk: SyncFormatAccess) -> None:
    disk.write(b"n" * (3 << 20), 1 << 20)


def _nothing(disk: SyncFormatAccess) -> None:
    return


@pytest.mark.parametrize(
    ("work", "syncs"),
    [
        # Data that is rewritten where it lies: only what the guest asked for.
        pytest.param(_rewrite, 1, id="rewritten in place"),
        # Data and counts before the entries that show them; then what the guest asked for.
        pytest.param(_write_new, 2, id="24 new clusters"),
        # The entries go, and nothing must be on disk before; counts follow with the next flush.
        pytest.param(_discard, 1, id="discarded"),
        pytest.param(_nothing, 1, id="nothing done"),
    ],
)
def test_a_flush_costs_so_many_syncs(
    prepare: Callable[[Shape], Prepared], work: Callable[[SyncFormatAccess], None], syncs: int
) -> None:
    prepared = prepare(_shape("refcount-1"))

    assert _syncs(prepared, work, _rewrite) == {0: syncs}


@pytest.mark.parametrize(
    ("shape", "prepared", "work", "syncs"),
    [
        # The block before what leads to it, that before what is counted in it.
        pytest.param("refcount-64", _rewrite, _write_past_a_block, 3, id="a new block of counts"),
        # All of it before the header that leads to the table, and this before the entries.
        pytest.param("refcount-64", _grow, _write_past_the_table, 3, id="a larger table"),
    ],
)
def test_more_room_for_counts_costs_more(
    prepare: Callable[[Shape], Prepared],
    shape: str,
    prepared: Callable[[SyncFormatAccess], None],
    work: Callable[[SyncFormatAccess], None],
    syncs: int,
) -> None:
    assert _syncs(prepare(_shape(shape)), work, prepared) == {0: syncs}


def test_a_data_file_is_synced_with_the_image(prepare: Callable[[Shape], Prepared]) -> None:
    prepared = prepare(_shape("data-file"))

    assert _syncs(prepared, _write_new, _rewrite) == {0: 2, 1: 2}
    assert _syncs(prepared, _rewrite, _nothing) == {0: 1, 1: 1}


@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="files are synced by another call here")
def test_each_of_them_reaches_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does the name of a new file, once."""
    calls: Counter[str] = Counter()
    for name in ("fdatasync", "fsync"):
        patched = getattr(os, name)

        def count(descriptor: int, name: str = name, call: Callable[[int], None] = patched) -> None:
            kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
            calls[f"{name} of a {kind}"] += 1
            call(descriptor)

        monkeypatch.setattr(os, name, count)
    path = tmp_path / "disk.qcow2"

    underlay.create(path, size="1M", cluster_size=512).close()
    assert calls["fsync of a folder"] == 1
    with underlay.open_any(path, writable=True) as disk:
        _rewrite(disk)
        disk.flush()
        disk.sync()
        for work, syncs in ((_write_new, 2), (_rewrite, 1), (_nothing, 1)):
            calls.clear()
            work(disk)
            disk.flush()
            disk.sync()
            assert calls == {"fdatasync of a file": syncs}
