"""Runs a workload on a recorded image, and judges every state that a power loss could leave."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import attrs

from underlay_storage.memory import MemoryStorage

from .guest import History, Operation, perform
from .journal import Journal, Recorder
from .judging import Judge, Report, content_of
from .oracle import Oracle
from .shapes import Prepared
from .states import CrashState, Effort, crash_states
from .structure import look_at

__all__ = ["Recorded", "Trial", "record"]


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
        return verdict.faults + [f"cluster {cluster} leaks" for cluster in verdict.leaks]


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
    effort: Effort = attrs.field(factory=lambda: Effort(samples=20))
    #: QEMU looks at one of so many states.
    every: int = 200
    report: Report = attrs.field(factory=Report, init=False)
    failures: list[str] = attrs.field(factory=list[str], init=False)

    def __attrs_post_init__(self) -> None:
        if self.oracle is not None:
            (self.oracle.folder / "base.raw").write_bytes(self.prepared.below)

    def run(self, operations: Sequence[Operation]) -> None:
        """Carry one workload out, and judge what it could leave."""
        recorded = record(self.prepared, operations)
        told: list[str] = []
        report = recorded.judge().report(
            self._shown_to_qemu(recorded.states(self.chance, self.effort), told)
        )
        self.report.add(report)
        if report.problems:
            told.append(report.told())
            told += self._second_opinions([state for state, _ in report.problems[:3]])
        told += recorded.faults_at_the_end()
        if told:
            name = self.prepared.shape.name
            listed = "\n".join(f"  {operation}" for operation in operations)
            self.failures.append("\n".join((f"{name}:", listed, *told)))

    def _shown_to_qemu(self, states: Iterable[CrashState], told: list[str]) -> Iterator[CrashState]:
        """The states, of which QEMU judges some: what it has to say goes into ``told``."""
        for state in states:
            if self.oracle is not None and self.chance.randrange(self.every) == 0:
                verdict = look_at(state.contents[0])
                # What is marked as dirty QEMU mends, too, before it writes.
                is_judged = verdict.dirty or not verdict.flags
                if is_judged and self.oracle.corruptions(state.contents, repair=verdict.dirty):
                    told.append(f"QEMU finds corruption after event {state.events}: {state.story}")
            yield state

    def _second_opinions(self, bad: Sequence[CrashState]) -> list[str]:
        if self.oracle is None:
            return []
        return [
            f"QEMU finds {self.oracle.corruptions(state.contents)} corruptions in that of event "
            f"{state.events}"
            for state in bad
        ]
