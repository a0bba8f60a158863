"""What guests do: every short sequence, many random ones, and long ones from seeds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from .guest import (
    Apply,
    ChangeBitmap,
    Compress,
    CopyBitmaps,
    Delete,
    Discard,
    Flush,
    Grow,
    Operation,
    Push,
    Shrink,
    Take,
    WriteData,
    WriteZeroes,
)
from .shapes import Shape

__all__ = ["long_workload", "pairs", "singles", "triple"]


def singles(shape: Shape) -> Iterator[list[Operation]]:
    """Each operation, flushed afterwards."""
    for operation in shape.operations():
        yield [operation, Flush()]


def pairs(shape: Shape) -> Iterator[list[Operation]]:
    """Each operation after each other one, flushed in between or not."""
    for first, second in itertools.product(shape.operations(), repeat=2):
        yield [first, second, Flush()]
        yield [first, Flush(), second]


def triple(shape: Shape, chance: random.Random) -> list[Operation]:
    """Three operations, flushed here and there."""
    chosen: list[Operation] = []
    for operation in chance.choices(shape.operations(), k=3):
        chosen.append(operation)
        if chance.random() < 0.5:
            chosen.append(Flush())
    return chosen


def long_workload(shape: Shape, chance: random.Random, length: int = 60) -> list[Operation]:
    """Many operations anywhere on the disk."""
    return [_anything(shape, chance) for _ in range(length)]


def _anything(shape: Shape, chance: random.Random) -> Operation:
    cluster = shape.cluster
    offset = chance.randrange(shape.size)
    length = chance.choice((20, 512, cluster, 3 * cluster + 7))
    if chance.random() < 0.5:
        offset -= offset % cluster
    whole = offset - offset % cluster
    kinds: list[tuple[int, Operation]] = [
        (40, WriteData(offset, length)),
        (10, WriteZeroes(offset, length)),
        (12, Discard(whole, length + cluster)),
        (15, Flush()),
        (8, Push()),
        (2, Grow(chance.randrange(1, 9) * 512)),
        (2, Shrink(chance.randrange(1, 9) * 512)),
    ]
    if shape.compression:
        kinds.append((10, Compress(whole, cluster)))
    if shape.snapshots:
        name = chance.choice("abc")
        kinds += [(3, Take(name)), (2, Apply(name)), (3, Delete(name))]
    if shape.bitmap:
        name, other = chance.choice("abc"), chance.choice(("dirty", "a"))
        action = chance.choice(("add", "add", "clear", "merge", "disable", "enable", "remove"))
        kinds.append((20, ChangeBitmap(action, name, other)))
        granules = tuple(sorted(chance.sample(range(40), 3)))
        kinds.append((8, CopyBitmaps(("b", "c"), granules)))
    weights = [weight for weight, _ in kinds]
    return chance.choices(kinds, weights)[0][1]
