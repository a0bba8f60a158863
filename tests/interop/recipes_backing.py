"""Backing chains: every relation of sizes, formats and clusters, down to four images below."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from .recipes import (
    KiB,
    MiB,
    Op,
    Recipe,
    Step,
    discard,
    fill,
    noise,
    rebase,
    resize,
    run,
    snapshot,
    text,
    unmap,
    zero,
)
from .recipes_geometry import raw_file

#: Longer, equal and shorter than the overlay of 1 MiB, on and off every border.
LENGTHS = (0, 512, 1000, 300 * KiB, 300 * KiB + 512, 300_001, MiB - 512, MiB, MiB + 512, 3 * MiB)

OVER: tuple[Step, ...] = (
    run(
        fill(0x55, 4 * KiB - 1, 2),
        noise(1, 70_000, 30_000),
        zero(128 * KiB, 64 * KiB),
        unmap(256 * KiB, 128 * KiB),
        discard(512 * KiB, 64 * KiB),
        zero(290_000, 20_001),
        fill(0x66, MiB - 3, 3),
    ),
)


def _lengths() -> Iterator[Recipe]:
    for length in LENGTHS:
        yield Recipe(
            name=f"backing-raw-{length}",
            size=MiB,
            backing=raw_file("below", length),
            steps=OVER,
        )
        if length % 512:
            continue
        below = Recipe(
            name="below", size=length, steps=(run(text(3, 0, length)),) if length else ()
        )
        yield Recipe(name=f"backing-qcow2-{length}", size=MiB, backing=below, steps=OVER)
        yield Recipe(
            name=f"backing-v2-{length}",
            size=MiB,
            options=("compat=0.10", "cluster_size=4k"),
            backing=attrs.evolve(below, options=("compat=0.10",)),
            steps=OVER,
        )


def _untouched() -> Iterator[Recipe]:
    for length in (300 * KiB + 512, MiB, 3 * MiB):
        yield Recipe(
            name=f"backing-untouched-{length}", size=MiB, backing=raw_file("below", length)
        )


def _clusters() -> Iterator[Recipe]:
    sizes = (512, 4 * KiB, 64 * KiB, MiB)
    for above in sizes:
        for below in sizes:
            yield Recipe(
                name=f"backing-clusters-{above}-over-{below}",
                size=MiB,
                options=(f"cluster_size={above}",),
                backing=Recipe(
                    name="below",
                    size=900 * KiB + 512,
                    options=(f"cluster_size={below}",),
                    steps=(
                        run(
                            noise(2, 3000, 200_000), unmap(100_000, 9000), text(3, 500_000, 400_000)
                        ),
                    ),
                ),
                steps=OVER,
            )


def _shapes() -> Iterator[Recipe]:
    """One kind of overlay over another, where what is above decides what shows."""
    below = Recipe(name="below", size=MiB, steps=(run(noise(4, 0, MiB)),))
    for name, options in {
        "extended": ("extended_l2=on",),
        "extended-2M": ("extended_l2=on", "cluster_size=2M"),
        "refcount-1": ("refcount_bits=1",),
        "lazy": ("lazy_refcounts=on",),
        "data-file": ("data_file=disk.data",),
        "512": ("cluster_size=512",),
    }.items():
        yield Recipe(
            name=f"backing-under-{name}", size=MiB, options=options, backing=below, steps=OVER
        )
        yield Recipe(
            name=f"backing-of-{name}",
            size=MiB,
            backing=attrs.evolve(
                below,
                options=tuple(option.replace("disk.", "below.") for option in options),
                steps=(
                    run(noise(4, 0, 200_000), text(5, 500_000, 300_000), unmap(128 * KiB, 40_000)),
                ),
            ),
            steps=OVER,
        )
    for ways in ("zero", "unmap", "discard"):
        for title, options in {
            "v2": ("compat=0.10",),
            "v3": (),
            "extended": ("extended_l2=on",),
        }.items():
            verb = {"zero": "write -z", "unmap": "write -z -u", "discard": "discard"}[ways]
            yield Recipe(
                name=f"backing-hidden-by-{ways}-{title}",
                size=MiB,
                options=options,
                backing=below,
                steps=(
                    run(noise(6, 100_000, 100_000)),
                    run(
                        Op(verb, 64 * KiB, 128 * KiB),
                        Op(verb, 300_000, 3000),
                        Op(verb, 512 * KiB - 700, 128 * KiB),
                        Op(verb, MiB - 70_000, 70_000),
                    ),
                ),
            )
    yield Recipe(
        name="backing-overlay-shorter-grown",
        size=256 * KiB,
        backing=below,
        steps=(run(fill(1, 1000, 1000)), resize(512 * KiB), resize(MiB)),
    )
    yield Recipe(
        name="backing-snapshots",
        size=MiB,
        backing=below,
        steps=(
            snapshot("empty"),
            *OVER,
            snapshot("written"),
            run(unmap(0, 512 * KiB), fill(7, 600_000, 1000)),
            snapshot("hidden"),
        ),
    )


def _deep() -> Iterator[Recipe]:
    for depth in (2, 3, 4):
        for bottom in ("raw", "qcow2"):
            chain = (
                raw_file("level-0", 700_001)
                if bottom == "raw"
                else Recipe(name="level-0", size=800 * KiB, steps=(run(noise(0, 0, 800 * KiB)),))
            )
            for level in range(1, depth + 1):
                chain = Recipe(
                    name=f"level-{level}",
                    # Each of another length, now shorter and now longer than the one below.
                    size=(2 * MiB, 300 * KiB + 512, MiB, 640 * KiB)[level % 4],
                    options=(f"cluster_size={512 << 2 * level}",),
                    backing=chain,
                    steps=(
                        run(
                            noise(level, level * 50_000, 20_000),
                            unmap(150_000 + level * 7000, 5000),
                            text(level, level * 30_000 + 200_000, 10_000),
                        ),
                    ),
                )
            yield attrs.evolve(
                chain, name=f"backing-depth-{depth}-over-{bottom}", size=2 * MiB - 512
            )


def _rebased() -> Iterator[Recipe]:
    below = Recipe(name="below", size=MiB, steps=(run(noise(4, 0, 600_000)),))
    other = Recipe(
        name="other", size=512 * KiB, steps=(run(noise(4, 0, 200_000), text(1, 300_000, 90_000)),)
    )
    for name, step in {
        "safely": rebase("other.qcow2"),
        "unsafely": rebase("other.qcow2", "-u"),
        "onto-nothing": rebase(""),
        "onto-nothing-unsafely": rebase("", "-u"),
    }.items():
        yield Recipe(
            name=f"rebased-{name}",
            size=MiB,
            backing=below,
            beside=(other,),
            steps=(run(fill(8, 100_000, 9000), unmap(400_000, 5000)), step),
        )


RECIPES = (
    *_lengths(),
    *_untouched(),
    *_clusters(),
    *_shapes(),
    *_deep(),
    *_rebased(),
)
