"""Snapshots, subclusters, external data files, bitmaps, and images in unusual states."""

from __future__ import annotations

from collections.abc import Iterator

from .recipes import (
    DISK,
    Extension,
    KiB,
    MiB,
    Op,
    Patch,
    Recipe,
    Step,
    WiderHeader,
    amend,
    bitmap,
    compressed,
    crash,
    discard,
    fill,
    forget,
    machine_state,
    noise,
    resize,
    revert,
    run,
    snapshot,
    text,
    tool,
    unmap,
    zero,
)
from .recipes_geometry import everyday


def _snapshots() -> Iterator[Recipe]:
    for title, options in {
        "v2": ("compat=0.10",),
        "v3": (),
        "512": ("cluster_size=512",),
        "2M": ("cluster_size=2M",),
        "extended": ("extended_l2=on",),
        "refcount-2": ("refcount_bits=2",),
        "lazy": ("lazy_refcounts=on",),
        "zstd": ("compression_type=zstd",),
    }.items():
        yield Recipe(
            name=f"snapshots-{title}",
            size=MiB,
            options=options,
            steps=(
                snapshot("before"),
                run(noise(1, 0, 500_000)),
                snapshot("middle"),
                run(unmap(100_000, 200_000), text(2, 300_000, 1000), discard(384 * KiB, 64 * KiB)),
                run(zero(1000, 90_000)),
            ),
        )
        yield Recipe(
            name=f"snapshots-of-other-sizes-{title}",
            size=MiB,
            options=options,
            steps=(
                run(noise(1, 0, MiB)),
                snapshot("one"),
                # QEMU's way to a disk that differs in size from its snapshots: version 3 only.
                *(() if title == "v2" else (resize(2 * MiB + 512),)),
                run(noise(2, MiB - 512, 512)),
                # What two bits count is full then: going back would be one more.
                *(() if title == "refcount-2" else (snapshot("two"),)),
            ),
        )
    for title, names in {
        "many-names": ("2", "1", "a b", " ", 'quote"and\\', "x" * 255, "%s"),
        "foreign-names": ("ünï ☃", "tab\there", "\x1b[31mred", "new\nline"),
    }.items():
        yield Recipe(
            name=f"snapshots-of-{title}",
            size=256 * KiB,
            options=("cluster_size=4k",),
            steps=tuple(
                step
                for number, name in enumerate(names)
                for step in (run(noise(number, number * 20_000, 30_000)), snapshot(name))
            ),
        )
    yield Recipe(
        name="snapshots-deleted-between",
        size=256 * KiB,
        options=("cluster_size=1k",),
        steps=(
            *(
                step
                for number in range(6)
                for step in (run(noise(number, number * 9000, 40_000)), snapshot(f"s{number}"))
            ),
            forget("s1"),
            forget("s4"),
            revert("s2"),
            run(fill(1, 3, 5000)),
            snapshot("s6"),
        ),
    )
    yield Recipe(
        name="snapshots-with-machine-state",
        size=256 * KiB,
        options=("cluster_size=4k",),
        steps=(
            run(noise(1, 0, 100_000), machine_state(5, 0, 50_176)),
            snapshot("running"),
            run(noise(2, 1000, 100_000), machine_state(6, 1024, 90_112)),
            snapshot("later"),
        ),
    )


def _subclusters() -> Iterator[Recipe]:
    below = Recipe(name="below", size=2 * MiB, steps=(run(noise(7, 0, 2 * MiB)),))
    for cluster in (16 * KiB, 32 * KiB, 64 * KiB, 128 * KiB, MiB, 2 * MiB):
        sub = cluster // 32
        every_other = [noise(n, n * 2 * sub, sub) for n in range(16)]
        steps: tuple[Step, ...] = (
            run(
                *every_other,
                *(unmap((n * 3) * sub, sub) for n in range(5)),
                *(discard(20 * sub + n * 4 * sub, 2 * sub) for n in range(3)),
            ),
            run(
                text(3, cluster + sub - 1, 2),
                text(4, cluster + 31 * sub + 5, sub + 9),
                zero(2 * cluster + 4 * sub, 7 * sub),
                unmap(3 * cluster - sub, 2 * sub),
                noise(5, 3 * cluster + 8 * sub, 16 * sub),
                zero(3 * cluster + 10 * sub, 2 * sub),
                discard(3 * cluster, cluster),
                fill(3, 3 * cluster + 9 * sub, 1),
            ),
        )
        for title, backing in {"alone": None, "backed": below}.items():
            yield Recipe(
                name=f"subclusters-{cluster}-{title}",
                size=max(MiB, 5 * cluster),
                options=("extended_l2=on", f"cluster_size={cluster}"),
                backing=backing,
                steps=steps,
            )
        yield Recipe(
            name=f"subclusters-{cluster}-mixed",
            size=max(MiB, 5 * cluster),
            options=("extended_l2=on", f"cluster_size={cluster}", "preallocation=metadata"),
            steps=(
                *steps,
                snapshot("first"),
                run(discard(0, 2 * cluster), noise(1, sub, 3 * sub)),
                run(zero(sub, 5)),
            ),
        )


def _data_files() -> Iterator[Recipe]:
    ops = (
        noise(1, 0, 100_000),
        text(2, 300_000, 70_001),
        zero(40_000, 30_000),
        unmap(310_000, 20_000),
        discard(512 * KiB, 64 * KiB),
        fill(9, MiB - 1, 1),
    )
    for raw in ("off", "on"):
        for title, options in {
            "64k": (),
            "4k": ("cluster_size=4k",),
            "512": ("cluster_size=512",),
            "2M": ("cluster_size=2M",),
            "extended": ("extended_l2=on",),
            "preallocated": ("preallocation=metadata",),
        }.items():
            yield Recipe(
                name=f"data-file-raw-{raw}-{title}",
                size=MiB,
                options=("data_file=disk.data", f"data_file_raw={raw}", *options),
                steps=(run(*ops),),
            )
    yield Recipe(name="data-file-untouched", size=MiB, options=("data_file=disk.data",))
    yield Recipe(
        name="data-file-grown",
        size=MiB,
        options=("data_file=disk.data",),
        steps=(run(*ops), resize(2 * MiB), run(noise(3, 2 * MiB - 999, 999))),
    )


def _bitmaps() -> Iterator[Recipe]:
    data = run(noise(1, 0, 90_000))
    for name, steps in {
        "one": (bitmap("--add", "b0"), data),
        "disabled": (bitmap("--add", "--disable", "b0"), data),
        "granular": (
            bitmap("--add", "-g", "512", "fine"),
            bitmap("--add", "-g", "2M", "coarse"),
            bitmap("--add", "-g", "64k", "--disable", "middle"),
            data,
        ),
        "merged": (
            bitmap("--add", "a"),
            data,
            bitmap("--add", "--disable", "b"),
            bitmap("--merge", "a", "b"),
            bitmap("--clear", "a"),
        ),
        "removed": (bitmap("--add", "a"), bitmap("--add", "b"), data, bitmap("--remove", "a")),
        "all-removed": (bitmap("--add", "a"), data, bitmap("--remove", "a")),
        "named-oddly": (bitmap("--add", "a b ☃"), bitmap("--add", "x" * 1023), data),
        "in-use": (bitmap("--add", "a"), crash(noise(1, 0, 90_000), flush=True)),
        "with-snapshot": (bitmap("--add", "a"), data, snapshot("s"), run(fill(1, 0, 9))),
        "grown": (bitmap("--add", "a"), data, resize(2 * MiB)),
    }.items():
        yield Recipe(name=f"bitmaps-{name}", size=MiB, steps=steps, check=(0, 2, 3))


def _states() -> Iterator[Recipe]:
    data = run(noise(1, 0, 90_000), unmap(4000, 1000), text(2, 500_000, 300_000))
    lazy = ("lazy_refcounts=on",)
    new = noise(3, 100_000, 200_000)
    extension = Extension(0x12345678, b"what nobody knows")
    many: dict[str, tuple[tuple[str, ...], tuple[Step, ...], tuple[int, ...]]] = {
        "lazy": (lazy, (data,), (0,)),
        "dirty-flushed": (lazy, (data, crash(new, flush=True)), (0, 2, 3)),
        "dirty-unflushed": (lazy, (data, crash(new, flush=False)), (0, 2, 3)),
        "dirty-snapshots": (
            lazy,
            (data, snapshot("clean"), crash(new, flush=True)),
            (0, 2, 3),
        ),
        "crashed": ((), (data, crash(new, flush=False)), (0, 3)),
        "corrupt": ((), (data, Patch(72, ">Q", 2, merge=True)), (0,)),
        "dirty-and-corrupt": (lazy, (data, Patch(72, ">Q", 3, merge=True)), (0,)),
        "amended-to-v2": ((), (data, amend("compat=0.10")), (0,)),
        "amended-to-v3": (
            ("compat=0.10",),
            (data, amend("compat=1.1"), run(unmap(0, 70_000))),
            (0,),
        ),
        "amended-refcounts": ((), (data, snapshot("s"), amend("refcount_bits=64")), (0,)),
        "amended-lazy": ((), (data, amend("lazy_refcounts=on")), (0,)),
        "unknown-extension": ((), (data, extension), (0,)),
        "unknown-extension-empty": ((), (data, Extension(0xCAFE, b"")), (0,)),
        "unknown-extensions-v2": (
            ("compat=0.10",),
            (data, extension, Extension(7, b"12345678")),
            (0,),
        ),
        "wider-header": ((), (data, WiderHeader(bytes(8))), (0,)),
        "wider-header-not-zero": ((), (data, WiderHeader(b"\x01" * 24)), (0,)),
        "unknown-compatible": ((), (data, Patch(80, ">Q", 1 << 40, merge=True)), (0,)),
        "unknown-autoclear": ((), (data, Patch(88, ">Q", 1 << 63, merge=True)), (0,)),
        "leaking": ((), (data, tool("resize", "-q", DISK, "+1G"), resize(MiB)), (0, 3)),
    }
    for name, (options, steps, check) in many.items():
        yield Recipe(name=f"state-{name}", size=MiB, options=options, steps=steps, check=check)
    yield Recipe(
        name="state-unknown-extension-backed",
        size=MiB,
        backing=Recipe(name="below", size=MiB, steps=(data,)),
        steps=(extension, run(fill(1, 70_000, 70_000))),
    )
    # A table that grew over several moves of its own.
    yield Recipe(
        name="state-refcount-table-moved",
        size=16 * MiB,
        options=("cluster_size=512", "refcount_bits=64"),
        steps=(run(noise(1, 0, 3 * MiB)), *everyday(512, MiB)),
    )
    yield Recipe(
        name="state-fragmented",
        size=MiB,
        options=("cluster_size=1k",),
        steps=(run(*(noise(n, (n * 389 % 1024) * KiB, KiB) for n in range(400))),),
    )
    yield Recipe(
        name="state-patterns-only",
        size=MiB,
        steps=(
            run(*(fill(n, n * 4099, 4099) for n in range(1, 200))),
            run(Op("write -P 0", 0, 200_000)),
        ),
    )


def _many_tables() -> Iterator[Recipe]:
    """Disks with more entries in their L2 tables than one looks at one by one."""
    cluster = 64 * KiB
    for title, entries, options in (
        ("v3", 8192, ()),
        ("v2", 8192, ("compat=0.10",)),
        ("data-file", 8192, ("data_file=disk.data",)),
        ("extended", 4096, ("extended_l2=on",)),
    ):
        count = 70_000 // entries + 2
        starts = [table * entries * cluster + 5 * cluster for table in range(count)]
        size = (count * entries - 3) * cluster + 1536
        below = Recipe(
            name="below",
            size=size - 100 * MiB,
            steps=(run(*(noise(n, start + 1000, 9 * cluster) for n, start in enumerate(starts))),),
        )
        steps = [
            op
            for table, start in enumerate(starts)
            for op in (
                noise(table, start + table * 2048, cluster),
                text(table, start + 3 * cluster + 40 * KiB, 6 * KiB),
                noise(table, start + (entries - 7) * cluster, 4 * cluster),
                unmap(start + (entries - 6) * cluster, 2048 * table + 512),
                fill(table, start + 3 * cluster + 2048 * (table % 9), 100),
                noise(table, start + 21 * cluster, cluster),
                zero(start + 20 * cluster, 2 * cluster),
            )
            if op.offset + op.length <= size
        ]
        for backing in (None, below):
            yield Recipe(
                name=f"many-tables-{title}{'-backed' if backing else ''}",
                size=size,
                options=options,
                backing=backing,
                steps=(run(*steps),),
            )
        if title in ("v3", "extended"):
            yield Recipe(
                name=f"many-tables-{title}-compressed",
                size=size,
                options=options,
                steps=(
                    run(*(compressed("text-1", start, 2 * cluster) for start in starts)),
                    run(*(fill(7, start + 100, 100) for start in starts[::2])),
                ),
            )


RECIPES = (
    *_snapshots(),
    *_subclusters(),
    *_data_files(),
    *_bitmaps(),
    *_states(),
    *_many_tables(),
)
