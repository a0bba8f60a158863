"""Whether what a power loss left is good: sound, complete as far as promised, and true."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import attrs

from underlay import SyncFormatAccess
from underlay.capabilities import Checkable, CheckResult, Snapshottable
from underlay.errors import UnderlayError
from underlay.storage import BlockingStorage
from underlay_storage.memory import MemoryStorage

from .guest import History, Moment
from .journal import SECTOR
from .states import CrashState
from .structure import look_at

__all__ = ["Judge", "OpenDisk", "Report", "chance_of"]

#: Opens an image in storages read-only; with a name, that snapshot of it.
OpenDisk: TypeAlias = Callable[[Sequence[BlockingStorage], str | None], SyncFormatAccess]

_PAGE = 8 * SECTOR


@attrs.define
class Report:
    """What came of many states."""

    states: int = 0
    leaking: int = 0
    #: What is wrong, with the state in which it is.
    problems: list[tuple[CrashState, list[str]]] = attrs.field(
        factory=list[tuple[CrashState, list[str]]]
    )

    def add(self, other: Report) -> None:
        """Count those of another report too."""
        self.states += other.states
        self.leaking += other.leaking
        self.problems += other.problems

    def told(self, most: int = 3) -> str:
        """The first problems, for people."""
        lines = [f"{len(self.problems)} of {self.states} states are bad"]
        for state, problems in self.problems[:most]:
            lines.append(
                f"after event {state.events}, operation {state.begun} under way, all up to "
                f"{state.promised} promised; {state.story}"
            )
            lines += [f"    {problem}" for problem in problems[:5]]
        return "\n".join(lines)


@attrs.define(kw_only=True)
class Judge:
    """Judges the states of one run by what the guest did."""

    history: History
    #: Opens the image in storages, read-only: the disk, or a snapshot of it.
    open_disk: OpenDisk
    #: What else the disk may hold after an operation, by its number.
    alternatives: Mapping[int, bytes] = attrs.field(factory=dict[int, bytes])
    _buffers: dict[int, bytearray] = attrs.field(factory=dict[int, bytearray], init=False)

    def report(self, states: Iterable[CrashState]) -> Report:
        """Judge all of them."""
        report = Report()
        for state in states:
            problems = self.problems(state, report)
            report.states += 1
            if problems:
                report.problems.append((state, problems))
        return report

    def problems(self, state: CrashState, report: Report) -> list[str]:
        """What is wrong with a state."""
        verdict = look_at(state.contents[0])
        report.leaking += bool(verdict.leaks)
        if verdict.corruptions:
            return verdict.corruptions
        try:
            return self._untrue(state, len(verdict.leaks))
        except UnderlayError as error:
            return [f"{type(error).__name__}: {error}"]

    def _untrue(self, state: CrashState, leaks: int) -> list[str]:
        """What the guest would see and must not, or miss."""
        moments = self.history.moments[state.promised : state.begun + 1]
        numbers = range(state.promised, state.begun + 1)
        allowed = [moment.content for moment in moments]
        allowed += [self.alternatives[number] for number in numbers if number in self.alternatives]
        with self._open(state) as disk:
            problems = differences(self._read(disk), allowed, "the disk")
            found: CheckResult = disk.capability(Checkable).check()
            if (found.corruptions, found.check_errors, found.leaks) != (0, 0, leaks):
                problems.append(f"our check finds {found}, and should find {leaks} leaks")
            snapshots = disk.capability(Snapshottable).snapshots()
        names = [snapshot.name for snapshot in snapshots]
        problems += self._wrong_snapshots(names, moments)
        for name in names:
            if not problems:
                problems += self._untrue_snapshot(state, name, moments)
        return problems

    def _open(self, state: CrashState, snapshot: str | None = None) -> SyncFormatAccess:
        storages = [MemoryStorage(content, writable=False) for content in state.contents]
        return self.open_disk(storages, snapshot)

    def _read(self, disk: SyncFormatAccess) -> bytearray:
        """All of a disk, into memory that is used again: fresh memory takes longer than reading."""
        buffer = self._buffers.setdefault(disk.size, bytearray(disk.size))
        disk.read(buffer, 0)
        return buffer

    @staticmethod
    def _wrong_snapshots(names: list[str], moments: Sequence[Moment]) -> list[str]:
        known = [set(moment.snapshots) for moment in moments]
        if set(names) in known and len(set(names)) == len(names):
            return []
        return [f"there are snapshots {names}, and should be one of {known}"]

    def _untrue_snapshot(
        self, state: CrashState, name: str, moments: Sequence[Moment]
    ) -> list[str]:
        """A snapshot that is there holds what the disk held when it was taken."""
        taken = {moment.snapshots[name] for moment in moments if name in moment.snapshots}
        allowed = [
            self.history.moments[number].content
            for last in taken
            for number in range(min(state.promised, last), last + 1)
        ]
        with self._open(state, name) as disk:
            content = self._read(disk)
        return differences(content, allowed, f"snapshot {name}")


def differences(content: bytes | bytearray, allowed: Sequence[bytes], what: str) -> list[str]:
    """Where a content is no mixture, sector by sector, of the allowed ones."""
    if content in allowed:
        return []
    length = len(content)
    if all(len(one) != length for one in allowed):
        return [f"{what} has {length} bytes, and should have {sorted(set(map(len, allowed)))}"]
    problems: list[str] = []
    for page in range(0, length, _PAGE):
        there = content[page : page + _PAGE]
        if any(one[page : page + _PAGE] == there for one in allowed):
            continue
        for start in range(page, min(page + _PAGE, length), SECTOR):
            sector = content[start : start + SECTOR]
            # What lies past the end of a shorter disk is zero when it gets longer.
            could = {one[start : start + SECTOR].ljust(len(sector), b"\0") for one in allowed}
            if bytes(sector) not in could:
                problems.append(
                    f"{what} at {start:#x} starts with {sector[:8].hex(' ')}, and could with "
                    f"{sorted(one[:8].hex(' ') for one in could)}"
                )
    return problems


def chance_of(*seeds: object) -> random.Random:
    """Dice that fall the same way for the same words."""
    return random.Random(repr(seeds))
