"""Keeping dirty bitmaps true while guest data changes.

Before the first change the enabled bitmaps are marked as in use: what the image holds of them is
out of date from then on, and whoever finds it so after a crash knows. Meanwhile what is written is
remembered here, in little memory; since nobody believes what is in the image, it may be written
there in place. When the image is closed, or its bitmaps are to be changed, all of that is brought
to the disk, and only then the marks go.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import attrs

from underlay.errors import (
    CorruptImageError,
    LimitExceededError,
    UnderlayError,
    UnsupportedOperationError,
)
from underlay.face import to_the_end
from underlay.locks import Lock
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.bitmap_data import BitmapShape, load_bitmap_table, ranges_from
from underlay_drivers.qcow2.bitmap_writing import changing_from, write_field
from underlay_drivers.qcow2.tables import packed
from underlay_drivers.qcow2.tracked_bitmap import TrackedBitmap

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from underlay.capabilities import DirtyRanges
    from underlay.limits import Limits
    from underlay_drivers.qcow2.bitmaps import BitmapDirectory, BitmapEntry
    from underlay_drivers.qcow2.dirty import Freed
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["Tracking"]

#: Bits are remembered in pieces of this many bytes, those of small clusters in smaller ones.
_PIECE_BITS: Final = 12
#: Bytes of them beyond which they are written to the image before more is written.
_MEMORY: Final = 16 << 20

#: Why a bitmap cannot be kept true.
_UNUSABLE: Final = (CorruptImageError, LimitExceededError, UnsupportedOperationError)


class Tracking:
    """The bitmaps of one image whose guest data may be changed."""

    __slots__ = (
        "_directory",
        "_limits",
        "_lock",
        "_recording",
        "_table_bytes",
        "_tracked",
        "_writer",
    )

    def __init__(self, writer: ImageWriter, limits: Limits, directory: BitmapDirectory) -> None:
        self._writer = writer
        self._limits = limits
        #: As it is on disk.
        self._directory = directory
        self._tracked: dict[bytes, TrackedBitmap] = {}
        self._recording: tuple[TrackedBitmap, ...] = ()
        #: What the tables in memory take.
        self._table_bytes = 0
        #: Held by one who writes bits to the image.
        self._lock = Lock()

    @classmethod
    async def of(cls, writer: ImageWriter, limits: Limits) -> Tracking | None:
        """For this image; None where it has no bitmaps, or such as make no sense."""
        try:
            directory = await writer.disk.directory.read(writer.disk)
        except _UNUSABLE:
            return None
        return cls(writer, limits, directory) if directory.entries else None

    async def start(self) -> bool:
        """Begin to record; False where there is a bitmap that nobody can keep true.

        The writer's already, since others may look at the bitmaps meanwhile.
        """
        try:
            await self._take_enabled()
        except _UNUSABLE:
            return False
        return True

    @property
    def recording(self) -> bool:
        """Whether each write must be told of."""
        return bool(self._recording)

    @property
    def too_large(self) -> bool:
        """Whether so much is remembered that it has to go to the image."""
        pieces = sum(len(one.marked) << one.piece_bits for one in self._recording)
        return pieces > _MEMORY

    def mark(self, start: int, end: int) -> None:
        """Guest bytes ``start`` to ``end`` are about to be changed."""
        for one in self._recording:
            one.mark(start, end)

    def shown(self, entries: Sequence[BitmapEntry]) -> list[BitmapEntry]:
        """What the image's entries say, but that what is tracked here is well."""
        return [
            self._tracked[entry.name].entry if entry.name in self._tracked else entry
            for entry in entries
        ]

    # -- taking bitmaps in

    async def take_all(self) -> None:
        """Take in those that record nothing too: the disk's size is about to change.

        One that makes no sense stays in use, and so is lost.
        """
        marked = {number: entry.flags for number, entry in enumerate(self._directory.entries)}
        taken: list[TrackedBitmap] = []
        for number in self._free(range(len(self._directory.entries))):
            marked[number] |= layout.BITMAP_IN_USE
            with suppress(*_UNUSABLE):
                taken.append(await self._load(number))
        await self._take(taken, marked)

    async def _take_enabled(self) -> None:
        """Take in those that record guest writes.

        Raises:
            CorruptImageError, LimitExceededError, UnsupportedOperationError: one cannot be used.
        """
        enabled = [
            n for n, entry in enumerate(self._directory.entries) if entry.flags & layout.BITMAP_AUTO
        ]
        taken = [await self._load(number) for number in self._free(enabled)]
        await self._take(
            taken, {one.number: one.entry.flags | layout.BITMAP_IN_USE for one in taken}
        )

    def _free(self, numbers: Iterable[int]) -> list[int]:
        """Those that nobody has marked as in use."""
        return [n for n in numbers if not self._directory.entries[n].flags & layout.BITMAP_IN_USE]

    async def _take(self, taken: Sequence[TrackedBitmap], flags: Mapping[int, int]) -> None:
        await to_the_end(self._mark_and_take(taken, flags))

    async def _mark_and_take(
        self, taken: Sequence[TrackedBitmap], flags: Mapping[int, int]
    ) -> None:
        for one in taken:
            self._tracked[one.entry.name] = one
        try:
            await self._write_flags(flags)
        except BaseException:
            for one in taken:
                del self._tracked[one.entry.name]
            raise
        self._recording = tuple(one for one in self._tracked.values() if one.recording)

    async def _load(self, number: int) -> TrackedBitmap:
        entry = self._directory.entries[number].usable()
        disk, allocator = self._writer.disk, self._writer.allocator
        shape = BitmapShape.of(disk.header, entry.granularity_bits)
        shape.check(disk.image, entry)
        self._table_bytes += entry.bitmap_table_size * 8
        what = f"'{disk.image.name()}': the size of the tables of its bitmaps"
        self._limits.check("metadata", self._table_bytes, what=what)
        table = await load_bitmap_table(disk.image, disk.header, entry, self._limits)
        for word in table:
            host = word & layout.HOST_OFFSET
            if host and (host in allocator.metadata or await allocator.refcount(host) != 1):
                raise CorruptImageError(
                    f"'{disk.image.name()}': the bits of a bitmap at {host:#x} are not its own",
                    offset=host,
                    field="bitmap table entry",
                    value=word,
                )
        piece_bits = min(_PIECE_BITS, disk.geometry.cluster_bits)
        return TrackedBitmap(
            writer=self._writer,
            number=number,
            entry=entry,
            shape=shape,
            table=table,
            piece_bits=piece_bits,
        )

    async def _write_flags(self, flags: Mapping[int, int]) -> None:
        """Change the flags of directory entries, durably."""
        entries = self._directory.entries
        changed = {n: value for n, value in flags.items() if value != entries[n].flags}
        if changed:
            self._directory = await write_field(self._writer, self._directory, "flags", changed)

    async def survives(self) -> bool:
        """Whether all is as we left it, now that the image has been read anew."""
        if any(one.changed for one in self._tracked.values()):
            return False  # what the tables lead to is forgotten
        try:
            directory = await self._writer.disk.directory.read(self._writer.disk)
        except (CorruptImageError, LimitExceededError):
            return False
        return directory.entries == self._directory.entries

    # -- to the disk

    async def spill(self) -> None:
        """Bring to the image what takes memory. The bitmaps stay in use."""
        async with self._writer.nobody_alone(), self._lock:
            if self._writer.tracking is not self:
                return  # all of it has been stored meanwhile
            for one in self._recording:
                await one.write_out()

    async def dirty_ranges(self, name: str, offset: int) -> DirtyRanges | None:
        """See ``BitmapStore.dirty_ranges``; None if it is as the image says."""
        one = self._tracked.get(name.encode("utf-8", "surrogateescape"))
        if one is None:
            return None
        async with self._writer.nobody_alone(), self._lock:
            if self._writer.tracking is not self:
                return None
            await one.write_out()
            return await ranges_from(self._writer.disk.image, one.table, one.shape, offset)

    async def store(self) -> bool:
        """Bring all to the image, and let the bitmaps be what they say again.

        By one who is alone with the image, and then begins anew with another ``Tracking``. Whether
        something was let go, which a flush and a sync free.
        """
        tracked = list(self._tracked.values())
        if not tracked:
            return False
        back = self._writer.back
        async with self._lock:
            for one in tracked:
                await one.write_out()
            if any(len(one.table) != one.entry.bitmap_table_size for one in tracked):
                await self._list_anew(tracked)
                return True
            await back.flush()
            await back.sync()
            await self._write_tables([one for one in tracked if one.changed])
            await self._write_flags({one.number: one.entry.flags for one in tracked})
        return False

    async def _write_tables(self, changed: Sequence[TrackedBitmap]) -> None:
        """Bring changed tables to where they were, durably."""
        image = self._writer.disk.image
        try:
            for one in changed:
                await image.write(packed(one.table), one.entry.bitmap_table_offset)
            if changed:
                await image.sync()
        except UnderlayError as error:
            self._writer.back.give_up("a bitmap table could not be written", error)
            raise

    async def _list_anew(self, tracked: Sequence[TrackedBitmap]) -> None:
        """Tables of other lengths: a new directory leads to them."""
        entries = list(self._directory.entries)
        freed: list[Freed] = []
        async with changing_from(self._writer, self._limits, self._directory) as change:
            for one in tracked:
                if one.shape.length > layout.BITMAP_BYTES_MAX:
                    continue  # the disk has become too large for it: it stays as one that is lost
                old = one.entry.bitmap_table_offset
                clusters = self._writer.clusters(one.entry.bitmap_table_size * 8)
                freed += [(old, clusters), *one.freed]
                entries[one.number] = attrs.evolve(
                    one.entry,
                    bitmap_table_offset=await change.write_table(one.table),
                    bitmap_table_size=len(one.table),
                )
            await change.list(entries, freed)
