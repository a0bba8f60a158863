"""Whether what a power loss left is good: sound, complete as far as promised, and true."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import attrs

from underlay import SyncFormatAccess
from underlay.capabilities import Checkable, CheckResult, Repairable, Snapshottable
from underlay.errors import UnderlayError
from underlay.storage import BlockingStorage
from underlay_storage.memory import MemoryStorage

from .bitmaps import untrue
from .guest import History, Moment
from .journal import SECTOR
from .states import CrashState
from .structure import Verdict, look_at

__all__ = [
    "Judge",
    "OpenDisk",
    "Report",
    "chance_of",
    "content_of",
    "differences",
    "use_and_mend",
]

#: One of so many states is used further, and its leaks are mended.
_EVERY = 16
#: Of so many bad states it is told what is wrong.
_KEPT = 100
_PAGE = 8 * SECTOR


class OpenDisk(Protocol):
    """Opens an image in storages; with a name, that snapshot of it."""

    def __call__(
        self, storages: Sequence[BlockingStorage], snapshot: str | None, *, writable: bool
    ) -> SyncFormatAccess:
        """Open it."""
        ...


@attrs.define
class Report:
    """What came of many states."""

    states: int = 0
    leaking: int = 0
    bad: int = 0
    #: Of them, those that a second power loss left while the first was being mended.
    again: int = 0
    #: How many QEMU has looked at.
    shown: int = 0
    #: What is wrong with the first bad ones.
    problems: list[tuple[CrashState, list[str]]] = attrs.field(
        factory=list[tuple[CrashState, list[str]]]
    )

    def add(self, other: Report) -> None:
        """Count those of another report too."""
        self.states += other.states
        self.leaking += other.leaking
        self.bad += other.bad
        self.again += other.again
        self.shown += other.shown
        self.problems = (self.problems + other.problems)[:_KEPT]

    def told(self, most: int = 3) -> str:
        """The first problems, for people."""
        lines = [f"{self.bad} of {self.states} states are bad"]
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
    #: Opens the image in storages: the disk, or a snapshot of it.
    open_disk: OpenDisk
    #: What else the guest may see after an operation, by its number.
    alternatives: Mapping[int, Moment] = attrs.field(factory=dict[int, Moment])
    #: What the disk holds and has to keep, if that is known.
    exactly: bytes | None = None
    _buffers: dict[int, bytearray] = attrs.field(factory=dict[int, bytearray], init=False)

    def report(self, states: Iterable[CrashState], *, enough: int | None = None) -> Report:
        """Judge all of them, or until so many are bad."""
        report = Report()
        for state in states:
            problems = self.problems(state, report)
            report.states += 1
            if problems:
                report.bad += 1
                if len(report.problems) < _KEPT:
                    report.problems.append((state, problems))
            if report.bad == enough:
                break
        return report

    def problems(self, state: CrashState, report: Report) -> list[str]:
        """What is wrong with a state."""
        verdict = look_at(state.contents[0])
        report.leaking += bool(verdict.leaks)
        if verdict.faults:
            return verdict.faults
        try:
            problems = self._untrue(state)
            problems += self._misjudged(state, leaks=len(verdict.leaks))
            if verdict.bitmap_names:
                problems += self._untrue_bitmaps(state, verdict)
            if not problems and report.states % _EVERY == 0:
                problems = self._cannot_go_on(state)
        except UnderlayError as error:
            problems = [f"{type(error).__name__}: {error}"]
        return problems

    def allowed(self, state: CrashState) -> list[bytes]:
        """Of what the disk may be a mixture."""
        if self.exactly is not None:
            return [self.exactly]
        return [moment.content for moment in self._moments(state)]

    def _moments(self, state: CrashState) -> list[Moment]:
        """What the guest may see."""
        numbers = range(state.promised, state.begun + 1)
        others = [self.alternatives[number] for number in numbers if number in self.alternatives]
        return [*(self.history.moments[number] for number in numbers), *others]

    def read(self, state: CrashState) -> bytes:
        """What the disk holds."""
        with self._open(state) as disk:
            return bytes(self._read(disk))

    def _untrue(self, state: CrashState) -> list[str]:
        """What the guest would see and must not, or miss."""
        moments = self._moments(state)
        with self._open(state) as disk:
            problems = differences(self._read(disk), self.allowed(state), "the disk")
            snapshots = disk.capability(Snapshottable).snapshots()
        names = [snapshot.name for snapshot in snapshots]
        problems += self._wrong_snapshots(names, moments)
        for name in names:
            if not problems:
                problems += self._untrue_snapshot(state, name, moments)
        return problems

    def _untrue_bitmaps(self, state: CrashState, verdict: Verdict) -> list[str]:
        """A bitmap that says that it is up to date tells of every write."""
        content = self.read(state)
        found = [
            untrue(verdict.bitmaps, verdict.bitmap_names, moment.bitmaps, content)
            for moment in self._moments(state)
        ]
        return [] if None in found else [found[-1] or ""]

    def _misjudged(self, state: CrashState, *, leaks: int) -> list[str]:
        """Our own check has to say the same as our second opinion."""
        with self._open(state) as disk:
            found: CheckResult = disk.capability(Checkable).check()
        if (found.corruptions, found.check_errors, found.leaks) == (0, 0, leaks):
            return []
        return [f"our check finds {found}, and should find {leaks} leaks"]

    def _cannot_go_on(self, state: CrashState) -> list[str]:
        """The image can be written, and its leaks can be mended."""
        storages = [MemoryStorage(content) for content in state.contents]
        with self.open_disk(storages, None, writable=True) as disk:
            before = disk.read_bytes(0, disk.size)
            use_and_mend(disk)
            if disk.read_bytes(0, disk.size) != before:
                return ["what the disk holds changes when it is used again"]
        after = look_at(content_of(storages[0]))
        problems = [f"used again: {fault}" for fault in after.faults]
        return problems + [f"used again: cluster {cluster} leaks" for cluster in after.leaks]

    def _open(self, state: CrashState, snapshot: str | None = None) -> SyncFormatAccess:
        storages = [MemoryStorage(content, writable=False) for content in state.contents]
        return self.open_disk(storages, snapshot, writable=False)

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


def use_and_mend(disk: SyncFormatAccess) -> None:
    """Write what is there already, durably, and mend all leaks."""
    disk.write(disk.read_bytes(0, SECTOR), 0)
    disk.flush()
    disk.sync()
    disk.capability(Repairable).repair(leaks_only=True)


def content_of(storage: MemoryStorage) -> bytes:
    """All that a storage holds."""
    content = bytearray(storage.size())
    storage.readv((content,), 0)
    return bytes(content)


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
