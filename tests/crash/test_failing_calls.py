"""Whatever call of a storage fails: a typed error, a sound image, and nothing promised is lost."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Sequence

import attrs
import pytest

from underlay import SyncFormatAccess
from underlay.driver import WriteTicket
from underlay.errors import UnderlayError
from underlay_drivers.qcow2.writeback import Writeback
from underlay_drivers.qcow2.writing import ImageWriter
from underlay_storage.memory import MemoryStorage

from .faults import Faults, FaultyStorage, Lasting
from .guest import Flush, History, Moment, Operation, WriteData, carry_out, fitting
from .journal import Begun, Flushed, Journal, Lost, Recorder
from .judging import Judge, chance_of, content_of, differences
from .shapes import SHAPES, Prepared, Shape
from .states import Effort, crash_states
from .structure import look_at

pytestmark = pytest.mark.slow

#: What comes of a power loss is tried after each sync that fails, after one of so many writes,
_WRITES = 9
#: and in one of so many states.
_STATES = 4


@attrs.define(kw_only=True)
class Run:
    """A guest's run on storages that fail once, or from some call on."""

    prepared: Prepared
    faults: Faults
    history: History = attrs.field(init=False)
    journal: Journal = attrs.field(init=False)
    memory: list[MemoryStorage] = attrs.field(init=False)
    #: The operation that failed, once one has; and what was promised last.
    failed: int | None = attrs.field(default=None, init=False)
    promised: int = attrs.field(init=False)
    #: What the guest may see after an operation if the one that failed did nothing.
    alternatives: dict[int, Moment] = attrs.field(factory=dict[int, Moment], init=False)
    #: Whether the disk could be used after the failure.
    works_on: bool = attrs.field(default=False, init=False)
    #: What the disk should not have held then.
    wrong: list[str] = attrs.field(factory=list[str], init=False)

    def __attrs_post_init__(self) -> None:
        contents = self.prepared.contents
        self.history = self.prepared.again()
        self.promised = len(self.history.moments) - 1
        self.journal = Journal(contents, operation=self.promised)
        self.memory = [MemoryStorage(content) for content in contents]

    def storages(self) -> list[FaultyStorage]:
        return [
            FaultyStorage(Recorder(one, self.journal, file=file), self.faults, self.journal, file)
            for file, one in enumerate(self.memory)
        ]

    def contents(self) -> list[bytes]:
        """What the files hold now."""
        return list(map(content_of, self.memory))

    def do(self, disk: SyncFormatAccess, operation: Operation) -> None:
        """Carry one operation out, as the history's next."""
        operation = fitting(operation, len(self.history.now.content))
        number = self.history.add(operation)
        self.journal.add(Begun(number))
        carry_out(operation, disk, number, self.history)
        if isinstance(operation, Flush):
            self.promised = number
            self.journal.add(Flushed(number))

    def go(self, operations: Sequence[Operation]) -> None:
        """Carry them out until one fails; then see whether the disk is of any more use."""
        try:
            disk = self.prepared.open(self.storages(), writable=True)
        except UnderlayError:
            return
        try:
            for operation in operations:
                self.do(disk, operation)
        except UnderlayError:
            self.failed = len(self.history.moments) - 1
            self.faults.end()
            self.go_on(disk)
        try:
            self.end(disk)
        except UnderlayError:
            disk.abandon()
            if self.failed is None:
                self.failed = len(self.history.moments) - 1

    def end(self, disk: SyncFormatAccess) -> None:
        """Close the disk, which is an operation of its own."""
        number = len(self.history.moments)
        self.history.moments.append(self.history.now)
        self.journal.add(Begun(number))
        disk.close()
        self.promised = number
        self.journal.add(Flushed(number))

    def go_on(self, disk: SyncFormatAccess) -> None:
        """A good write after the failure works and lasts, or is refused with a typed error."""
        before, after = self.history.moments[-2:]
        try:
            self.do(disk, WriteData(0, 3 * self.prepared.shape.cluster))
            new = self.history.now.content[: 3 * self.prepared.shape.cluster]
            # What failed was done, or not, or in part; what was done before it is there.
            allowed = [new + content[len(new) :] for content in (before.content, after.content)]
            number = len(self.history.moments) - 1
            undone = attrs.evolve(before, content=allowed[0])
            self.alternatives |= dict.fromkeys(range(number, number + 3), undone)
            content = disk.read_bytes(0, disk.size)
            self.do(disk, Flush())
        except UnderlayError:
            return
        self.works_on = True
        self.wrong += differences(content, allowed, "the disk after the failure")


def _judged(run: Run) -> list[str]:
    """What is wrong with the files, now that the program has ended."""
    contents = run.contents()
    verdict = look_at(contents[0])
    if verdict.corruptions:
        return verdict.corruptions
    moments = run.history.moments
    first = run.promised
    if run.failed is not None:
        # A promise after the failure is no promise that what failed was done.
        first = min(first, run.failed - 1)
    storages = [MemoryStorage(content, writable=False) for content in contents]
    with run.prepared.open(storages, writable=False) as disk:
        content = disk.read_bytes(0, disk.size)
    return differences(content, [moment.content for moment in moments[first:]], "the disk")


def _operations(shape: Shape) -> list[Operation]:
    """Everything once, and a promise in the middle; or what makes a large image special."""
    if shape.thinned > 1:
        return [*shape.further, Flush()]
    operations = shape.operations()
    middle = len(operations) // 2
    return [*operations[:middle], Flush(), *operations[middle:]]


def _undisturbed(prepared: Prepared) -> list[str]:
    """The calls of a run in which none fails."""
    run = Run(prepared=prepared, faults=Faults())
    run.go(_operations(prepared.shape))
    assert run.failed is None
    return run.faults.calls


def _try_each_call(prepared: Prepared, lasting: Lasting) -> tuple[list[str], int]:
    """Let each call of a run fail: what goes wrong, and after how many the disk worked on."""
    operations = _operations(prepared.shape)
    calls = _undisturbed(prepared)
    # Each call meets both errors, one in this way of failing and one in the next.
    modes = list(Lasting)
    mode = modes.index(lasting)
    codes = (errno.EIO, errno.ENOSPC)
    problems: list[str] = []
    worked_on = 0
    step = -(-prepared.shape.thinned // 2) * (2 if lasting is Lasting.GONE else 1)
    for number in range(mode % step, len(calls), step):
        kind = calls[number]
        faults = Faults(fails=number, errno=codes[(number + mode) % 2], lasting=lasting)
        run = Run(prepared=prepared, faults=faults)
        run.go(operations)
        worked_on += run.works_on
        wrong = run.wrong + _judged(run)
        doubtful = kind == "sync" or (kind == "write" and number % _WRITES == 0)
        if doubtful and lasting is Lasting.ONCE and number % prepared.shape.thinned**2 == 0:
            wrong += _after_power_loss(run)
        problems += [f"call {number} ({kind}): {problem}" for problem in wrong[:3]]
    return problems, worked_on


def _after_power_loss(run: Run) -> list[str]:
    """Whether a promise was given for what a failed sync or write left in doubt."""
    events = run.journal.events
    begun = len(run.history.moments) - 1 if run.failed is None else run.failed
    started = (Lost(0), Lost(1), Begun(begun))
    since = next((number for number, event in enumerate(events) if event in started), None)
    if since is None:
        return []  # it failed while the image was opened
    effort = Effort(exhaustive=5, samples=5, tears=1)
    states = crash_states(run.journal, chance_of(run.faults.fails), effort, since=since)
    states = itertools.islice(states, 0, None, _STATES * run.prepared.shape.thinned)
    judge = Judge(history=run.history, open_disk=run.prepared.open, alternatives=run.alternatives)
    report = judge.report(states)
    return [report.told()] if report.problems else []


@pytest.mark.parametrize("lasting", Lasting, ids=[lasting.value for lasting in Lasting])
@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_any_call_may_fail(
    shape: Shape, lasting: Lasting, prepare: Callable[[Shape], Prepared]
) -> None:
    problems, worked_on = _try_each_call(prepare(shape), lasting)

    assert not problems, "\n".join([*map(str, _operations(shape)), *problems[:20]])
    # Where nothing works any more, nothing is promised any more.
    assert (worked_on > 0) == (lasting is not Lasting.GONE)


def test_all_kinds_of_calls_are_made(prepare: Callable[[Shape], Prepared]) -> None:
    kinds = {"read", "write", "write_zeroes", "discard", "resize", "sync"}

    shapes = (shape for shape in SHAPES if shape.name in {"v3", "data-file", "raw-data-file"})
    assert set().union(*(_undisturbed(prepare(shape)) for shape in shapes)) == kinds


def _do_nothing(*arguments: object, **named: object) -> None:
    return


def _forget_failed_syncs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writeback, "give_up", _do_nothing)


def _forget_what_was_not_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writeback, "_put_back", _do_nothing)


def _give_nothing_back(patch: pytest.MonkeyPatch) -> None:
    async def commit(self: ImageWriter, ticket: WriteTicket) -> None:
        await self.commit(ticket)

    patch.setattr(ImageWriter, "abort", commit)


@pytest.mark.parametrize(
    "breaks", [_forget_failed_syncs, _forget_what_was_not_written, _give_nothing_back]
)
def test_a_driver_that_ignores_failures_is_caught(
    breaks: Callable[[pytest.MonkeyPatch], None],
    prepare: Callable[[Shape], Prepared],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared = prepare(SHAPES[0])
    breaks(monkeypatch)

    assert _try_each_call(prepared, Lasting.ONCE)[0]
