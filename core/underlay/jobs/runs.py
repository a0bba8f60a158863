"""A disk as runs: what a job has to fetch, and where from."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import NamedTuple, TypeAlias

import attrs

from underlay.driver import FormatDriverInstance
from underlay.face import run_blocking
from underlay.handle import StorageHandle
from underlay.mapping import Backing, Data, ShallowMapping, Special, Zero
from underlay.reading import Reader
from underlay.sync import SyncFormatAccess

__all__ = ["Run", "runs"]

#: How many runs are looked up at a time: entering the core once for each would cost more than the
#: rest, and for too many of them no worker would get the interpreter.
_BATCH = 128

#: Guest offset, mapping, depth, image, and whether the image below has ended.
_Found: TypeAlias = "tuple[int, ShallowMapping, int, FormatDriverInstance, bool]"


class Run(NamedTuple):
    """Guest bytes that are plain host bytes, a part of one encoded unit, or zeroes."""

    #: Guest bytes.
    start: int
    length: int
    #: None for zeroes.
    storage: StorageHandle | None = None
    #: The host offset of plain bytes; in an encoded unit, the decoded bytes to skip.
    offset: int = 0
    special: Special[StorageHandle] | None = None
    #: Nothing of the disk's own: its backing image shows through. Only in a shallow walk.
    below: bool = False

    @property
    def end(self) -> int:
        """The guest offset after the last byte."""
        return self.start + self.length

    def part(self, start: int, length: int) -> Run:
        """``length`` bytes of the run from guest offset ``start`` on."""
        offset = self.offset + start - self.start
        return Run(start, length, self.storage, offset, self.special, self.below)


def runs(
    disk: SyncFormatAccess, start: int, length: int, *, shallow: bool = False
) -> Generator[Run, None, None]:
    """The runs of a range, in order and without gaps, through all backing images.

    With ``shallow``, what shows through from a backing image is a run ``below``.

    Raises:
        CorruptImageError: the tables make no sense; what lies before that was yielded.
    """
    found = (_walk_one if shallow else _walk_all)(disk.inner, start, length)
    try:
        while True:
            batch: list[Run] = []
            try:
                run_blocking(_take(found, batch))
            finally:
                yield from batch
            if len(batch) < _BATCH:
                return
    finally:
        run_blocking(found.aclose())


def _walk_all(
    driver: FormatDriverInstance, start: int, length: int
) -> AsyncGenerator[_Found, None]:
    return Reader(driver).walk(start, length)


async def _walk_one(
    driver: FormatDriverInstance, start: int, length: int
) -> AsyncGenerator[_Found, None]:
    """As ``Reader.walk``, and no deeper than the first image."""
    async for mapping in driver.iter_mappings(start, length):
        if not isinstance(mapping, Backing):
            yield start, mapping, 0, driver, False
            start += mapping.length
            continue
        present = min(max(mapping.layer.size() - mapping.offset, 0), mapping.length)
        if present:
            yield start, attrs.evolve(mapping, length=present), 0, driver, False
        if present < mapping.length:
            yield start + present, Zero(mapping.length - present, explicit=False), 1, driver, True
        start += mapping.length


async def _take(found: AsyncGenerator[_Found, None], batch: list[Run]) -> None:
    """Fill a batch, or as much of it as there still is."""
    async for at, mapping, _, driver, _ in found:
        if isinstance(mapping, Special):
            batch.append(Run(at, mapping.length, mapping.storage, mapping.skip, mapping))
        elif isinstance(mapping, Backing):
            batch.append(Run(at, mapping.length, below=True))
        elif not isinstance(mapping, Data):
            batch.append(Run(at, mapping.length))
        elif await driver.sparse_data():
            await _take_without_holes(at, mapping, batch)
        else:
            batch.append(Run(at, mapping.length, mapping.storage, mapping.offset))
        if len(batch) >= _BATCH:
            return


async def _take_without_holes(start: int, data: Data[StorageHandle], batch: list[Run]) -> None:
    """Plain data, with zeroes where its storage has holes or has ended."""
    storage, offset, end = data.storage, data.offset, data.offset + data.length
    while offset < end:
        length, is_data = end - offset, False
        if offset < storage.size():
            extent = await storage.extent_at(offset)
            length, is_data = min(extent.length or length, length), extent.is_data
        batch.append(Run(start, length, storage, offset) if is_data else Run(start, length))
        start += length
        offset += length
