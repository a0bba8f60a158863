"""The everyday image in all shapes: clusters, versions, refcounts, sizes, preallocation."""

from __future__ import annotations

from collections.abc import Iterator

from .recipes import (
    Copied,
    Io,
    KiB,
    MiB,
    Op,
    Patch,
    Recipe,
    Truncate,
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

CLUSTER_SIZES = tuple(512 << shift for shift in range(13))
VERSIONS = {"v2": "0.10", "v3": "1.1"}


def label(size: int) -> str:
    """A size as people write it."""
    for unit, name in ((1 << 40, "T"), (1 << 30, "G"), (MiB, "M"), (KiB, "k")):
        if size and size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)


def everyday(cluster: int, size: int, *, seed: int = 0) -> tuple[Io, Io]:
    """Two sessions that leave data, zeroes, holes and seams at every kind of border."""
    table = cluster * cluster // 8
    first: list[Op] = [
        noise(seed, 0, cluster),
        fill(0x11, cluster + cluster // 2, cluster * 3 // 2 - 17),
        text(seed, 5 * cluster - 1, 2),
        # Backwards, so that the host's order is not the guest's.
        noise(seed + 1, 14 * cluster, cluster),
        noise(seed + 2, 13 * cluster, cluster),
        noise(seed + 3, 12 * cluster, cluster),
        noise(seed + 4, 7 * cluster, 3 * cluster),
        fill(0x77, size - 1, 1),
    ]
    if table + 300 < size:
        first.append(noise(seed + 5, table - 100, 300))
    second: list[Op] = [
        zero(7 * cluster, cluster),
        unmap(8 * cluster, 2 * cluster),
        noise(seed + 6, 9 * cluster + 100, 300),
        discard(5 * cluster, cluster),
        unmap(11 * cluster, cluster),
        zero(12 * cluster + 3, cluster),
        fill(0x22, 2 * cluster - 1, 2),
    ]
    return run(*first), run(*second)


def _clusters() -> Iterator[Recipe]:
    for cluster in CLUSTER_SIZES:
        size = max(MiB, 17 * cluster)
        for version, compat in VERSIONS.items():
            yield Recipe(
                name=f"cluster-{label(cluster)}-{version}",
                size=size,
                options=(f"cluster_size={cluster}", f"compat={compat}"),
                steps=everyday(cluster, size, seed=cluster.bit_length()),
            )


def _refcounts() -> Iterator[Recipe]:
    for width in (1, 2, 4, 8, 16, 32, 64):
        for cluster in (512, 4 * KiB, 64 * KiB):
            size = 2 * MiB
            # A snapshot counts to two, which one bit cannot.
            before, after = everyday(cluster, size, seed=width)
            steps = (before, after) if width == 1 else (before, snapshot("first"), after)
            yield Recipe(
                name=f"refcount-{width}-{label(cluster)}",
                size=size,
                options=(f"cluster_size={cluster}", f"refcount_bits={width}"),
                steps=steps,
            )


def _sizes() -> Iterator[Recipe]:
    for cluster in (512, 4 * KiB, 64 * KiB):
        for size in sorted(
            {0, 512, 1 * KiB, cluster - 512, cluster + 512, 3 * cluster + 1536, MiB - 512}
        ):
            written = run(noise(1, 0, size), unmap(size // 2, size // 4)) if size else None
            yield Recipe(
                name=f"size-{label(cluster)}-{size}",
                size=size,
                options=(f"cluster_size={cluster}",),
                steps=(written,) if written else (),
            )


def _odd_sizes() -> Iterator[Recipe]:
    """What other programs write: a size in the header that ends inside a sector."""
    for version, compat in VERSIONS.items():
        for size in (1, 511, 513, 1000, 4 * KiB + 1, 64 * KiB - 1, 100_001, 128 * KiB + 511):
            rounded = size + -size % 512
            yield Recipe(
                name=f"odd-size-{version}-{size}",
                size=rounded,
                options=("cluster_size=4k", f"compat={compat}"),
                steps=(run(noise(2, 0, rounded)), Patch(24, ">Q", size)),
            )
    yield Recipe(
        name="odd-size-over-longer-backing",
        size=8 * KiB,
        options=("cluster_size=4k",),
        backing=Recipe(name="below", size=16 * KiB, steps=(run(noise(3, 0, 16 * KiB)),)),
        steps=(run(noise(2, 0, 1 * KiB)), Patch(24, ">Q", 7001)),
    )


def _preallocated() -> Iterator[Recipe]:
    for mode in ("off", "metadata", "falloc", "full"):
        for title, options in {
            "v2": ("compat=0.10",),
            "v3": (),
            "4k": ("cluster_size=4k",),
            "extended": ("extended_l2=on",),
            "data-file": ("data_file=disk.data",),
        }.items():
            for state in ("untouched", "written"):
                size = MiB
                written = run(
                    noise(4, 100, 70_000),
                    unmap(128 * KiB, 200 * KiB),
                    zero(500 * KiB, 9 * KiB),
                    discard(640 * KiB, 128 * KiB),
                )
                yield Recipe(
                    name=f"preallocated-{mode}-{title}-{state}",
                    size=size,
                    options=(f"preallocation={mode}", *options),
                    steps=(written,) if state == "written" else (),
                )


def _large() -> Iterator[Recipe]:
    tera = 1 << 40
    for name, size, options in (
        ("1T", tera, ()),
        ("1T-v2", tera, ("compat=0.10",)),
        ("1T-2M", tera, ("cluster_size=2M",)),
        ("1T-extended", tera, ("extended_l2=on", "cluster_size=128k")),
        ("15T", 15 * tera, ("cluster_size=2M",)),
        ("16G-4k", 16 << 30, ("cluster_size=4k",)),
        ("2G-512", 2 << 30, ("cluster_size=512",)),
        ("1T-data-file", tera, ("data_file=disk.data",)),
    ):
        yield Recipe(
            name=f"large-{name}",
            size=size,
            options=options,
            steps=(
                run(
                    noise(5, 0, 4 * KiB),
                    noise(6, size // 2 - 70_000, 140_000),
                    fill(0x33, size // 3, 5000),
                    noise(7, size - 1000, 1000),
                    unmap(size // 2, 70_000),
                ),
            ),
        )
    yield Recipe(
        name="large-metadata-preallocated",
        size=16 << 30,
        options=("cluster_size=2M", "preallocation=metadata"),
        steps=(run(noise(5, (8 << 30) - 5000, 10_000)),),
    )


def _resized() -> Iterator[Recipe]:
    for title, options in {"v3": (), "v2": ("compat=0.10",), "512": ("cluster_size=512",)}.items():
        start = (run(noise(1, 0, MiB)),)
        yield Recipe(
            name=f"resized-grown-{title}",
            size=MiB,
            options=options,
            steps=(*start, resize(3 * MiB + 512), run(noise(2, 2 * MiB - 3, MiB))),
        )
        yield Recipe(
            name=f"resized-shrunk-{title}",
            size=MiB,
            options=options,
            steps=(*start, resize(300 * KiB + 512)),
        )
        yield Recipe(
            name=f"resized-shrunk-then-grown-{title}",
            size=MiB,
            options=options,
            steps=(*start, resize(300 * KiB), resize(900 * KiB)),
        )


def _copied() -> Iterator[Recipe]:
    """What ``qemu-img convert`` makes: of raw files of any length, and of other images."""
    for length in (1, 1000, 4097, 100_003):
        yield Recipe(
            name=f"copied-from-raw-{length}",
            size=0,
            copied=Copied(source=raw_file("source", length), arguments=()),
        )
    whole = Recipe(name="whole", size=2 * MiB, steps=everyday(64 * KiB, 2 * MiB, seed=3))
    for cluster in (4 * KiB, 64 * KiB, 2 * MiB):
        yield Recipe(
            name=f"copied-{label(cluster)}",
            size=0,
            options=(f"cluster_size={cluster}",),
            copied=Copied(source=whole, arguments=("-S", "4k")),
        )
    yield Recipe(
        name="copied-every-byte", size=0, copied=Copied(source=whole, arguments=("-S", "0"))
    )


def raw_file(name: str, length: int, *, seed: int = 5) -> Recipe:
    """A raw file of exactly so many bytes, full of noise."""
    rounded = length + -length % 512
    steps = (run(noise(seed, 0, rounded)), Truncate(length)) if length else ()
    return Recipe(name=name, size=rounded, format="raw", steps=steps, check=(63,))


RECIPES = (
    *_clusters(),
    *_refcounts(),
    *_sizes(),
    *_odd_sizes(),
    *_preallocated(),
    *_large(),
    *_resized(),
    *_copied(),
)
