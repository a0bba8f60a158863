"""Runs a workload on a recorded image, and judges every state that a power loss could leave."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import attrs

from underlay.errors import UnderlayError
from underlay_storage.memory import MemoryStorage

from .guest import History, Operation, perform
from .journal import Begun, Journal, Recorder
from .judging import Judge, Report, content_of, use_and_mend
from .oracle import Oracle
from .shapes import Prepared
from .states import CrashState, Effort, crash_states
from .structure import look_at

__all__ = ["Recorded", "Trial", "cut_off_again", "record"]


@attrs.frozen(kw_only=True)
class Recorded:
    """A run that came to its end."""

    prepared: Prepared
    journal: Journal
    history: History
    #: What the files hold at the end.
    contents: tuple[bytes, ...]

    def judge(self) -> Judge:
        """Who judges the states of this run."""
        return Judge(history=self.history, open_disk=self.prepared.open)

    def states(self, chance: random.Random, effort: Effort) -> Iterator[CrashState]:
        """What a power loss could have left: more than can be held in memory."""
        return crash_states(self.journal, chance, effort)

    def faults_at_the_end(self) -> list[str]:
        """What is wrong after closing; then nothing may leak either."""
        verdict = look_at(self.contents[0])
        kept = self.history.now.bitmaps.keys()
        lost = [f"the bitmap {name} is lost" for name in sorted(kept - verdict.bitmaps.keys())]
        leaks = [f"cluster {cluster} leaks" for cluster in sorted(verdict.leaks)]
        return verdict.faults + lost + leaks


def record(prepared: Prepared, operations: Sequence[Operation]) -> Recorded:
    """Carry a workload out on the image, and close it."""
    history = prepared.again()
    journal = Journal(prepared.contents, operation=len(history.moments) - 1)
    memory = [MemoryStorage(content) for content in prepared.contents]
    recorders = [Recorder(one, journal, file=file) for file, one in enumerate(memory)]
    perform(lambda: prepared.open(recorders, writable=True), operations, journal, history)
    contents = tuple(map(content_of, memory))
    return Recorded(prepared=prepared, journal=journal, history=history, contents=contents)


@attrs.define(kw_only=True)
class Trial:
    """Many workloads on one image; what went wrong, with what would show it again."""

    prepared: Prepared
    chance: random.Random
    oracle: Oracle | None = None
    effort: Effort = attrs.field(factory=Effort)
    #: One of so many states is judged,
    step: int = 1
    #: QEMU looks at one of so many of them,
    every: int = 100
    #: and of so many one is mended, which is cut off again everywhere.
    mended: int = 150
    report: Report = attrs.field(factory=Report, init=False)
    failures: list[str] = attrs.field(factory=list[str], init=False)

    def __attrs_post_init__(self) -> None:
        if self.oracle is not None:
            (self.oracle.folder / "base.raw").write_bytes(self.prepared.below)

    def run(self, operations: Sequence[Operation]) -> None:
        """Carry one workload out, and judge what it could leave."""
        recorded = record(self.prepared, operations)
        judge = recorded.judge()
        told: list[str] = []
        report = judge.report(self._looked_at(recorded, judge, told))
        self.report.add(report)
        if report.problems:
            told.append(report.told())
            told += self._second_opinions([state for state, _ in report.problems[:10]])
        told += recorded.faults_at_the_end()
        if told:
            name = self.prepared.shape.name
            listed = "\n".join(f"  {operation}" for operation in operations)
            self.failures.append("\n".join((f"{name}:", listed, *told)))

    def _looked_at(self, recorded: Recorded, judge: Judge, told: list[str]) -> Iterator[CrashState]:
        """The states, some of which are put to further tests: what is wrong goes to ``told``."""
        states = recorded.states(self.chance, self.effort)
        for state in itertools.islice(states, 0, None, self.step):
            if self.oracle is not None and self.chance.randrange(self.every) == 0:
                self.report.shown += 1
                wrong = self.oracle.problems(state.contents, judge.allowed(state))
                if wrong:
                    told += [f"after event {state.events}: {state.story}", *wrong[:5]]
            if self.chance.randrange(self.mended) == 0:
                again = f"mending that of event {state.events}: {state.story}"
                try:
                    report = cut_off_again(self.prepared, judge, state, self.chance)
                except UnderlayError as error:
                    told += [again, f"{type(error).__name__}: {error}"]
                else:
                    self.report.add(report)
                    told += [again, report.told()] if report.problems else []
            yield state

    def _second_opinions(self, bad: Sequence[CrashState]) -> list[str]:
        if self.oracle is None:
            return []
        return [
            f"QEMU finds {self.oracle.corruptions(state.contents)} corruptions in that of event "
            f"{state.events}"
            for state in bad
        ]


def cut_off_again(
    prepared: Prepared, judge: Judge, state: CrashState, chance: random.Random
) -> Report:
    """What comes of states that a power loss leaves while what one left is opened and mended."""
    journal = Journal(state.contents, operation=state.promised)
    journal.add(Begun(state.begun))
    storages = [
        Recorder(MemoryStorage(content), journal, file=file)
        for file, content in enumerate(state.contents)
    ]
    content = judge.read(state)
    with prepared.open(storages, writable=True) as disk:
        use_and_mend(disk)
    later = attrs.evolve(judge, exactly=content)
    report = later.report(crash_states(journal, chance, Effort(exhaustive=6, samples=10, tears=1)))
    report.again = report.states
    return report
