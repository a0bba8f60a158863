"""Whatever sequence of commands made an image: it reads as QEMU reads it."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import underlay
from underlay import DirectoryGate

from .building import Kitchen
from .recipes import (
    Io,
    KiB,
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

#: More of them for a long run: ``HYPOTHESIS_EXAMPLES=2000``.
EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "30"))

_numbers = itertools.count()

KINDS: tuple[Callable[[int, int], Op], ...] = (
    lambda at, length: noise(at, at, length),
    lambda at, length: text(length, at, length),
    lambda at, length: fill(at % 256, at, length),
    zero,
    unmap,
    discard,
)


@st.composite
def sessions(draw: st.DrawFn, *, size: int, cluster: int) -> Io:
    """One run of qemu-io on a disk of this size."""
    ops: list[Op] = []
    for _ in range(draw(st.integers(1, 6))):
        offset = draw(st.integers(0, size - 1))
        if draw(st.booleans()):
            offset -= offset % cluster
        longest = min(size - offset, max(4 * cluster, 70_000))
        length = draw(st.integers(1, longest))
        ops.append(draw(st.sampled_from(KINDS))(offset, length))
    return run(*ops)


@st.composite
def layers(draw: st.DrawFn, name: str, backing: Recipe | None = None) -> Recipe:
    """One qcow2 image, over another one or over nothing."""
    extended = draw(st.booleans())
    cluster = draw(st.sampled_from((16, 64, 128) if extended else (0.5, 1, 4, 64)))
    cluster_size = int(cluster * KiB)
    size = created = draw(st.integers(1, 1024)) * 512
    compression = draw(st.sampled_from(("zlib", "zstd")))
    options = (
        f"cluster_size={cluster_size}",
        f"extended_l2={'on' if extended else 'off'}",
        f"compression_type={compression}",
        f"lazy_refcounts={'on' if draw(st.booleans()) else 'off'}",
    )
    steps: list[Step] = []
    # QEMU compresses into clusters that are not allocated yet: before all else.
    numbers = st.integers(0, max(0, size // cluster_size - 1))
    chosen = draw(st.sets(numbers, max_size=6)) if size >= cluster_size else set[int]()
    if chosen:
        kinds = st.sampled_from(("text-1", "text-2", "noise-3"))
        places = [(number * cluster_size, cluster_size) for number in sorted(chosen)]
        steps.append(run(*(compressed(draw(kinds), *place) for place in places)))
    for number in range(draw(st.integers(0, 2))):
        steps.append(draw(sessions(size=size, cluster=cluster_size)))
        further = draw(st.sampled_from(("", "", "snapshot", "grow", "shrink")))
        if further == "snapshot":
            steps.append(snapshot(f"s{number}"))
        elif further:
            other = draw(st.integers(1, 2 * size // 512)) * 512
            size = max(size, other) if further == "grow" else min(size, other)
            steps.append(resize(size))
    return Recipe(name=name, size=created, options=options, backing=backing, steps=tuple(steps))


@st.composite
def chains(draw: st.DrawFn) -> Recipe:
    """An image with up to two below it."""
    recipe: Recipe | None = None
    for level in range(draw(st.sampled_from((0, 0, 1, 2)))):
        recipe = draw(layers(f"level-{level}", recipe))
    return draw(layers("disk", recipe))


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(recipe=chains(), data=st.data())
def test_any_image_reads_as_qemu_reads_it(
    kitchen: Kitchen, recipe: Recipe, data: st.DataObject
) -> None:
    folder = kitchen.root / f"any-{next(_numbers)}"
    folder.mkdir()
    try:
        image = kitchen.build(recipe, folder)
        theirs = image.raw().read_bytes()
        with underlay.open_any(image.path, gate=DirectoryGate()) as disk:
            assert disk.size == len(theirs)
            assert disk.read_bytes(0, disk.size) == theirs
            for _ in range(3):
                offset = data.draw(st.integers(0, disk.size))
                length = data.draw(st.integers(0, 100_000))
                expected = theirs[offset : offset + length].ljust(length, b"\0")
                assert disk.read_bytes(offset, length) == expected
        assert image.touched() == []
    finally:
        shutil.rmtree(folder)
