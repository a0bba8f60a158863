"""One dirty bitmap whose content changes: its new bits in little memory, and their way to the disk.

The image says that it is in use, so nobody believes what stands there, and it is written in place.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, TypeAlias

import attrs

from underlay.face import to_the_end
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.bitmap_data import BitmapShape, set_bits

if TYPE_CHECKING:
    from underlay_drivers.qcow2.bitmaps import BitmapEntry
    from underlay_drivers.qcow2.dirty import Freed
    from underlay_drivers.qcow2.tables import Table
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["TrackedBitmap"]

#: The new bits of one piece.
Piece: TypeAlias = "bytes | bytearray"


@attrs.define(kw_only=True)
class TrackedBitmap:
    """One bitmap that is marked as in use, by us."""

    writer: ImageWriter
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

    # -- to the disk

    async def write_out(self) -> None:
        """Bring the new bits of a bitmap to the image."""
        await self._fit(self.writer.disk.header.size)
        marked, self.marked = self.marked, {}
        try:
            for number in sorted(marked):
                await self._write_piece(number, marked[number])
                del marked[number]
        except BaseException:
            for number, piece in marked.items():
                other = self.marked.get(number)
                self.marked[number] = piece if other is None else bytearray(_either(piece, other))
            raise

    async def _write_piece(self, number: int, piece: Piece) -> None:
        image = self.writer.disk.image
        start = number << self.piece_bits
        # The disk may have become smaller; what lies behind its end are zeroes.
        left = self.shape.bits - start * 8
        if left <= 0:
            return
        if left < len(piece) * 8:
            bits = int.from_bytes(piece, "little") & (1 << left) - 1
            piece = bits.to_bytes(len(piece), "little")
        cluster_bits = self.shape.cluster_bits
        page = start >> cluster_bits
        within = start - (page << cluster_bits)
        word = self.table[page]
        host = word & layout.HOST_OFFSET
        if host:
            old = bytes(await image.read_bytes(host + within, len(piece)))
            new = _either(old, piece)
            if new != old:
                await image.write(new, host + within)
        elif not word & layout.BITMAP_ONES:
            data = bytearray(1 << cluster_bits)
            data[within : within + len(piece)] = piece
            await self._write_page(page, data)

    async def _write_page(self, page: int, data: bytearray) -> None:
        """Give a cluster of bits its room."""
        writer = self.writer
        async with writer.back.lock:
            host, _ = await writer.allocator.allocate(1)
        try:
            await writer.disk.image.write(data, host)
        except BaseException:
            if not writer.back.broken:
                await to_the_end(self._give_back(host))
            raise
        self.table[page] = host
        self.changed = True

    async def _give_back(self, host: int) -> None:
        async with self.writer.back.lock:
            await self.writer.allocator.lower(host, 1)

    async def _fit(self, size: int) -> None:
        """Let the table be one for a disk of ``size`` bytes."""
        old = self.shape
        new = attrs.evolve(old, disk_size=size)
        if new.bits != old.bits:
            page, left = divmod(min(old.bits, new.bits), old.page_bits)
            if left:
                await self._cut(page, left)
            self.freed += [
                (word & layout.HOST_OFFSET, 1)
                for word in self.table[new.entries :]
                if word & layout.HOST_OFFSET
            ]
            self.changed = self.changed or new.entries != old.entries
            self.table = self.table[: new.entries]
            self.table.extend(array("Q", bytes(8 * (new.entries - len(self.table)))))
        self.shape = new

    async def _cut(self, page: int, left: int) -> None:
        """Let only the first bits of a cluster count."""
        image = self.writer.disk.image
        word = self.table[page]
        host = word & layout.HOST_OFFSET
        data = bytearray(1 << self.shape.cluster_bits)
        if word & layout.BITMAP_ONES and not host:
            set_bits(data, 0, left)
            await self._write_page(page, data)
        elif host:
            data[:] = await image.read_bytes(host, len(data))
            bits = int.from_bytes(data, "little") & (1 << left) - 1
            await image.write(bits.to_bytes(len(data), "little"), host)


_FULL: dict[int, bytes] = {}


def _full(length: int) -> bytes:
    """The one object that stands for a piece of ones."""
    return _FULL.setdefault(length, b"\xff" * length)


def _either(first: Piece, second: Piece) -> bytes:
    """The bits of both."""
    both = int.from_bytes(first, "little") | int.from_bytes(second, "little")
    return both.to_bytes(len(second), "little")
