"""A process that damages and tries one image after the other.

``python -m tests.hostile.fuzzing.worker BASES SEED FIRST END STEP FOLDER`` says on its output what
it does, a line of JSON each, so that whoever started it knows which image killed it or hangs. With
the name of an image alone it tries that one.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import resource
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import attrs

from ..bases import Base
from ..child import ADDRESS_SPACE, PEAK, SECONDS, Watch
from .damage import Damage, damage
from .trial import FilePlace, Trial

__all__ = ["DATA_FILE", "fuzzed", "say"]

#: The other file of the bases that have their data in one.
DATA_FILE = "data.raw"
#: How often each undamaged image is tried at first, so that all that is imported is.
_WARMING = 8


@attrs.frozen
class Fuzzed:
    """An image, and how it came to be."""

    base: Base
    data: bytes
    done: list[Damage]

    def __str__(self) -> str:
        return f"{self.base.name}: {'; '.join(map(str, self.done))}"


def fuzzed(bases: Mapping[str, Base], seed: str, number: int) -> Fuzzed:
    """The image of this number: the same every time."""
    chance = random.Random(f"{seed} {number}")
    base = bases[chance.choice(sorted(bases))]
    data, done = damage(base.data, chance)
    return Fuzzed(base, bytes(data), done)


class _Worker:
    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{os.getpid()}.qcow2"
        self.watch = Watch()
        #: Of a garbage-collected object: a disk that was left open.
        self.unraisable: list[str] = []
        sys.unraisablehook = lambda raised: self.unraisable.append(repr(raised.exc_value))
        warnings.simplefilter("error")
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def warm_up(self, bases: Mapping[str, Base]) -> None:
        """Import whatever is imported late."""
        for name, base in bases.items():
            for seed in range(_WARMING):
                problems = self.try_one(base.data, f"{name} {seed}", base.beside.get(DATA_FILE))
                if seed == _WARMING - 1:
                    assert not problems, f"{name} is not damaged: {problems}"
        gc.freeze()

    def try_one(self, data: bytes, seed: str, data_file: bytes | None) -> list[str]:
        """What breaks a rule."""
        open_before = len(os.listdir("/proc/self/fd"))
        self.watch.begin()
        trial = Trial(
            data=data,
            place=FilePlace(self.path),
            chance=random.Random(seed),
            data_file=data_file or b"",
            begins=lambda use: say("use", use),
        )
        problems = trial.run()
        peak, reached = self.watch.end()
        if peak > PEAK:
            problems.append(f"had {peak >> 20} MiB of memory")
        problems += [
            f"reached out: {event} {target}"
            for event, target in reached
            if event != "open" or target != str(self.path)
        ]
        if len(os.listdir("/proc/self/fd")) != open_before:
            problems.append("leaves a file open")
        problems += self.unraisable
        self.unraisable.clear()
        return problems


def say(what: str, content: object, *, seconds: float = SECONDS) -> None:
    """A line for whoever watches; what comes next has so much processor time, and is ended then."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    os.write(1, json.dumps([what, content]).encode() + b"\n")


def _main(arguments: list[str]) -> None:
    bases_file, seed, first, end, step, folder = arguments
    with open(bases_file, "rb") as file:
        bases: Mapping[str, Base] = pickle.load(file)  # noqa: S301 (our own)
    worker = _Worker(Path(folder))
    worker.warm_up(bases)
    for number in range(int(first), int(end), int(step)):
        say("image", number)
        image = fuzzed(bases, seed, number)
        beside = image.base.beside.get(DATA_FILE)
        problems = worker.try_one(image.data, f"{seed} {number}", beside)
        if problems:
            say("broken", problems)
    say("done", None)


if __name__ == "__main__":
    _main(sys.argv[1:])
