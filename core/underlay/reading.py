"""Reading a disk: following mappings down the chain, and fetching what they point to."""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    Sequence,
)
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import attrs

from underlay.buffers import fill_zero, split_at, total
from underlay.driver import FormatDriverInstance
from underlay.face import gather, in_worker
from underlay.handle import StorageHandle
from underlay.mapping import Backing, Data, DiskExtent, Eof, ShallowMapping, Special, Zero

__all__ = ["PART", "MappedRun", "Reader", "bare", "resolve"]

#: How many bytes of one request a parallel task takes.
PART = 1 << 20

_Found: TypeAlias = "Data[StorageHandle] | Zero | Backing | Special[StorageHandle]"


async def resolve(
    driver: FormatDriverInstance, offset: int, length: int
) -> tuple[Data[StorageHandle] | Zero | Special[StorageHandle] | Eof, int]:
    """What the guest bytes from ``offset`` on are, through all backing images, and at which depth.

    The mapping is no longer than ``length``. A loop, since a chain may be hundreds of images deep.
    """
    depth = 0
    while True:
        mapping = await driver.get_mapping(offset, length)
        _check_length(mapping, driver)
        if not isinstance(mapping, Backing):
            if mapping.length > length:
                mapping = attrs.evolve(mapping, length=length)
            return mapping, depth
        driver, offset, length = mapping.layer, mapping.offset, min(length, mapping.length)
        depth += 1
        present = driver.size() - offset
        if present <= 0:
            return Zero(length, explicit=False), depth
        length = min(length, present)


def bare(
    mapping: Data[StorageHandle] | Zero | Special[StorageHandle] | Eof,
) -> Data[Any] | Zero | Special[Any] | Eof:
    """The mapping for callers: with the storage itself in place of our handle on it."""
    if isinstance(mapping, Data):
        handle = mapping.storage
        writable = mapping.writable and handle.bypassable
        return Data(handle.storage, mapping.offset, mapping.length, writable)
    if isinstance(mapping, Special):
        return attrs.evolve(mapping, storage=mapping.storage.storage)  # type: ignore[arg-type]
    return mapping


class Reader:
    """Reads through one driver and everything below it."""

    __slots__ = ("_decoded", "driver")

    def __init__(self, driver: FormatDriverInstance) -> None:
        self.driver = driver
        #: The last unit that was decoded: (storage, host offset, host length), and its bytes. Small
        #: sequential reads of compressed data would otherwise decode each unit again and again.
        #: Kept only where mappings never move. Replaced whole, so threads need no lock.
        self._decoded: tuple[tuple[StorageHandle, int, int], bytearray] | None = None

    async def readv(self, views: Sequence[memoryview], offset: int, *, parallel: int = 1) -> None:
        """Fill flat views with guest bytes; zeroes past the end of the disk."""
        wanted = total(views)
        length = max(0, min(wanted, self.driver.size() - offset))
        inside, past = split_at(views, length)
        fill_zero(past)
        chunks: list[Callable[[], Coroutine[Any, Any, None]]] = []
        while length:
            mapping, _ = await resolve(self.driver, offset, length)
            if isinstance(mapping, Eof):
                fill_zero(inside)
                break
            here, inside = split_at(inside, mapping.length)
            if isinstance(mapping, Zero):
                fill_zero(here)
            elif parallel > 1:
                chunks += self._parts(mapping, here)
            else:
                await self._fetch(mapping, here)
            offset += mapping.length
            length -= mapping.length
        await gather(parallel, chunks)

    def _parts(
        self, mapping: Data[StorageHandle] | Special[StorageHandle], views: list[memoryview]
    ) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        """What one task fetches at a time: plain data in pieces, for it may be long."""
        if isinstance(mapping, Special):
            return [partial(self._fetch, mapping, views)]
        parts: list[Callable[[], Coroutine[Any, Any, None]]] = []
        at = mapping.offset
        while views:
            here, views = split_at(views, PART)
            parts.append(partial(mapping.storage.readv, here, at))
            at += total(here)
        return parts

    async def _fetch(
        self, mapping: Data[StorageHandle] | Special[StorageHandle], views: list[memoryview]
    ) -> None:
        if isinstance(mapping, Data):
            await mapping.storage.readv(views, mapping.offset)
            return
        unit = await self._decode(mapping)
        at = mapping.skip
        for view in views:
            view[:] = memoryview(unit)[at : at + len(view)]
            at += len(view)

    async def _decode(self, special: Special[StorageHandle]) -> bytearray:
        key = (special.storage, special.offset, special.host_length)
        decoded = self._decoded
        if decoded is not None and decoded[0] == key:
            return decoded[1]
        raw = await special.storage.read_bytes(special.offset, special.host_length)
        out = bytearray(special.unit)
        await in_worker(special.layer.decode, special.host_length, memoryview(raw), memoryview(out))
        if special.layer.leases() is None:
            self._decoded = (key, out)
        return out

    def forget(self) -> None:
        """Drop what is remembered of the image."""
        self._decoded = None

    async def extents(self, offset: int, length: int) -> AsyncGenerator[DiskExtent, None]:
        """The range, run by run, through the whole chain; stops at the end of the disk."""
        runs = self.walk(offset, length)
        async with aclosing(runs):
            async for run in runs:
                mapping = run.mapping
                assert not isinstance(mapping, Backing)  # all of the chain is walked
                if isinstance(mapping, Data) and await run.driver.sparse_data():
                    async for extent in _split_holes(run.start, mapping, run.depth):
                        yield extent
                else:
                    yield DiskExtent(
                        start=run.start,
                        length=mapping.length,
                        depth=run.depth,
                        mapping=bare(mapping),
                        past_backing=run.past_backing,
                    )

    async def walk(
        self, offset: int, length: int, *, layers: int | None = None
    ) -> AsyncGenerator[MappedRun, None]:
        """As ``extents``, for bulk work: with our handles on the storages, holes not looked for.

        With ``layers``, no deeper than that many images: what lies below stays ``Backing``.
        """
        end = min(offset + length, self.driver.size())
        #: One for each image that is being walked, the deepest last.
        stack: list[_Walked] = []
        if offset < end:
            mappings = self.driver.iter_mappings(offset, end - offset)
            stack.append(_Walked(self.driver, mappings, end, offset, None))
        try:
            while stack:
                driver, mappings, until, _, _ = stack[-1]
                depth = len(stack) - 1
                below: Backing | None = None
                # An image is left for the one below it, and then gone on with.
                async for found in mappings:
                    if offset == until or isinstance(found, Eof):
                        break
                    mapping = _at_most(found, until - offset, driver)
                    if not isinstance(mapping, Backing):
                        yield MappedRun(offset, mapping, depth, driver)
                    elif len(stack) == layers:
                        for run in _not_walked(offset, mapping, depth, driver):
                            yield run
                    else:
                        below = mapping
                        break
                    offset += mapping.length
                if below is not None:
                    stack.append(_Walked.of(below, offset))
                    continue
                ended = stack.pop()
                await _close([ended])
                if offset < until and stack:
                    yield MappedRun(offset, ended.missing(offset), depth, driver, past_backing=True)
                    offset = until
        finally:
            await _close(stack)


class _Walked(NamedTuple):
    """An image that is being walked."""

    driver: FormatDriverInstance
    mappings: AsyncIterator[ShallowMapping]
    #: The guest offset at which the image above takes over again.
    until: int
    #: Where it took over from that one, and how much of its own that one keeps for the range.
    since: int
    reserved: int | None

    @classmethod
    def of(cls, below: Backing, offset: int) -> _Walked:
        """The image below, which shows through from a guest offset on."""
        mappings = below.layer.iter_mappings(below.offset, below.length)
        return cls(below.layer, mappings, offset + below.length, offset, below.reserved)

    def missing(self, offset: int) -> Zero:
        """What is there where it has ended before the image above it."""
        reserved = None if self.reserved is None else self.reserved + offset - self.since
        return Zero(self.until - offset, explicit=False, offset=reserved)


class MappedRun(NamedTuple):
    """A mapping with the guest offset, the depth and the image that it was found at.

    A tuple, since a walk makes one for every encoded unit of a disk.
    """

    start: int
    mapping: _Found
    depth: int
    driver: FormatDriverInstance
    past_backing: bool = False


def _not_walked(
    offset: int, below: Backing, depth: int, driver: FormatDriverInstance
) -> Iterator[MappedRun]:
    """What shows through from an image that is not walked, and zeroes where that one has ended."""
    present = min(max(below.layer.size() - below.offset, 0), below.length)
    if present:
        yield MappedRun(offset, attrs.evolve(below, length=present), depth, driver)
    if present < below.length:
        zero = Zero(below.length - present, explicit=False)
        yield MappedRun(offset + present, zero, depth + 1, driver, past_backing=True)


async def _split_holes(
    start: int, mapping: Data[StorageHandle], depth: int
) -> AsyncIterator[DiskExtent]:
    """Plain data cut where holes of its storage begin and end; past its end all is a hole."""
    storage = mapping.storage
    done = 0
    while done < mapping.length:
        length, hole = mapping.length - done, True
        if mapping.offset + done < storage.size():
            extent = await storage.extent_at(mapping.offset + done)
            length, hole = min(extent.length or length, length), not extent.is_data
        yield DiskExtent(
            start=start + done,
            length=length,
            depth=depth,
            mapping=bare(Data(storage, mapping.offset + done, length, mapping.writable)),
            hole=hole,
        )
        done += length


async def _close(stack: Sequence[_Walked]) -> None:
    for _, mappings, *_ in stack:
        if isinstance(mappings, AsyncGenerator):
            await mappings.aclose()


def _at_most(mapping: _Found, length: int, driver: FormatDriverInstance) -> _Found:
    """A mapping that ends after ``length`` bytes at the latest."""
    if 0 < mapping.length <= length:
        return mapping
    _check_length(mapping, driver)
    return attrs.evolve(mapping, length=length)


def _check_length(mapping: ShallowMapping, driver: FormatDriverInstance) -> None:
    if mapping.length <= 0 and not isinstance(mapping, Eof):
        raise RuntimeError(f"the {driver.format_name} driver answered with an empty mapping")
