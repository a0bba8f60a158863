"""Recipes that chance wrote: any feature beside any other. The same number gives the same image."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import attrs

from .recipes import (
    KiB,
    MiB,
    Op,
    Recipe,
    Step,
    compressed,
    discard,
    fill,
    noise,
    resize,
    run,
    snapshot,
    text,
    unmap,
    zero,
)
from .recipes_geometry import raw_file

COUNT = 80


@attrs.frozen(kw_only=True)
class Shape:
    """What a random image may look like."""

    cluster: int
    size: int
    options: tuple[str, ...]
    compressing: bool
    snapshots: bool


def shape(chance: random.Random, *, name: str, backed: bool) -> Shape:
    """A geometry and options that QEMU accepts together."""
    cluster = 512 << chance.choices(range(13), (2, 2, 2, 4, 3, 3, 2, 5, 2, 1, 1, 1, 1))[0]
    size = chance.choice((256 * KiB, MiB, MiB + 512, 3 * MiB - 512, 5 * cluster + 1024))
    options = [f"cluster_size={cluster}"]
    compressing, snapshots = True, True
    if chance.random() < 0.2:
        options.append("compat=0.10")
        return Shape(
            cluster=cluster, size=size, options=tuple(options), compressing=True, snapshots=True
        )
    if chance.random() < 0.4:
        width = chance.choice((1, 2, 4, 8, 32, 64))
        options.append(f"refcount_bits={width}")
        # Clusters of one bit's count can be shared by nobody.
        compressing = snapshots = width > 2
    if chance.random() < 0.3:
        options.append("lazy_refcounts=on")
    if chance.random() < 0.15:
        options.append(f"data_file={name}.data")
        compressing = snapshots = False
    elif chance.random() < 0.4:
        options.append("compression_type=zstd")
    if cluster >= 16 * KiB and chance.random() < 0.5:
        options.append("extended_l2=on")
    extended = "extended_l2=on" in options
    if chance.random() < 0.15 and (extended or not backed):
        options.append("preallocation=metadata")
        compressing = False
    return Shape(
        cluster=cluster,
        size=size,
        options=tuple(options),
        compressing=compressing,
        snapshots=snapshots,
    )


def operation(chance: random.Random, size: int, cluster: int) -> Op:
    """Any write, zero or discard: within a cluster, across a few, or up to the end."""
    kinds: tuple[Callable[[int, int], Op], ...] = (
        lambda at, length: noise(chance.randrange(8), at, length),
        lambda at, length: text(chance.randrange(8), at, length),
        lambda at, length: fill(chance.randrange(256), at, length),
        zero,
        unmap,
        unmap,
        discard,
    )
    offset = chance.choice(
        (
            chance.randrange(size),
            min(size - 1, chance.randrange(0, size, cluster)),
            min(size - 1, chance.randrange(0, size, max(512, cluster // 32))),
        )
    )
    length = chance.choice(
        (chance.randint(1, 700), chance.randint(1, 3 * cluster), cluster, 4 * cluster)
    )
    return chance.choice(kinds)(offset, min(length, size - offset, MiB))


def _steps(chance: random.Random, shape: Shape) -> Iterator[Step]:
    clusters = shape.size // shape.cluster
    if shape.compressing:
        # First of all: QEMU compresses into clusters that are not allocated yet, and no other.
        chosen = chance.sample(range(clusters), min(clusters, chance.randint(1, 12)))
        kinds = ("text", "text", "text", "noise")
        yield run(
            *(
                compressed(
                    f"{chance.choice(kinds)}-{chance.randrange(8)}",
                    number * shape.cluster,
                    shape.cluster,
                )
                for number in chosen
            )
        )
    size = shape.size
    for session in range(chance.randint(1, 3)):
        yield run(*(operation(chance, size, shape.cluster) for _ in range(chance.randint(3, 12))))
        if shape.snapshots and chance.random() < 0.4:
            yield snapshot(f"s{session}")
        if chance.random() < 0.2 and "compat=0.10" not in shape.options:
            size += 512 * chance.randint(1, 3000)
            yield resize(size)


def recipe(seed: int) -> Recipe:
    """The image of one number."""
    chance = random.Random(f"interop {seed}")
    backing: Recipe | None = None
    for level in range(chance.choice((0, 0, 1, 1, 2, 3))):
        name = f"level-{level}"
        if level == 0 and chance.random() < 0.4:
            length = chance.randint(1, 4096) * 512 - chance.choice((0, 0, 0, 77))
            backing = raw_file(name, length, seed=seed)
            continue
        below = shape(chance, name=name, backed=backing is not None)
        backing = Recipe(
            name=name,
            size=below.size,
            options=below.options,
            backing=backing,
            steps=tuple(_steps(chance, below)),
        )
    top = shape(chance, name="disk", backed=backing is not None)
    return Recipe(
        name=f"seed-{seed:03}",
        size=top.size,
        options=top.options,
        backing=backing,
        steps=tuple(_steps(chance, top)),
    )


RECIPES = tuple(recipe(seed) for seed in range(COUNT))
