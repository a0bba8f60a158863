"""Every byte of QEMU's images, read as QEMU reads it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Self

import underlay
from underlay import DirectoryGate, SyncFormatAccess

from .building import BuiltImage
from .recipes import Recipe

#: Bytes; of a larger disk, only what was written and its surroundings are read.
WHOLE = 64 << 20


def _open(image: BuiltImage) -> SyncFormatAccess:
    return underlay.open_any(image.path, gate=DirectoryGate())


def windows(recipe: Recipe, size: int, chance: random.Random) -> Iterator[tuple[int, int]]:
    """(offset, length) of reads that cover a disk: all of it, or where its images were written."""
    if size <= WHOLE:
        step = 4 << 20
        yield from ((start, min(step, size - start)) for start in range(0, size, step))
        return
    for op in (op for layer in recipe.chain for op in layer.ops()):
        start = max(0, op.offset - 200_000)
        yield start, max(0, min(size, op.offset + op.length + 200_000) - start)
    for _ in range(20):
        start = chance.randrange(size)
        yield start, min(size - start, 100_000)


def scattered(recipe: Recipe, size: int, chance: random.Random) -> Iterator[tuple[int, int]]:
    """(offset, length) of reads small and large, on and off every border, and across the end."""
    places = [op.offset for layer in recipe.chain for op in layer.ops()] or [0]
    for _ in range(40):
        near = max(0, chance.choice(places) + chance.randint(-3000, 70_000))
        offset = chance.choice((min(near, size), chance.randint(0, size)))
        yield (
            offset,
            chance.choice(
                (0, 1, chance.randint(1, 513), chance.randint(1, 9000), chance.randint(1, 300_000))
            ),
        )


class Twin:
    """The raw file that QEMU made, read as a disk reads: zeroes past the end."""

    def __init__(self, image: BuiltImage) -> None:
        self.file = image.raw().open("rb")
        self.size = image.raw().stat().st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read_bytes(self, offset: int, length: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(length).ljust(length, b"\0")


def _differences(ours: bytes, theirs: bytes, offset: int) -> str | None:
    """Where the first byte differs, for a message that helps."""
    if ours == theirs:
        return None
    if len(ours) != len(theirs):
        return f"{len(ours)} bytes at {offset} instead of {len(theirs)}"
    first = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    return f"byte {offset + first:#x} is {ours[first]:#x} instead of {theirs[first]:#x}"


def test_every_byte_is_read_as_qemu_reads_it(image: BuiltImage) -> None:
    chance = random.Random(image.recipe.name)
    with Twin(image) as twin, _open(image) as disk:
        assert disk.format_name == "qcow2"
        assert disk.size == image.exact_size == twin.size
        for offset, length in windows(image.recipe, disk.size, chance):
            read = disk.read_bytes(offset, length)
            assert _differences(read, twin.read_bytes(offset, length), offset) is None


def test_scattered_reads_agree_on_both_faces_and_as_a_file(image: BuiltImage) -> None:
    chance = random.Random(image.recipe.name)
    with Twin(image) as twin, _open(image) as disk:
        reads = list(scattered(image.recipe, disk.size, chance))
        for offset, length in reads:
            buffer = bytearray(length)
            disk.read(buffer, offset)
            assert _differences(bytes(buffer), twin.read_bytes(offset, length), offset) is None
        with disk.as_file() as file:
            for offset, length in reads[:5]:
                file.seek(offset)
                there = max(0, min(length, disk.size - offset))
                assert (
                    _differences(file.read(length), twin.read_bytes(offset, there), offset) is None
                )

        async def awaited() -> list[bytes]:
            face = disk.awaitable()
            return await asyncio.gather(*(face.read_bytes(*read) for read in reads[:8]))

        for (offset, length), data in zip(reads, asyncio.run(awaited()), strict=False):
            assert _differences(data, twin.read_bytes(offset, length), offset) is None
