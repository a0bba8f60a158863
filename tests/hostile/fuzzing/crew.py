"""Keeps workers busy, and says which image broke a rule, killed its worker, or took too long."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, cast

import attrs

from ..child import PATIENCE, SECONDS

__all__ = ["Broken", "Crew"]

_ROOT = Path(__file__).resolve().parents[3]
#: How often to look whether somebody takes too long, in seconds.
_LOOK = 0.2
#: What a worker has to import and to warm up may take so long, on a busy machine.
_STARTING = 120.0


@attrs.frozen
class Broken:
    """An image that broke rules."""

    number: int
    problems: list[str]


@attrs.define(kw_only=True)
class _Worker:
    process: subprocess.Popen[bytes]
    #: Which images it tries: every so many of them.
    step: int
    #: The one that it is at, and the next one.
    number: int | None = None
    use: str = "starting"
    since: float = attrs.field(factory=time.monotonic)
    #: A line that has begun.
    rest: bytes = b""
    done: bool = False
    #: It has closed its output, which it does by ending.
    ended: bool = False

    def late(self, seconds: float) -> bool:
        """Whether what it does takes longer than a use may."""
        allowed = _STARTING if self.number is None else seconds
        return time.monotonic() - self.since > allowed


@attrs.define(kw_only=True)
class Crew:
    """Tries the images of a seed from number 0 to ``end``, with some processes."""

    bases: Path
    seed: str
    end: int
    processes: int
    folder: Path
    #: What a process runs.
    program: str = "tests.hostile.fuzzing.worker"
    #: How long one use of an image may take: of any time, for it has ``SECONDS`` of processor time.
    seconds: float = PATIENCE
    _selector: selectors.DefaultSelector = attrs.field(
        factory=selectors.DefaultSelector, init=False
    )

    def run(self) -> Generator[Broken]:
        """Those that broke a rule, as they are found."""
        workers = [self._start(first, self.processes) for first in range(self.processes)]
        try:
            while not all(worker.done for worker in workers):
                for key, _ in self._selector.select(_LOOK):
                    yield from self._hear(key.data)
                for place, worker in enumerate(workers):
                    if not worker.done and (worker.late(self.seconds) or worker.ended):
                        yield self._ended(worker)
                        workers[place] = self._instead(worker)
        finally:
            for worker in workers:
                self._end(worker)
            self._selector.close()

    def _start(self, first: int, step: int) -> _Worker:
        where = map(str, (self.bases, self.seed, first, self.end, step, self.folder))
        process = subprocess.Popen(
            [sys.executable, "-m", self.program, *where],
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        worker = _Worker(process=process, step=step)
        self._selector.register(cast("IO[bytes]", process.stdout), selectors.EVENT_READ, worker)
        return worker

    def _hear(self, worker: _Worker) -> Iterator[Broken]:
        """What a worker says."""
        pipe = cast("IO[bytes]", worker.process.stdout)
        said = os.read(pipe.fileno(), 1 << 16)
        if not said:
            worker.ended = True
            self._selector.unregister(pipe)
        *lines, worker.rest = (worker.rest + said).split(b"\n")
        for line in lines:
            what, content = json.loads(line)
            worker.since = time.monotonic()
            if what == "image":
                worker.number, worker.use = content, "making it"
            elif what == "use" and worker.number is not None:
                worker.use = content
            elif what == "broken":
                assert worker.number is not None
                yield Broken(worker.number, content)
            elif what == "done":
                worker.done = True

    def _ended(self, worker: _Worker) -> Broken:
        """A worker hangs, or has died."""
        if worker.number is None:
            self._end(worker)
            raise AssertionError(f"a worker did not start: exit {worker.process.returncode}")
        ended = worker.ended
        self._end(worker)
        what = f"not over after {self.seconds} s"
        if ended:
            what = f"the process died ({worker.process.returncode})"
            if worker.process.returncode == -signal.SIGPROF:
                what = f"not over after {SECONDS} s of processor time"
        return Broken(worker.number, [f"{worker.use}: {what}"])

    def _instead(self, worker: _Worker) -> _Worker:
        """One that goes on behind the image that ended this one."""
        assert worker.number is not None
        return self._start(worker.number + worker.step, worker.step)

    def _end(self, worker: _Worker) -> None:
        pipe = cast("IO[bytes]", worker.process.stdout)
        if pipe in self._selector.get_map():
            self._selector.unregister(pipe)
        pipe.close()
        if not worker.ended:
            worker.process.kill()
        worker.process.wait()
