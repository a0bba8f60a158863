"""Compressed clusters: every cluster size, both types, beside every other kind of data."""

from __future__ import annotations

from collections.abc import Iterator

from .recipes import (
    Copied,
    KiB,
    MiB,
    Op,
    Recipe,
    amend,
    compressed,
    discard,
    fill,
    noise,
    resize,
    revert,
    run,
    snapshot,
    unmap,
    zero,
)
from .recipes_geometry import CLUSTER_SIZES, everyday, label

TYPES = ("zlib", "zstd")


def squeezed(cluster: int) -> tuple[Op, ...]:
    """Runs and single clusters, compressible and not, which share host clusters and cross them."""
    if cluster > 256 * KiB:
        # QEMU takes half a second for each MiB or two: the runs are shown by smaller clusters.
        return (
            compressed("text-1", 5 * cluster, cluster),
            compressed("noise-1", cluster, cluster),
            compressed("text-4", 7 * cluster, cluster),
        )
    return (
        compressed("text-0", 0, 3 * cluster),
        compressed("text-1", 5 * cluster, cluster),
        compressed("noise-1", 6 * cluster, cluster),
        compressed("text-2", 7 * cluster, 2 * cluster),
        compressed("text-3", 15 * cluster, cluster),
        compressed("text-4", 13 * cluster, cluster),
        compressed("text-5", 11 * cluster, cluster),
    )


def overwritten(cluster: int) -> tuple[Op, ...]:
    """What may come over compressed clusters afterwards."""
    return (
        noise(6, cluster + 100, 50),
        fill(0x44, 5 * cluster - 10, 20),
        unmap(7 * cluster, cluster),
        zero(8 * cluster + 1, cluster - 2),
        discard(13 * cluster, cluster),
        compressed("text-6", 7 * cluster, cluster),
    )


def _by_cluster() -> Iterator[Recipe]:
    for cluster in CLUSTER_SIZES:
        for kind in TYPES:
            size = max(128 * KiB, 17 * cluster)
            yield Recipe(
                name=f"compressed-{kind}-{label(cluster)}",
                size=size,
                options=(f"cluster_size={cluster}", f"compression_type={kind}"),
                steps=(run(*squeezed(cluster)), run(*overwritten(cluster))),
            )
    for cluster in (512, 4 * KiB, 64 * KiB, 2 * MiB):
        yield Recipe(
            name=f"compressed-v2-{label(cluster)}",
            size=17 * cluster,
            options=(f"cluster_size={cluster}", "compat=0.10"),
            steps=(run(*squeezed(cluster)), run(*overwritten(cluster)[:2])),
        )
    for cluster in (16 * KiB, 32 * KiB, 64 * KiB, 512 * KiB, 2 * MiB):
        for kind in TYPES:
            yield Recipe(
                name=f"compressed-extended-{kind}-{label(cluster)}",
                size=17 * cluster,
                options=(
                    f"cluster_size={cluster}",
                    "extended_l2=on",
                    f"compression_type={kind}",
                ),
                steps=(run(*squeezed(cluster)), run(*overwritten(cluster))),
            )


def _widths() -> Iterator[Recipe]:
    for width in (1, 2, 8, 64):
        yield Recipe(
            name=f"compressed-refcount-{width}",
            size=MiB,
            options=("cluster_size=4k", f"refcount_bits={width}"),
            # More than one compressed cluster in a host cluster is more than one bit counts.
            steps=(run(*(squeezed(4 * KiB)[1:2] if width == 1 else squeezed(4 * KiB))),),
        )


def _converted() -> Iterator[Recipe]:
    """``qemu-img convert -c``: what most compressed images are."""
    size = MiB + 3 * 512
    source = Recipe(
        name="source",
        size=size,
        steps=(*everyday(4 * KiB, size), run(*(noise(n, n * 100_000, 30_000) for n in range(9)))),
    )
    for kind in TYPES:
        for cluster in (512, 4 * KiB, 64 * KiB, MiB):
            yield Recipe(
                name=f"converted-{kind}-{label(cluster)}",
                size=0,
                options=(f"compression_type={kind}", f"cluster_size={cluster}"),
                copied=Copied(source=source, arguments=("-c",)),
            )
    yield Recipe(
        name="converted-parallel-out-of-order",
        size=0,
        options=("cluster_size=4k",),
        copied=Copied(source=source, arguments=("-c", "-W", "-m", "8")),
    )
    yield Recipe(
        name="converted-v2",
        size=0,
        options=("compat=0.10",),
        copied=Copied(source=source, arguments=("-c",)),
    )


def _tails() -> Iterator[Recipe]:
    """A disk that ends inside a compressed cluster."""
    for kind in TYPES:
        for tail in (512, 2048, 60 * KiB):
            size = 2 * 64 * KiB + tail
            yield Recipe(
                name=f"compressed-tail-{kind}-{tail}",
                size=size,
                options=(f"compression_type={kind}",),
                steps=(run(compressed("text-1", 0, size)),),
            )
        yield Recipe(
            name=f"compressed-cut-by-shrinking-{kind}",
            size=MiB,
            options=(f"compression_type={kind}", "cluster_size=16k"),
            steps=(run(compressed("text-2", 0, MiB)), resize(300_032), resize(400_384)),
        )


def _together() -> Iterator[Recipe]:
    for kind in TYPES:
        options = (f"compression_type={kind}", "cluster_size=8k")
        cluster = 8 * KiB
        yield Recipe(
            name=f"compressed-snapshots-{kind}",
            size=17 * cluster,
            options=options,
            steps=(
                run(*squeezed(cluster)),
                snapshot("squeezed"),
                run(*overwritten(cluster)),
                snapshot("overwritten"),
                revert("squeezed"),
                run(compressed("text-7", 3 * cluster, 2 * cluster), fill(9, 0, cluster)),
            ),
        )
        yield Recipe(
            name=f"compressed-over-compressed-{kind}",
            size=17 * cluster,
            options=options,
            backing=Recipe(
                name="below",
                size=12 * cluster,
                options=("compression_type=zstd" if kind == "zlib" else "compression_type=zlib",),
                steps=(run(compressed("text-5", 0, 12 * cluster)),),
            ),
            steps=(run(*squeezed(cluster)), run(*overwritten(cluster))),
        )
    yield Recipe(
        name="compressed-all-zeroes",
        size=MiB,
        steps=(
            run(Op("write -c -P 0", 0, 3 * 64 * KiB), Op("write -c -P 255", 256 * KiB, 64 * KiB)),
        ),
    )
    yield Recipe(
        name="compressed-then-version-2",
        size=MiB,
        steps=(run(compressed("text-3", 0, MiB)), amend("compat=0.10")),
    )
    yield Recipe(
        name="compressed-preallocated",
        size=MiB,
        options=("preallocation=metadata", "extended_l2=on"),
        steps=(run(discard(0, 512 * KiB)), run(compressed("text-3", 0, 256 * KiB))),
    )


RECIPES = (*_by_cluster(), *_widths(), *_converted(), *_tails(), *_together())
