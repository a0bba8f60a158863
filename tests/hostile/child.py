"""Runs uses of an image in a child process, and tells what became of each.

A child is forked from one parent in which everything is imported already, so that it starts within
milliseconds and its memory is that of the use. Nothing that it does harms whoever asked for it: it
is killed when its time is up, and cannot have more address space than ``ADDRESS_SPACE``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import pickle
import pkgutil
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self, TypeAlias, cast

import attrs

from underlay.errors import UnderlayError
from underlay.plugins import registry

__all__ = [
    "ADDRESS_SPACE",
    "PATIENCE",
    "PEAK",
    "SECONDS",
    "Call",
    "Outcome",
    "Warm",
    "Watch",
    "serve",
]

#: How much processor time a use may take. The machine may be busy with other things.
SECONDS = 5
#: When it is ended though it takes none, as where it waits for what never comes.
PATIENCE = 60
#: How much resident memory a child may have at any moment, with everything that is imported.
PEAK = 256 << 20
#: What ends a use that asks for much more, before it harms the machine.
ADDRESS_SPACE = 2 << 30

_ROOT = Path(__file__).resolve().parents[2]
#: What is imported once instead of in every child: packages with all that is in them, and modules.
_PRELOADED_PACKAGES = ("underlay.cli", "underlay.jobs", "underlay_drivers", "underlay_storage.file")
_PRELOADED = (
    "asyncio",
    "concurrent.futures.thread",
    "hashlib",
    "isal.igzip_lib",
    "isal.isal_zlib",
    "numpy.ma",
    "rich.console",
    "zstandard",
    "underlay.public",
    "tests.hostile.commands",
    "tests.hostile.uses",
)
#: Events that reach out of the process, and which argument says whereto.
_AUDITED = {
    "open": 0,
    "socket.connect": 1,
    "socket.getaddrinfo": 0,
    "subprocess.Popen": 0,
    "os.exec": 0,
    "os.fork": None,
    "os.posix_spawn": 0,
    "os.system": 0,
    "os.remove": 0,
    "os.rename": 0,
    "os.mkdir": 0,
}
_OF_FILES = {"open", "os.remove", "os.rename", "os.mkdir"}


@attrs.frozen(kw_only=True)
class Outcome:
    """What became of one use."""

    #: What it returned.
    value: Any = None
    #: What it raised, or None. An error that does not pickle is a ``RuntimeError`` that says so.
    error: BaseException | None = None
    #: Where that was raised, for whoever reads a failure.
    where: str = ""
    #: The signal that ended it; None if it came to its end.
    signal: int | None = None
    seconds: float = 0.0
    #: The most resident memory that it had, in bytes.
    peak: int = 0
    #: Everything that it opened, connected to or ran, but for modules: the event and its target.
    reached: tuple[tuple[str, str], ...] = ()

    def broken(self, allowed: Collection[str | os.PathLike[str]]) -> list[str]:
        """Which rules it broke that hold for every use.

        It may reach what is ``allowed``: files, and whatever lies in folders.
        """
        told: list[str] = []
        if self.signal in {signal.SIGKILL, signal.SIGXCPU}:
            told.append(f"not over after {self.seconds:.1f} s")
        elif self.signal is not None:
            told.append(f"ended by signal {self.signal}")
        if isinstance(self.error, UnderlayError):
            if not str(self.error).isprintable():
                told.append(f"its error is not one line: {str(self.error)!r}")
        elif self.error is not None:
            told.append(f"raised {type(self.error).__name__}: {self.error}\n{self.where}")
        if self.peak > PEAK:
            told.append(f"had {self.peak >> 20} MiB of memory")
        names = {os.fspath(path) for path in allowed}
        told += [
            f"reached out: {event} {target}"
            for event, target in self.reached
            if event not in _OF_FILES or names.isdisjoint((target, os.path.dirname(target)))
        ]
        return told


#: A function of a module, and its arguments: what pickles.
Call: TypeAlias = tuple[Callable[..., object], tuple[object, ...]]


class Warm:
    """The parent of all children."""

    def __init__(self, *, seconds: int = SECONDS, patience: int = PATIENCE) -> None:
        """``seconds`` is how much processor time each child has, and ``patience`` of any time."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.child", str(seconds), str(patience)],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, function: Callable[..., object], *arguments: object) -> Outcome:
        """Call it, in a child of its own."""
        return self.run_all([(function, arguments)])[0]

    def run_all(self, calls: Sequence[Call]) -> list[Outcome]:
        """Make the calls one after the other, in one child: together they have its time.

        What ends the child is the outcome of the call that it was at, and of all that follow.
        """
        pickle.dump(calls, cast("IO[bytes]", self._process.stdin))
        cast("IO[bytes]", self._process.stdin).flush()
        outcomes = pickle.load(cast("IO[bytes]", self._process.stdout))  # noqa: S301 - ours
        return cast("list[Outcome]", outcomes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()


# -- in the parent of the children


def serve(seconds: int, patience: int) -> None:
    """Answer ``Warm`` on stdin and stdout until it goes away."""
    for module in _PRELOADED:
        importlib.import_module(module)
    for name in _PRELOADED_PACKAGES:
        package = importlib.import_module(name)
        for found in pkgutil.walk_packages(package.__path__, f"{name}."):
            importlib.import_module(found.name)
    registry()
    gc.freeze()  # a collection in a child would copy all that is shared with it
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(EOFError):
        while True:
            calls = pickle.load(stdin)  # noqa: S301 - from our own process
            pickle.dump(_in_child(calls, seconds, patience), stdout)
            stdout.flush()


def _in_child(calls: Sequence[Call], allowed: int, patience: int) -> list[Outcome]:
    reading, writing = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, allowed + 1))
        _be_child(calls, writing)
    os.close(writing)
    over, told = _all_of(reading, began + patience)
    os.close(reading)
    if not over:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - began
    ended = Outcome(error=RuntimeError("it ended without an answer"), seconds=seconds)
    if os.WIFSIGNALED(status):
        ended = Outcome(signal=os.WTERMSIG(status), seconds=seconds)
    outcomes: list[Outcome] = []
    with contextlib.suppress(EOFError, pickle.UnpicklingError):  # it was ended while telling
        while True:
            outcomes.append(pickle.load(told))  # noqa: S301 - from our own process
    return outcomes + [ended] * (len(calls) - len(outcomes))


def _all_of(pipe: int, deadline: float) -> tuple[bool, io.BytesIO]:
    """Whether the other end was closed before the time was up, and what came."""
    told = io.BytesIO()
    over = False
    while not over and select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        over = not told.write(os.read(pipe, 1 << 20))
    told.seek(0)
    return over, told


# -- in a child


def _be_child(calls: Sequence[Call], pipe: int) -> NoReturn:
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        watch = Watch()
        with os.fdopen(pipe, "wb") as file:
            for function, arguments in calls:
                file.write(_packed(_used(watch, function, arguments)))
                file.flush()
    except BaseException:  # noqa: BLE001 - nothing may return into the parent's loop
        traceback.print_exc()
    os._exit(0)


class Watch:
    """Watches what this process opens and how much memory it has, for as long as it lives."""

    def __init__(self) -> None:
        self._reached: list[tuple[str, str]] = []
        self._watching = False
        sys.addaudithook(self._hear)

    def begin(self) -> None:
        """Forget what was; the peak is what it has now."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._reached.clear()
        self._watching = True

    def end(self) -> tuple[int, tuple[tuple[str, str], ...]]:
        """Since ``begin``: the peak in bytes, and whatever was reached."""
        self._watching = False
        return _peak(), tuple(self._reached)

    def _hear(self, event: str, details: tuple[Any, ...]) -> None:
        if self._watching and event in _AUDITED:
            which = _AUDITED[event]
            target = "" if which is None else details[which]
            if event != "open" or not _is_module(target):
                self._reached.append((event, _named(target)))


def _used(watch: Watch, function: Callable[..., object], arguments: Sequence[object]) -> Outcome:
    value, error, where = None, None, ""
    began = time.monotonic()
    watch.begin()
    try:
        value = function(*arguments)
    except BaseException as raised:  # noqa: BLE001 - which it is says who asks
        error, where = raised, traceback.format_exc()
    peak, reached = watch.end()
    return Outcome(
        value=value,
        error=error,
        where=where,
        seconds=time.monotonic() - began,
        peak=peak,
        reached=reached,
    )


def _is_module(target: object) -> bool:
    """Whether it is what the interpreter opens to import something."""
    return isinstance(target, str) and target.endswith((".py", ".pyc", ".so"))


def _named(target: object) -> str:
    return os.fsdecode(target) if isinstance(target, str | bytes) else str(target)


def _peak() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("this system does not tell the peak of a process's memory")


def _packed(outcome: Outcome) -> bytes:
    try:
        packed = pickle.dumps(outcome)
        if outcome.error is not None:
            pickle.loads(packed)  # noqa: S301 - our own
    except Exception as error:  # noqa: BLE001 - what the use raised may do anything
        what = RuntimeError(f"cannot be pickled ({error}): {outcome.error!r}, {outcome.value!r}")
        packed = pickle.dumps(attrs.evolve(outcome, value=None, error=what))
    return packed


if __name__ == "__main__":
    # By the name that whoever asked knows the classes by.
    importlib.import_module("tests.hostile.child").serve(*map(int, sys.argv[1:]))
