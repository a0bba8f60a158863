"""A part of a disk as a disk of its own: a partition, say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import ClassVar, Self

import attrs

from underlay.driver import (
    DetectZeroes,
    FormatDriverInstance,
    FormatOpenOptions,
    Location,
    WriteTicket,
)
from underlay.errors import OutOfRangeError, UnsupportedOperationError
from underlay.handle import StorageHandle
from underlay.lease import Leases
from underlay.mapping import Eof, ShallowMapping

__all__ = ["SliceDriver"]


class SliceDriver(FormatDriverInstance):
    """Shows ``length`` bytes of another driver's disk from ``offset`` on."""

    __slots__ = ("_length", "_offset", "_whole")

    format_name: ClassVar[str] = "slice"

    def __init__(self, whole: FormatDriverInstance, *, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > whole.size():
            raise OutOfRangeError(
                f"The {length} bytes at {offset} are not inside the disk of {whole.size()} bytes"
            )
        self._whole = whole
        self._offset = offset
        self._length = length

    @classmethod
    async def open(cls, options: FormatOpenOptions) -> Self:
        raise UnsupportedOperationError("A slice is made of an open disk, with disk.slice()")

    def size(self) -> int:
        # The disk may have been cut since.
        return max(0, min(self._length, self._whole.size() - self._offset))

    def writable(self) -> bool:
        return self._whole.writable()

    def detect_zeroes(self) -> DetectZeroes:
        return self._whole.detect_zeroes()

    def zero_granularity(self) -> int | None:
        return self._whole.zero_granularity()

    def collect_storage_dependencies(self) -> Sequence[StorageHandle]:
        # What the whole disk lies on has no place below a slice, so its storages count as ours.
        found: list[StorageHandle] = []
        layer: FormatDriverInstance | None = self._whole
        while layer is not None:
            found += layer.collect_storage_dependencies()
            layer = layer.backing()
        return found

    def leases(self) -> Leases | None:
        return self._whole.leases()

    async def sparse_data(self) -> bool:
        return await self._whole.sparse_data()

    def locate(self, offset: int) -> Location | None:
        left = self.size() - offset
        if offset < 0 or left <= 0:
            return None
        location = self._whole.locate(self._offset + offset)
        if location is None or location[2] <= left:
            return location
        return location[0], location[1], left, location[3]

    async def get_mapping(self, offset: int, max_length: int) -> ShallowMapping:
        left = self.size() - offset
        if left <= 0:
            return Eof()
        mapping = await self._whole.get_mapping(self._offset + offset, min(max_length, left))
        return mapping if mapping.length <= left else attrs.evolve(mapping, length=left)

    async def iter_mappings(self, offset: int, length: int) -> AsyncIterator[ShallowMapping]:
        length = min(length, self.size() - offset)
        if length > 0:
            async for mapping in self._whole.iter_mappings(self._offset + offset, length):
                yield mapping

    def backing(self) -> FormatDriverInstance | None:
        # Mappings of the backing image come back with offsets of the whole disk, which are right as
        # they are; the slice itself lies on nothing.
        return None

    async def begin_write(self, offset: int, length: int) -> WriteTicket:
        # The ticket keeps the whole disk's offsets: what surrounds the data may lie outside the
        # slice.
        return await self._whole.begin_write(self._offset + offset, length)

    def try_begin_write(self, offset: int, length: int) -> WriteTicket | None:
        return self._whole.try_begin_write(self._offset + offset, length)

    def try_commit_write(self, ticket: WriteTicket) -> bool:
        return self._whole.try_commit_write(ticket)

    async def commit_write(self, ticket: WriteTicket) -> None:
        await self._whole.commit_write(ticket)

    async def abort_write(self, ticket: WriteTicket) -> None:
        await self._whole.abort_write(ticket)

    async def ensure_data_mapping(
        self, offset: int, length: int, overwrite: bool
    ) -> tuple[StorageHandle, int, int]:
        return await self._whole.ensure_data_mapping(self._offset + offset, length, overwrite)

    async def ensure_zero_mapping(self, offset: int, length: int) -> tuple[int, int]:
        return self._shifted(await self._whole.ensure_zero_mapping(self._offset + offset, length))

    async def discard_to_zero(self, offset: int, length: int) -> tuple[int, int]:
        return self._shifted(await self._whole.discard_to_zero(self._offset + offset, length))

    async def discard_to_any(self, offset: int, length: int) -> tuple[int, int]:
        return self._shifted(await self._whole.discard_to_any(self._offset + offset, length))

    async def discard_to_backing(self, offset: int, length: int) -> tuple[int, int]:
        return self._shifted(await self._whole.discard_to_backing(self._offset + offset, length))

    def _shifted(self, done: tuple[int, int]) -> tuple[int, int]:
        return done[0] - self._offset, done[1]

    async def flush(self) -> None:
        await self._whole.flush()

    async def sync(self) -> None:
        await self._whole.sync()

    async def invalidate_cache(self) -> None:
        await self._whole.invalidate_cache()
