"""What the contract suites for drivers share."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from underlay.face import home_loop, in_loop
from underlay.handle import StorageHandle
from underlay.mapping import Backing, Data, Eof, ShallowMapping, Special, Zero
from underlay.plugins import registry
from underlay.probing import VIEW_BYTES, ProbeView
from underlay.reading import Reader
from underlay.storage import AnyStorage, BlockingStorage, StorageOpenOptions
from underlay.targets import open_with
from underlay.testing.awaitable import AwaitableMemoryStorage
from underlay.testing.wrappers import AlignedStorage

__all__ = [
    "content_of",
    "files",
    "nothing_left_open",
    "other_storages",
    "place",
    "raises",
    "ranges",
    "view",
]


async def raises(
    kinds: type[BaseException] | tuple[type[BaseException], ...], call: Callable[[], object]
) -> None:
    """Call it, await what it gives, and insist on an exception of these kinds."""
    try:
        result = call()
        if isinstance(result, Awaitable):
            await result
    except kinds:
        return
    raise AssertionError(f"it was let through, and should have raised {kinds}")


async def other_storages(
    image: Path, *, writable: bool = False
) -> AsyncGenerator[AnyStorage, None]:
    """The bytes of an image on storages that are no plain file."""
    whole = image.read_bytes()

    async def make() -> AwaitableMemoryStorage:
        return AwaitableMemoryStorage(whole, writable=writable)

    yield await in_loop(home_loop(), make)
    options = StorageOpenOptions(name=os.fspath(image), writable=writable)
    handle = await open_with(registry().backend("file"), options)
    inner = cast("BlockingStorage", handle.storage)
    try:
        yield AlignedStorage(inner, request=4096, memory=512)
    finally:
        await handle.close()


def view(content: bytes) -> ProbeView:
    """What a driver sees of an object with these bytes."""
    return ProbeView(content[:VIEW_BYTES], content[-VIEW_BYTES:], len(content))


def ranges(size: int, *, seed: int = 0) -> list[tuple[int, int]]:
    """Offsets and lengths inside the disk."""
    dice = random.Random(seed)
    found = [(0, 1), (0, 512), (511, 2), (size - 1, 1), (0, size), (65_535, 65_538)]
    for _ in range(60):
        offset = dice.randrange(size)
        found.append((offset, dice.randrange(1, min(size - offset, 70_000) + 1)))
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder and below."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def nothing_left_open() -> Generator[None]:
    """Insist that as many descriptors are open afterwards, where the system can tell."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        yield
        return
    before = sorted(os.listdir(descriptors))
    yield
    assert sorted(os.listdir(descriptors)) == before, "a descriptor was left open"


def place(mapping: ShallowMapping) -> tuple[object, ...]:
    """Where a mapping leads, without how far."""
    if isinstance(mapping, Data):
        return "data", mapping.storage, mapping.offset, mapping.writable
    if isinstance(mapping, Backing):
        return "backing", mapping.layer, mapping.offset
    if isinstance(mapping, Special):
        return "special", mapping.storage, mapping.offset, mapping.host_length, mapping.skip
    return (type(mapping),)


async def content_of(mapping: ShallowMapping) -> bytes:
    """The bytes that a mapping leads to, got without the core's reader where that is possible."""
    if isinstance(mapping, Zero):
        return bytes(mapping.length)
    if isinstance(mapping, Backing):
        below = bytearray(mapping.length)
        await Reader(mapping.layer).readv((memoryview(below),), mapping.offset)
        return bytes(below)
    assert not isinstance(mapping, Eof)
    storage: StorageHandle = mapping.storage
    if isinstance(mapping, Data):
        return bytes(await storage.read_bytes(mapping.offset, mapping.length))
    raw = await storage.read_bytes(mapping.offset, mapping.host_length)
    unit = bytearray(mapping.unit)
    mapping.layer.decode(mapping.host_length, memoryview(raw), memoryview(unit))
    assert mapping.skip + mapping.length <= mapping.unit
    return bytes(unit[mapping.skip : mapping.skip + mapping.length])
