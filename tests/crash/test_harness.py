"""The crash test itself is put to the test: QEMU's writer passes it, and a broken one does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import underlay
from underlay import SyncFormatAccess
from underlay.storage import BlockingStorage

from .guest import History, Moment
from .journal import Journal, Sync
from .judging import Judge, chance_of
from .qemu_log import LoggedQemu
from .states import Effort, crash_states

_SIZE = 1 << 20
_OPERATIONS = 40


def _open(
    storages: Sequence[BlockingStorage], snapshot: str | None, *, writable: bool
) -> SyncFormatAccess:
    return underlay.open_image(storages[0], format="qcow2", snapshot=snapshot, writable=writable)


def _record_qemu(program: str, path: Path, seed: int) -> tuple[Journal, History]:
    """Let QEMU write and discard at random places of an image."""
    chance = chance_of("qemu", seed)
    history = History([Moment(bytes(_SIZE))])
    running = LoggedQemu.start(program, path)
    for number in range(1, _OPERATIONS + 1):
        offset = chance.randrange((_SIZE >> 9) - 40) * 512
        length = chance.choice((512, 1536, 4096, 20480))
        kind = chance.random()
        command, moment = "flush", history.now
        if kind < 0.6:
            command = f"write -P {number} {offset} {length}"
            moment = history.replaced(offset, bytes([number]) * length)
        elif kind < 0.75:
            command = f"write -z {chance.choice(('', '-u '))}{offset} {length}"
            moment = history.replaced(offset, bytes(length))
        history.moments.append(moment)
        running.do(command, number=number, is_flush=command == "flush")
    history.moments.append(history.now)
    running.stop(number=_OPERATIONS + 1)
    return running.journal, history


@pytest.mark.parametrize("cluster", [512, 4096])
def test_no_state_that_qemu_leaves_is_bad(
    qemu: Callable[[str], str], qemu_img: Callable[..., str], tmp_path: Path, cluster: int
) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, _SIZE)

    journal, history = _record_qemu(qemu("qemu-io"), path, seed=cluster)
    states = crash_states(journal, chance_of(cluster), Effort(samples=10))
    report = Judge(history=history, open_disk=_open).report(states)

    assert not report.problems, report.told()
    assert report.states > 100
    assert report.leaking > 10


def test_qemu_without_its_syncs_is_caught(
    qemu: Callable[[str], str], qemu_img: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, _SIZE)

    journal, history = _record_qemu(qemu("qemu-io"), path, seed=1)
    journal.events[:] = [event for event in journal.events if not isinstance(event, Sync)][:80]
    states = crash_states(journal, chance_of(2), Effort(samples=10))
    report = Judge(history=history, open_disk=_open).report(states)

    assert report.bad > report.states // 2
    assert "past the end of the file" in report.told(most=len(report.problems))
