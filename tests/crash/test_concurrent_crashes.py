"""A power loss while many write at once: what was flushed is there, and nothing is invented."""

from __future__ import annotations

import asyncio
import random

import attrs
import pytest

import underlay
from underlay import FormatAccess
from underlay.capabilities import Snapshottable
from underlay_storage.memory import MemoryStorage

from .guest import pattern
from .journal import Begun, Journal, Recorder
from .judging import chance_of, content_of, differences
from .mutants import MUTANTS
from .states import CrashState, Effort, crash_states
from .structure import look_at

pytestmark = pytest.mark.slow

_CLUSTER = 1024
_COUNT = 48
_TASKS = 4


@attrs.define
class Change:
    """One operation on a cluster; its times are counts of the journal's events."""

    content: bytes
    begun: int
    done: int | None = None


@attrs.define
class Guest:
    """Several tasks on one disk, each with clusters of its own, and one that flushes."""

    journal: Journal
    changes: dict[int, list[Change]] = attrs.field(init=False)
    #: When a flush began and when it had ended.
    flushes: list[tuple[int, int]] = attrs.field(factory=list[tuple[int, int]], init=False)
    _number: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        first = Change(bytes(_CLUSTER), begun=0, done=0)
        self.changes = {number: [first] for number in range(_COUNT)}

    def now(self) -> int:
        """The time, which is another one each time: an event that means nothing else."""
        self.journal.add(Begun(0))
        return len(self.journal.events)

    async def write(self, disk: FormatAccess, owner: int, chance: random.Random) -> None:
        """Write and discard."""
        for _ in range(14):
            cluster = chance.randrange(_COUNT // _TASKS) * _TASKS + owner
            offset = cluster * _CLUSTER
            self._number += 1
            content = bytes(_CLUSTER)
            if chance.random() < 0.75:
                content = pattern(self._number, offset, _CLUSTER)
            change = Change(content, begun=self.now())
            self.changes[cluster].append(change)
            if any(content):
                await disk.write(content, offset)
            else:
                await disk.discard_to_zero(offset, _CLUSTER)
            change.done = self.now()

    async def flush(self, disk: FormatAccess, *, snapshots: bool) -> None:
        """Flush again and again, and take snapshots meanwhile."""
        for turn in range(6):
            begun = self.now()
            await disk.flush()
            await disk.sync()
            self.flushes.append((begun, self.now()))
            if snapshots and turn in {1, 3}:
                able = disk.capability(Snapshottable)
                assert able is not None
                await able.create_snapshot(str(turn))

    def allowed(self, cluster: int, events: int) -> list[bytes]:
        """What a cluster may hold when a power loss comes after so many events."""
        promised = max((begun for begun, done in self.flushes if done <= events), default=0)
        changes = self.changes[cluster]
        sure = max(
            number
            for number, change in enumerate(changes)
            if change.done is not None and change.done <= promised
        )
        later = [change.content for change in changes[sure + 1 :] if change.begun <= events]
        return [changes[sure].content, *later]

    def problems(self, state: CrashState) -> list[str]:
        """What is wrong with what a power loss left."""
        faults = look_at(state.contents[0]).faults
        if faults:
            return faults
        storage = MemoryStorage(state.contents[0], writable=False)
        with underlay.open_image(storage, format="qcow2") as disk:
            content = disk.read_bytes(0, disk.size)
        return [
            problem
            for cluster in range(_COUNT)
            for problem in differences(
                content[cluster * _CLUSTER : (cluster + 1) * _CLUSTER],
                self.allowed(cluster, state.events),
                f"cluster {cluster}",
            )
        ]


def _run(seed: int, *, snapshots: bool) -> tuple[Guest, list[str], int]:
    """Let them all work: what they did, what is wrong with what could be left, of how many."""
    new = MemoryStorage()
    underlay.create(new, size=_COUNT * _CLUSTER, cluster_size=_CLUSTER, overwrite=True).close()
    journal = Journal((content_of(new),))
    guest = Guest(journal)
    recorder = Recorder(new, journal)

    async def work() -> None:
        async with await underlay.aio.open_image(recorder, format="qcow2", writable=True) as disk:
            tasks = [guest.write(disk, owner, chance_of(seed, owner)) for owner in range(_TASKS)]
            async with asyncio.timeout(60):
                await asyncio.gather(*tasks, guest.flush(disk, snapshots=snapshots))

    asyncio.run(work())
    problems = look_at(content_of(new)).faults
    states = 0
    for state in crash_states(journal, chance_of(seed), Effort(exhaustive=5, samples=20, tears=1)):
        states += 1
        problems += [f"{problem} ({state.story})" for problem in guest.problems(state)]
    return guest, problems, states


@pytest.mark.parametrize("snapshots", [False, True], ids=["writes", "snapshots"])
def test_what_many_wrote_at_once_survives(*, snapshots: bool) -> None:
    guest, problems, states = _run(1, snapshots=snapshots)

    assert not problems, "\n".join(problems[:10])
    assert states > 100
    assert len(guest.flushes) > 1


@pytest.mark.parametrize(
    "mutant",
    [
        "no barrier between what entries need and entries",
        "a sync is acknowledged and not done",
    ],
)
def test_a_broken_driver_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = (one for one in MUTANTS if one.name == mutant)
    found.breaks(monkeypatch)

    _, problems, _ = _run(1, snapshots=False)

    assert problems
