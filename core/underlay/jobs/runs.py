"""A disk as runs: what a job has to fetch, and where from."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import NamedTuple

from underlay.face import run_blocking
from underlay.handle import StorageHandle
from underlay.mapping import Backing, Data, Special
from underlay.reading import MappedRun, Reader
from underlay.sync import SyncFormatAccess
from underlay.time_limit import check_time

__all__ = ["Run", "runs"]

#: How many runs are looked up at a time: entering the core once for each would cost more than the
#: rest, and for too many of them no worker would get the interpreter.
_BATCH = 128


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
    #: An image below those that were walked shows through. Only where not all are.
    below: bool = False
    #: No image says anything of the range, so that it would show any other image laid below.
    nowhere: bool = False

    @property
    def end(self) -> int:
        """The guest offset after the last byte."""
        return self.start + self.length

    def part(self, start: int, length: int) -> Run:
        """``length`` bytes of the run from guest offset ``start`` on."""
        offset = self.offset + start - self.start
        return Run(start, length, self.storage, offset, self.special, self.below, self.nowhere)


def runs(
    disk: SyncFormatAccess, start: int, length: int, *, layers: int | None = None
) -> Generator[Run, None, None]:
    """The runs of a range, in order and without gaps, through all backing images.

    With ``layers``, what the first so many images of the chain do not have is a run ``below``.

    Raises:
        CorruptImageError: the tables make no sense; what lies before that was yielded.
    """
    found = Reader(disk.inner).walk(start, length, layers=layers)
    try:
        while True:
            check_time()
            batch: list[Run] = []
            try:
                run_blocking(_take(found, batch))
            finally:
                yield from batch
            if len(batch) < _BATCH:
                return
    finally:
        run_blocking(found.aclose())


async def _take(found: AsyncGenerator[MappedRun, None], batch: list[Run]) -> None:
    """Fill a batch, or as much of it as there still is."""
    async for at, mapping, _, driver, _ in found:
        if isinstance(mapping, Special):
            batch.append(Run(at, mapping.length, mapping.storage, mapping.skip, mapping))
        elif isinstance(mapping, Backing):
            batch.append(Run(at, mapping.length, below=True))
        elif not isinstance(mapping, Data):
            batch.append(Run(at, mapping.length, nowhere=not mapping.explicit))
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
