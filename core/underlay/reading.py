"""Reading a disk: following mappings down the chain, and fetching what they point to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import attrs

from underlay.buffers import fill_zero, split_at, total
from underlay.driver import FormatDriverInstance
from underlay.face import gather, in_worker
from underlay.handle import StorageHandle
from underlay.mapping import Backing, Data, DiskExtent, Eof, ShallowMapping, Special, Zero

__all__ = ["Reader", "bare", "resolve"]


async def resolve(
    driver: FormatDriverInstance, offset: int, length: int
) -> tuple[Data[StorageHandle] | Zero | Special[StorageHandle] | Eof, int]:
    """What the guest bytes from ``offset`` on are, through all backing images, and at which depth.

    The mapping is no longer than ``length``. A loop, since a chain may be hundreds of images deep.
    """
    depth = 0
    while True:
        mapping = await driver.get_mapping(offset, length)
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
    if isinstance(mapping, Data | Special):
        return attrs.evolve(mapping, storage=mapping.storage.storage)  # type: ignore[arg-type]
    return mapping


class Reader:
    """Reads through one driver and everything below it."""

    __slots__ = ("_decoded", "driver")

    def __init__(self, driver: FormatDriverInstance) -> None:
        self.driver = driver
        #: The last unit that was decoded: (storage, host offset, host length), and its bytes. Small
        #: sequential reads of compressed data would otherwise decode each unit again and again. Kept
        #: only where mappings never move. Replaced whole, so threads need no lock.
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
                chunks.append(partial(self._fetch, mapping, here))
            else:
                await self._fetch(mapping, here)
            offset += mapping.length
            length -= mapping.length
        await gather(parallel, chunks)

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

    async def extents(self, offset: int, length: int) -> AsyncIterator[DiskExtent]:
        """The range, run by run, through the whole chain; stops at the end of the disk."""
        async for start, mapping, depth, driver, past in self._walk(offset, length):
            if isinstance(mapping, Data) and await driver.sparse_data():
                async for extent in self._split_holes(start, mapping, depth):
                    yield extent
            else:
                yield DiskExtent(
                    start=start,
                    length=mapping.length,
                    depth=depth,
                    mapping=bare(mapping),
                    past_backing=past,
                )

    async def _walk(
        self, offset: int, length: int
    ) -> AsyncIterator[
        tuple[
            int,
            Data[StorageHandle] | Zero | Special[StorageHandle],
            int,
            FormatDriverInstance,
            bool,
        ]
    ]:
        """Guest offset, mapping, depth, driver, and whether its backing image ended before."""
        end = min(offset + length, self.driver.size())
        # One entry for each image that is being walked, the deepest last: its mappings, and the
        # offset at which the image above takes over again.
        stack: list[tuple[FormatDriverInstance, AsyncIterator[ShallowMapping], int]] = []
        if offset < end:
            stack.append((self.driver, self.driver.iter_mappings(offset, end - offset), end))
        while stack:
            driver, mappings, until = stack[-1]
            mapping = await anext(mappings, None)
            if mapping is None or isinstance(mapping, Eof):
                stack.pop()
                if offset < until:  # the image ended before the one above it
                    yield offset, Zero(until - offset, explicit=False), len(stack), driver, True
                    offset = until
            elif isinstance(mapping, Backing):
                layer = mapping.layer
                stack.append(
                    (
                        layer,
                        layer.iter_mappings(mapping.offset, mapping.length),
                        offset + mapping.length,
                    )
                )
            else:
                yield offset, mapping, len(stack) - 1, driver, False
                offset += mapping.length

    @staticmethod
    async def _split_holes(
        start: int, mapping: Data[StorageHandle], depth: int
    ) -> AsyncIterator[DiskExtent]:
        done = 0
        while done < mapping.length:
            extent = await mapping.storage.extent_at(mapping.offset + done)
            length = min(extent.length, mapping.length - done) or mapping.length - done
            yield DiskExtent(
                start=start + done,
                length=length,
                depth=depth,
                mapping=Data(
                    mapping.storage.storage, mapping.offset + done, length, mapping.writable
                ),
                hole=not extent.is_data,
            )
            done += length
