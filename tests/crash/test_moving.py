"""A power loss, or a call that fails, while an image is rebased or committed.

It shows the same bytes at any time, and so it does when the job is run again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pytest

import underlay
from underlay.capabilities import Emptiable
from underlay.errors import UnderlayError
from underlay_drivers.qcow2 import emptying
from underlay_storage.memory import MemoryStorage

from .faults import Faults, FaultyStorage, Lasting
from .journal import Journal, Recorder
from .judging import chance_of, content_of, differences
from .moving import Move, committing, rebasing
from .shapes import Shape
from .states import Effort, crash_states
from .structure import look_at

_EFFORT = Effort(exhaustive=8, samples=60, tears=3)

_COMMITTED = (
    Shape(name="plain", backing=80 << 10, filled=20 << 10, snapshots=False),
    # Longer than what it lies upon.
    Shape(
        name="v2",
        options={"compat": "v2"},
        backing=30 << 10,
        filled=40 << 10,
        snapshots=False,
    ),
    Shape(name="64 KiB", cluster=65536, size=600 << 10, backing=300 << 10, snapshots=False),
    Shape(name="refcount-64", options={"refcount_bits": 64}, backing=48 << 10, snapshots=False),
    Shape(
        name="subclusters",
        cluster=16 << 10,
        size=512 << 10,
        options={"extended_l2": True, "refcount_bits": 1},
        backing=200 << 10,
        snapshots=False,
        compression=False,
    ),
    Shape(
        name="data-file",
        backing=48 << 10,
        has_data_file=True,
        snapshots=False,
        compression=False,
    ),
    # This one is emptied otherwise.
    Shape(name="snapshot", backing=80 << 10),
)
_MOVES: Mapping[str, Callable[[], Move]] = {
    **{f"rebase, {cluster}": partial(rebasing, cluster) for cluster in (512, 4096, 65536)},
    **{f"commit, {shape.name}": partial(committing, shape) for shape in _COMMITTED},
    "commit, to raw": partial(committing, _COMMITTED[0], base="raw"),
}
#: Every call is made to fail in these.
_FAILING = (
    "rebase, 4096",
    "commit, plain",
    "commit, to raw",
    "commit, snapshot",
    "commit, data-file",
)


def _faults(move: Move, contents: Sequence[bytes]) -> list[str]:
    """What is wrong with the files."""
    wrong = [fault for number in move.images for fault in look_at(contents[number]).faults]
    return wrong or differences(move.show(contents), [move.want], "the disk")


def _problems(move: Move, seed: object) -> list[str]:
    """What is wrong with the files after power losses."""
    journal = Journal(move.contents)
    memory = [MemoryStorage(content) for content in move.contents]
    move.run([Recorder(one, journal, file=file) for file, one in enumerate(memory)])
    found = 0
    problems: list[str] = []
    for state in crash_states(journal, chance_of(seed), _EFFORT):
        found += 1
        problems += [f"{state.story}: {fault}" for fault in _faults(move, state.contents)]
    assert found > 5
    assert not _faults(move, list(map(content_of, memory)))
    return problems


@pytest.mark.parametrize("name", _MOVES)
def test_a_power_loss_changes_nothing_that_is_seen(name: str) -> None:
    assert not _problems(_MOVES[name](), name)


def test_emptying_in_place_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tables must not be written over those that are in use."""
    show, calls = emptying._show, list[None]()

    async def show_the_last(*arguments: object) -> None:
        calls.append(None)
        if len(calls) % 2 == 0:
            await show(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(emptying, "_show", show_the_last)
    assert _problems(_MOVES["commit, plain"](), "in place")


def _calls(move: Move) -> list[str]:
    """The calls of a run in which none fails."""
    faults = Faults()
    move.run([FaultyStorage(MemoryStorage(content), faults) for content in move.contents])
    return faults.calls


def test_all_kinds_of_calls_are_made() -> None:
    made = {call for name in _FAILING for call in _calls(_MOVES[name]())}

    assert made == {"read", "write", "write_zeroes", "discard", "resize", "sync"}


@pytest.mark.parametrize("name", _FAILING)
@pytest.mark.parametrize("lasting", Lasting, ids=[lasting.value for lasting in Lasting])
def test_any_call_may_fail(name: str, lasting: Lasting) -> None:
    move = _MOVES[name]()
    modes = list(Lasting)
    failed = 0
    problems: list[str] = []
    for number, kind in enumerate(_calls(move)):
        # Each call meets both errors, one in this way of failing and one in the next.
        code = (errno.EIO, errno.ENOSPC)[(number + modes.index(lasting)) % 2]
        faults = Faults(fails=number, errno=code, lasting=lasting)
        memory = [MemoryStorage(content) for content in move.contents]
        try:
            move.run([FaultyStorage(one, faults) for one in memory])
        except UnderlayError:
            failed += 1
        contents = list(map(content_of, memory))
        wrong = _faults(move, contents)
        again = [MemoryStorage(content) for content in contents]
        if not wrong:
            move.run(again)
            wrong = _faults(move, list(map(content_of, again)))
        problems += [f"call {number} ({kind}): {fault}" for fault in wrong[:3]]
    assert not problems, "\n".join(problems[:20])
    assert failed


def test_a_disk_reads_right_when_it_could_not_be_emptied() -> None:
    memory = MemoryStorage(b"")
    with underlay.create(memory, size=48 << 10, cluster_size=512) as disk:
        disk.write(b"1" * 9999, 0)
        disk.capability(Emptiable).make_empty()
        disk.write(b"2" * 9999, 0)
    start = content_of(memory)
    allowed = [b"2" * 9999, bytes(9999)]
    calls, failed = 1, 0
    while failed < calls:
        faults = Faults()
        storage = FaultyStorage(MemoryStorage(start), faults)
        with underlay.open_image(storage, format="qcow2", writable=True) as disk:
            before = len(faults.calls)
            faults.fails = before + failed
            try:
                disk.capability(Emptiable).make_empty()
                calls = len(faults.calls) - before
            except UnderlayError:
                calls = failed + 2
            faults.fails = None
            failed += 1
            assert disk.read_bytes(0, 9999) in allowed
            disk.abandon()
    assert failed > 15
