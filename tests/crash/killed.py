"""A program that writes to an image until it is killed: ``python -m crash.killed IMAGE SEED``.

It says which operation begins, and which ones are promised to be durable.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import underlay

from .guest import Flush, History, Moment, Operation, fitting
from .judging import chance_of
from .shapes import Shape
from .workloads import long_workload

__all__ = ["SHAPE", "follow"]

SHAPE = Shape(name="killed", cluster=4096, size=1 << 20)


def follow(seed: str) -> Iterator[tuple[int, Operation, History]]:
    """What the guest does, without end, each with its number and what the disk holds after it."""
    chance = chance_of("killed", seed)
    history = History([Moment(bytes(SHAPE.size))])
    while True:
        operation = fitting(long_workload(SHAPE, chance, 1)[0], len(history.now.content))
        yield history.add(operation), operation, history


def main(image: str, seed: str) -> None:
    """Write for ever."""
    with underlay.open_image(image, format="qcow2", writable=True) as disk:
        for number, operation, _ in follow(seed):
            os.write(1, b"begun %d\n" % number)
            operation.run(disk, number)
            if isinstance(operation, Flush):
                os.write(1, b"promised %d\n" % number)


if __name__ == "__main__":
    main(*sys.argv[1:])
