"""A power loss while an image is mended: it is mended the next time, and holds what it held."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from underlay import SyncFormatAccess
from underlay.capabilities import Repairable
from underlay_storage.memory import MemoryStorage

from .journal import SECTOR, Journal, Recorder
from .judging import chance_of, content_of
from .shapes import SHAPES, Prepared, Shape
from .states import Effort, crash_states
from .structure import look_at


def _edited(image: bytes, **fields: tuple[int, str, int]) -> bytes:
    """With other numbers at some places: offset, format, value."""
    edited = bytearray(image)
    for offset, kind, value in fields.values():
        struct.pack_into(kind, edited, offset, value)
    return bytes(edited)


def _refcount_at(image: bytes, cluster: int) -> int:
    """Where the refcount of a cluster is, of 16 bits, in the first block."""
    (table,) = struct.unpack_from(">Q", image, 48)
    (block,) = struct.unpack_from(">Q", image, table)
    return int(block) + cluster * 2


def _not_closed(image: bytes) -> bytes:
    """As a crash with lazy refcounts leaves it: some are too low, and the image says so."""
    last = len(image) // 512 - 1
    return _edited(
        image,
        dirty=(72, ">Q", 1),
        one=(_refcount_at(image, last), ">H", 0),
        other=(_refcount_at(image, last - 2), ">H", 0),
        leak=(_refcount_at(image, last + 5), ">H", 1),
    ) + bytes(10 * 512)


def _leaking(image: bytes) -> bytes:
    """With clusters that nothing refers to."""
    last = len(image) // 512 - 1
    return _edited(
        image,
        one=(_refcount_at(image, last + 2), ">H", 1),
        other=(_refcount_at(image, last + 3), ">H", 3),
    ) + bytes(6 * 512)


def _write(disk: SyncFormatAccess) -> None:
    disk.write(disk.read_bytes(0, SECTOR), 0)


def _repair_leaks(disk: SyncFormatAccess) -> None:
    disk.capability(Repairable).repair(leaks_only=True)


def _repair_all(disk: SyncFormatAccess) -> None:
    disk.capability(Repairable).repair(leaks_only=False)


@pytest.mark.parametrize(
    ("damage", "mend"),
    [
        pytest.param(_not_closed, _write, id="not closed, written to"),
        pytest.param(_not_closed, _repair_all, id="not closed, repaired"),
        pytest.param(_leaking, _repair_leaks, id="leaking, repaired"),
    ],
)
def test_mending_can_be_interrupted(
    damage: Callable[[bytes], bytes],
    mend: Callable[[SyncFormatAccess], None],
    prepare: Callable[[Shape], Prepared],
) -> None:
    prepared = prepare(SHAPES[0])
    content = prepared.history.now.content
    damaged = damage(prepared.contents[0])
    assert look_at(damaged).faults or look_at(damaged).leaks
    journal = Journal((damaged,))
    storage = MemoryStorage(damaged)
    with prepared.open([Recorder(storage, journal)], writable=True) as disk:
        mend(disk)
    assert not look_at(content_of(storage)).faults
    assert not look_at(content_of(storage)).leaks

    states = list(crash_states(journal, chance_of("mending"), Effort(samples=20)))
    assert len(states) > 1
    for state in states:
        verdict = look_at(state.contents[0])
        assert verdict.dirty or not verdict.faults, state.story
        again = MemoryStorage(state.contents[0])
        with prepared.open([again], writable=True) as disk:
            assert disk.read_bytes(0, disk.size) == content
            mend(disk)
            assert disk.read_bytes(0, disk.size) == content
        after = look_at(content_of(again))
        assert not after.faults, state.story
        # What is mended already is only written to: of leaks nobody asks then.
        assert not after.leaks or (mend is _write and not verdict.dirty), state.story
