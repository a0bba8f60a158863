"""Keeping dirty bitmaps true while guest data changes.

Before the first change the enabled bitmaps are marked as in use: what the image holds of them is
out of date from then on, and whoever finds it so after a crash knows. Meanwhile what is written is
remembered here, in little memory; since nobody believes what is in the image, it may be written
there in place. When the image is closed, or its bitmaps are to be changed, all of that is brought
to the disk, and only then the marks go.
"""

from __future__ import annotations

from array import array
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeAlias

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
from underlay_drivers.qcow2.bitmap_changes import BitmapChange
from underlay_drivers.qcow2.bitmap_data import (
    BitmapShape,
    load_bitmap_table,
    ranges_from,
    set_bits,
)
from underlay_drivers.qcow2.bitmaps import BitmapEntry, read_bitmaps
from underlay_drivers.qcow2.tables import Table, packed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from underlay.capabilities import DirtyRanges
    from underlay.limits import Limits
    from underlay_drivers.qcow2.dirty import Freed
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["Tracking"]

#: Bits are remembered in pieces of this many bytes, those of small clusters in smaller ones.
_PIECE_BITS: Final = 12
#: Bytes of them beyond which they are written to the image before more is written.
_MEMORY: Final = 16 << 20

#: Why a bitmap cannot be kept true.
_UNUSABLE: Final = (CorruptImageError, LimitExceededError, UnsupportedOperationError)

#: The new bits of one piece.
Piece: TypeAlias = "bytes | bytearray"


@attrs.define(kw_only=True)
class _Tracked:
    """One bitmap that is marked as in use, by us."""

    #: In the directory.
    number: int
    #: As it was before that.
    entry: BitmapEntry
    #: What the table fits.
    shape: BitmapShape
    table: Table
    #: Bytes of a piece, as a power of two.
    piece_bits: int
    #: Bits that were set since the image was last written, by the number of their piece.
    marked: dict[int, Piece] = attrs.field(factory=dict[int, "Piece"])
    #: Clusters that it needs no longer.
    freed: list[Freed] = attrs.field(factory=list["Freed"])
    #: Whether the table is not the one on disk any more.
    changed: bool = False

    @property
    def recording(self) -> bool:
        """Whether guest writes are to be seen in it."""
        return bool(self.entry.flags & layout.BITMAP_AUTO)

    def mark(self, start: int, end: int) -> None:
        """Guest bytes ``start`` to ``end`` are changed."""
        shift = self.piece_bits + 3
        granularity = self.shape.granularity_bits
        bit, last = start >> granularity, (end - 1 >> granularity) + 1
        marked = self.marked
        while bit < last:
            number = bit >> shift
            base = number << shift
            stop = min(last, base + (1 << shift))
            piece = marked.get(number)
            if stop - bit == 1 << shift:
                marked[number] = _full(1 << self.piece_bits)
            elif piece is None:
                piece = marked[number] = bytearray(1 << self.piece_bits)
                set_bits(piece, bit - base, stop - base)
            elif isinstance(piece, bytearray):
                set_bits(piece, bit - base, stop - base)
            bit = stop


_FULL: dict[int, bytes] = {}


def _full(length: int) -> bytes:
    """The one object that stands for a piece of ones."""
    return _FULL.setdefault(length, b"\xff" * length)


class Tracking:
    """The bitmaps of one image whose guest data may be changed."""

    __slots__ = (
        "_entries",
        "_limits",
        "_lock",
        "_recording",
        "_table_bytes",
        "_tracked",
        "_writer",
    )

    def __init__(
        self, writer: ImageWriter, limits: Limits, entries: tuple[BitmapEntry, ...]
    ) -> None:
        self._writer = writer
        self._limits = limits
        #: As they are on disk.
        self._entries = entries
        self._tracked: dict[bytes, _Tracked] = {}
        self._recording: tuple[_Tracked, ...] = ()
        #: What the tables in memory take.
        self._table_bytes = 0
        #: Held by one who writes bits to the image.
        self._lock = Lock()

    @classmethod
    async def of(cls, writer: ImageWriter, limits: Limits) -> Tracking | None:
        """For this image; None where it has no bitmaps, or such as make no sense."""
        disk = writer.disk
        try:
            entries = await read_bitmaps(disk.image, disk.header, limits)
        except _UNUSABLE:
            return None
        return cls(writer, limits, entries) if entries else None

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
        marked = {number: entry.flags for number, entry in enumerate(self._entries)}
        taken: list[_Tracked] = []
        for number in self._free(range(len(self._entries))):
            marked[number] |= layout.BITMAP_IN_USE
            with suppress(*_UNUSABLE):
                taken.append(await self._load(number))
        await self._take(taken, marked)

    async def _take_enabled(self) -> None:
        """Take in those that record guest writes.

        Raises:
            CorruptImageError, LimitExceededError, UnsupportedOperationError: one cannot be used.
        """
        enabled = [n for n, entry in enumerate(self._entries) if entry.flags & layout.BITMAP_AUTO]
        taken = [await self._load(number) for number in self._free(enabled)]
        await self._take(
            taken, {one.number: one.entry.flags | layout.BITMAP_IN_USE for one in taken}
        )

    def _free(self, numbers: Iterable[int]) -> list[int]:
        """Those that nobody has marked as in use."""
        return [n for n in numbers if not self._entries[n].flags & layout.BITMAP_IN_USE]

    async def _take(self, taken: Sequence[_Tracked], flags: Mapping[int, int]) -> None:
        await to_the_end(self._mark_and_take(taken, flags))

    async def _mark_and_take(self, taken: Sequence[_Tracked], flags: Mapping[int, int]) -> None:
        for one in taken:
            self._tracked[one.entry.name] = one
        try:
            await self._write_flags(flags)
        except BaseException:
            for one in taken:
                del self._tracked[one.entry.name]
            raise
        self._recording = tuple(one for one in self._tracked.values() if one.recording)

    async def _load(self, number: int) -> _Tracked:
        entry = self._entries[number].usable()
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
        return _Tracked(number=number, entry=entry, shape=shape, table=table, piece_bits=piece_bits)

    async def _write_flags(self, flags: Mapping[int, int]) -> None:
        """Change the flags of directory entries, durably."""
        image = self._writer.disk.image
        extension = self._writer.disk.header.bitmaps
        assert extension is not None
        entries = list(self._entries)
        places = [0]
        for entry in entries:
            places.append(places[-1] + len(entry.pack()))
        changed = [number for number in flags if flags[number] != entries[number].flags]
        try:
            for number in changed:
                at = extension.directory_offset + places[number] + layout.BITMAP_FLAGS_OFFSET
                await image.write(flags[number].to_bytes(4, "big"), at)
                entries[number] = attrs.evolve(entries[number], flags=flags[number])
            if changed:
                await image.sync()
        except BaseException as error:
            # Nobody knows what is marked, so no guest data may change any more.
            self._writer.back.give_up("the bitmap directory could not be written", error)
            raise
        self._entries = tuple(entries)

    async def survives(self) -> bool:
        """Whether all is as we left it, now that the image has been read anew."""
        if any(one.changed for one in self._tracked.values()):
            return False  # what the tables lead to is forgotten
        disk = self._writer.disk
        try:
            return await read_bitmaps(disk.image, disk.header, self._limits) == self._entries
        except (CorruptImageError, LimitExceededError):
            return False

    # -- to the disk

    async def spill(self) -> None:
        """Bring to the image what takes memory. The bitmaps stay in use."""
        async with self._writer.nobody_alone(), self._lock:
            if self._writer.tracking is not self:
                return  # all of it has been stored meanwhile
            for one in self._recording:
                await self._write_out(one)

    async def dirty_ranges(self, name: str, offset: int) -> DirtyRanges | None:
        """See ``BitmapStore.dirty_ranges``; None if it is as the image says."""
        one = self._tracked.get(name.encode("utf-8", "surrogateescape"))
        if one is None:
            return None
        async with self._writer.nobody_alone(), self._lock:
            if self._writer.tracking is not self:
                return None
            await self._write_out(one)
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
                await self._write_out(one)
            if any(len(one.table) != one.entry.bitmap_table_size for one in tracked):
                await self._list_anew(tracked)
                return True
            await back.flush()
            await back.sync()
            await self._write_tables([one for one in tracked if one.changed])
            await self._write_flags({one.number: one.entry.flags for one in tracked})
        return False

    async def _write_tables(self, changed: Sequence[_Tracked]) -> None:
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

    async def _list_anew(self, tracked: Sequence[_Tracked]) -> None:
        """Tables of other lengths: a new directory leads to them."""
        writer = self._writer
        change = BitmapChange(writer, self._limits, self._entries)
        try:
            await self._show_anew(change, tracked)
        except BaseException:
            if not writer.back.broken:
                await to_the_end(change.undo())
            raise

    async def _show_anew(self, change: BitmapChange, tracked: Sequence[_Tracked]) -> None:
        entries = list(self._entries)
        freed: list[Freed] = []
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

    async def _write_out(self, one: _Tracked) -> None:
        """Bring the new bits of a bitmap to the image."""
        await self._fit(one, self._writer.disk.header.size)
        marked, one.marked = one.marked, {}
        try:
            for number in sorted(marked):
                await self._write_piece(one, number, marked[number])
                del marked[number]
        except BaseException:
            for number, piece in marked.items():
                other = one.marked.get(number)
                one.marked[number] = piece if other is None else bytearray(_either(piece, other))
            raise

    async def _write_piece(self, one: _Tracked, number: int, piece: Piece) -> None:
        image = self._writer.disk.image
        start = number << one.piece_bits
        # The disk may have become smaller; what lies behind its end are zeroes.
        left = one.shape.bits - start * 8
        if left <= 0:
            return
        if left < len(piece) * 8:
            bits = int.from_bytes(piece, "little") & (1 << left) - 1
            piece = bits.to_bytes(len(piece), "little")
        cluster_bits = one.shape.cluster_bits
        page = start >> cluster_bits
        within = start - (page << cluster_bits)
        word = one.table[page]
        host = word & layout.HOST_OFFSET
        if host:
            old = bytes(await image.read_bytes(host + within, len(piece)))
            new = _either(old, piece)
            if new != old:
                await image.write(new, host + within)
        elif not word & layout.BITMAP_ONES:
            data = bytearray(1 << cluster_bits)
            data[within : within + len(piece)] = piece
            await self._write_page(one, page, data)

    async def _write_page(self, one: _Tracked, page: int, data: bytearray) -> None:
        """Give a cluster of bits its room."""
        writer = self._writer
        async with writer.back.lock:
            host, _ = await writer.allocator.allocate(1)
        try:
            await writer.disk.image.write(data, host)
        except BaseException:
            if not writer.back.broken:
                await to_the_end(self._give_back(host))
            raise
        one.table[page] = host
        one.changed = True

    async def _give_back(self, host: int) -> None:
        async with self._writer.back.lock:
            await self._writer.allocator.lower(host, 1)

    async def _fit(self, one: _Tracked, size: int) -> None:
        """Let the table be one for a disk of ``size`` bytes."""
        old = one.shape
        new = attrs.evolve(old, disk_size=size)
        if new.bits != old.bits:
            page, left = divmod(min(old.bits, new.bits), old.page_bits)
            if left:
                await self._cut(one, page, left)
            one.freed += [
                (word & layout.HOST_OFFSET, 1)
                for word in one.table[new.entries :]
                if word & layout.HOST_OFFSET
            ]
            one.changed = one.changed or new.entries != old.entries
            one.table = one.table[: new.entries]
            one.table.extend(array("Q", bytes(8 * (new.entries - len(one.table)))))
        one.shape = new

    async def _cut(self, one: _Tracked, page: int, left: int) -> None:
        """Let only the first bits of a cluster count."""
        image = self._writer.disk.image
        word = one.table[page]
        host = word & layout.HOST_OFFSET
        data = bytearray(1 << one.shape.cluster_bits)
        if word & layout.BITMAP_ONES and not host:
            set_bits(data, 0, left)
            await self._write_page(one, page, data)
        elif host:
            data[:] = await image.read_bytes(host, len(data))
            bits = int.from_bytes(data, "little") & (1 << left) - 1
            await image.write(bits.to_bytes(len(data), "little"), host)


def _either(first: Piece, second: Piece) -> bytes:
    """The bits of both."""
    both = int.from_bytes(first, "little") | int.from_bytes(second, "little")
    return both.to_bytes(len(second), "little")
