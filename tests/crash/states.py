"""Every way, or many ways, in which a power loss can leave the files of a recorded run.

What was synced is there. Of what was done since, any part may be, in any combination, and a write
may be there in some of its sectors only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import attrs

from .journal import (
    SECTOR,
    Begun,
    Change,
    Event,
    File,
    Flushed,
    Journal,
    Lost,
    Resize,
    Sync,
    Write,
    Zero,
)

__all__ = ["CrashState", "Effort", "crash_states"]


@attrs.frozen(kw_only=True)
class Effort:
    """How many combinations of changes that are not durable are tried each time."""

    #: Of so many changes every combination is tried; of more each alone and each missing,
    exhaustive: int = 10
    #: and so many random ones.
    samples: int = 200
    #: For each write of several sectors, so many times some of them only.
    tears: int = 4


@attrs.frozen(kw_only=True)
class CrashState:
    """What a power loss left."""

    #: Of each file.
    contents: tuple[bytes, ...]
    #: The guest's last operation that was promised to be durable.
    promised: int
    #: The guest's last operation that had begun.
    begun: int
    #: How many events had happened.
    events: int
    #: What came of those that were not durable, for people.
    story: str


@attrs.define(kw_only=True)
class _Run:
    """The run up to some event: what is durable, and what is not yet."""

    durable: list[File]
    pending: list[Change] = attrs.field(factory=list[Change], init=False)
    #: Those of them that no later sync makes durable, and those that are durable but came after
    #: such a one, by identity.
    lost: set[int] = attrs.field(factory=set[int], init=False)
    sure: set[int] = attrs.field(factory=set[int], init=False)
    promised: int
    begun: int

    def take(self, event: Event) -> None:
        match event:
            case Begun(operation):
                self.begun = operation
            case Flushed(operation):
                self.promised = operation
            case Sync(file):
                self._settle(file)
            case Lost(file):
                self.lost.update(id(change) for change in self.pending if change.file == file)
            case Write() | Zero() | Resize():
                self.pending.append(event)

    def _settle(self, file: int) -> None:
        """Make durable what can be."""
        rest: list[Change] = []
        follows_lost = False
        for change in self.pending:
            if change.file != file:
                rest.append(change)
            elif id(change) in self.lost:
                follows_lost = True
                rest.append(change)
            elif follows_lost:
                self.sure.add(id(change))
                rest.append(change)
            else:
                self.durable[file].apply(change)
        self.pending = rest


def crash_states(
    journal: Journal, chance: random.Random, effort: Effort | None = None, *, since: int = 0
) -> Iterator[CrashState]:
    """The states in which a power loss may leave the files, each once.

    All prefixes of the events from number ``since`` on; and at each sync, each promise and the end,
    combinations of what is not durable, as many as ``effort`` says. One of them is that of what
    overlaps the earlier won.
    """
    seen: set[tuple[int, int, int]] = set()
    effort = effort or Effort()
    run = _Run(
        durable=[File(content) for content in journal.start],
        promised=journal.operation,
        begun=journal.operation,
    )
    for number, event in enumerate(journal.events):
        if isinstance(event, Sync) and number >= since:
            yield from _new(_combinations(run, chance, effort), run, number, seen)
        run.take(event)
        if number < since:
            continue
        if not isinstance(event, Begun):
            yield from _new(_everything(run), run, number + 1, seen)
        if isinstance(event, Flushed):
            # A promise that no sync stands behind is found here.
            yield from _new(_combinations(run, chance, effort), run, number + 1, seen)
    yield from _new(_combinations(run, chance, effort), run, len(journal.events), seen)


def _everything(run: _Run) -> Iterator[tuple[list[File], str]]:
    yield _build(run, run.pending), "all of it"


def _new(
    made: Iterator[tuple[list[File], str]],
    run: _Run,
    events: int,
    seen: set[tuple[int, int, int]],
) -> Iterator[CrashState]:
    for files, story in made:
        contents = tuple(file.content() for file in files)
        key = (hash(contents), run.promised, run.begun)
        if key not in seen:
            seen.add(key)
            yield CrashState(
                contents=contents,
                promised=run.promised,
                begun=run.begun,
                events=events,
                story=story,
            )


def _build(run: _Run, changes: list[Change]) -> list[File]:
    files = [file.copy() for file in run.durable]
    for change in changes:
        files[change.file].apply(change)
    return files


def _combinations(
    run: _Run, chance: random.Random, effort: Effort
) -> Iterator[tuple[list[File], str]]:
    pending = run.pending
    unsure = [number for number, change in enumerate(pending) if id(change) not in run.sure]
    if not unsure:
        return
    sure = (1 << len(pending)) - 1
    for number in unsure:
        sure ^= 1 << number
    for some in _masks(len(unsure), chance, effort):
        mask = sure
        for bit, number in enumerate(unsure):
            mask |= (some >> bit & 1) << number
        chosen = [change for number, change in enumerate(pending) if mask >> number & 1]
        yield _build(run, chosen), _told(pending, mask)
    for number in unsure:
        change = pending[number]
        if isinstance(change, Write) and _sector_count(change) > 1:
            for _ in range(effort.tears):
                yield _torn(run, number, change, sure, chance)
    if not sure:
        yield _build(run, pending[::-1]), "all of it, in the other order"


def _masks(count: int, chance: random.Random, effort: Effort) -> Iterator[int]:
    """Which changes are there, as bits."""
    if count <= effort.exhaustive:
        yield from range(1 << count)
        return
    everything = (1 << count) - 1
    for number in range(count):
        yield 1 << number
        yield everything ^ 1 << number
        yield (1 << number) - 1
    for _ in range(effort.samples):
        yield chance.getrandbits(count)


def _torn(
    run: _Run, number: int, write: Write, sure: int, chance: random.Random
) -> tuple[list[File], str]:
    """Some sectors of one write, with all, none, the earlier ones or some of the others."""
    pending = run.pending
    count = _sector_count(write)
    sectors = (1 << chance.randrange(1, count)) - 1
    if chance.random() < 0.5:
        sectors = chance.getrandbits(count)
    mask = sure | chance.choice(
        ((1 << len(pending)) - 1, 0, (1 << number) - 1, chance.getrandbits(len(pending)))
    )
    files = [file.copy() for file in run.durable]
    for other, change in enumerate(pending):
        # The growth that a write brought comes just before it.
        grown = other == number - 1 and isinstance(change, Resize)
        if other == number:
            files[change.file].apply(change, only=sectors)
        elif grown or mask >> other & 1:
            files[change.file].apply(change)
    story = f"of {_short(write)} the sectors {sectors:#b}, and {_told(pending, mask)}"
    return files, story


def _sector_count(write: Write) -> int:
    return (write.offset + len(write.data) - 1) // SECTOR - write.offset // SECTOR + 1


def _told(pending: list[Change], mask: int) -> str:
    there = [_short(change) for number, change in enumerate(pending) if mask >> number & 1]
    lost = [_short(change) for number, change in enumerate(pending) if not mask >> number & 1]
    return f"there: {', '.join(there) or 'nothing'}; lost: {', '.join(lost) or 'nothing'}"


def _short(change: Change) -> str:
    where = f"{change.file}:" if change.file else ""
    match change:
        case Write(_, offset, data):
            return f"{where}W{offset:#x}+{len(data):#x}"
        case Zero(_, offset, length):
            return f"{where}Z{offset:#x}+{length:#x}"
        case Resize(_, size):
            return f"{where}T{size:#x}"
