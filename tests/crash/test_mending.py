"""A power loss while an image is mended: it is mended the next time, and holds what it held."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Literal

import pytest

from underlay import SyncFormatAccess
from underlay.capabilities import Repairable
from underlay_storage.memory import MemoryStorage

from .journal import SECTOR, Journal, Recorder
from .judging import chance_of, content_of
from .shapes import SHAPES, Prepared, Shape
from .states import Effort, crash_states
from .structure import look_at

#: Small ones; whatever is counted is in the first block.
_SHAPES = [shape for shape in SHAPES if shape.thinned == 1]


def _geometry(image: bytes) -> tuple[int, int, int]:
    """Bytes of a cluster, bits of a reference count, and where the first block of them is."""
    version, bits = struct.unpack_from(">I12xI", image, 4)
    order = struct.unpack_from(">I", image, 96)[0] if version > 2 else 4
    (table,) = struct.unpack_from(">Q", image, 48)
    (block,) = struct.unpack_from(">Q", image, table)
    return 1 << bits, 1 << order, block


def _recounted(image: bytes, counts: dict[int, int]) -> bytes:
    """With other reference counts for some clusters, each as high as can be said."""
    cluster, width, block = _geometry(image)
    edited = bytearray(image)
    for number, count in counts.items():
        assert number < cluster * 8 // width, "it is counted in the first block"
        at, within = divmod(number * width, 8)
        length = -(-(within + width) // 8)
        order: Literal["big", "little"] = "little" if width < 8 else "big"
        bits = int.from_bytes(edited[block + at : block + at + length], order)
        most = (1 << width) - 1
        bits = bits & ~(most << within) | min(count, most) << within
        edited[block + at : block + at + length] = bits.to_bytes(length, order)
    return bytes(edited)


def _not_closed(image: bytes) -> bytes:
    """As a crash with lazy refcounts leaves it: some are too low, and the image says so."""
    cluster, _, _ = _geometry(image)
    last = len(image) // cluster - 1
    counts = {last: 0, last - 2: 0, last + 5: 1}
    edited = bytearray(_recounted(image, counts) + bytes(10 * cluster))
    edited[79] |= 1
    return bytes(edited)


def _leaking(image: bytes) -> bytes:
    """With clusters that nothing refers to."""
    cluster, _, _ = _geometry(image)
    last = len(image) // cluster - 1
    return _recounted(image, {last + 2: 1, last + 3: 3}) + bytes(6 * cluster)


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
@pytest.mark.parametrize("shape", _SHAPES, ids=[shape.name for shape in _SHAPES])
def test_mending_can_be_interrupted(
    shape: Shape,
    damage: Callable[[bytes], bytes],
    mend: Callable[[SyncFormatAccess], None],
    prepare: Callable[[Shape], Prepared],
) -> None:
    if damage is _not_closed and shape.options.get("compat") == "v2":
        return  # it has no bit that says so
    prepared = prepare(shape)
    content = prepared.history.now.content
    damaged = damage(prepared.contents[0])
    assert look_at(damaged).faults or look_at(damaged).leaks
    journal = Journal((damaged, *prepared.contents[1:]))
    memory = [MemoryStorage(one) for one in journal.start]
    recorders = [Recorder(one, journal, file=file) for file, one in enumerate(memory)]
    with prepared.open(recorders, writable=True) as disk:
        mend(disk)
    assert not look_at(content_of(memory[0])).faults
    assert not look_at(content_of(memory[0])).leaks

    states = list(crash_states(journal, chance_of("mending"), Effort(exhaustive=6, samples=15)))
    assert len(states) > 1
    for state in states:
        verdict = look_at(state.contents[0])
        assert verdict.dirty or not verdict.faults, state.story
        again = [MemoryStorage(one) for one in state.contents]
        with prepared.open(again, writable=True) as disk:
            assert disk.read_bytes(0, disk.size) == content
            mend(disk)
            assert disk.read_bytes(0, disk.size) == content
        after = look_at(content_of(again[0]))
        assert not after.faults, state.story
        # What is mended already is only written to: of leaks nobody asks then.
        leaks = set(after.leaks)
        assert not leaks or (mend is _write and not verdict.dirty), state.story
