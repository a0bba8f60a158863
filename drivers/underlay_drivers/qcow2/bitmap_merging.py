"""Setting the bits of a dirty bitmap by what another one says, of any store and granularity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from underlay.errors import ConflictError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.bitmap_data import BitmapShape, set_bits

if TYPE_CHECKING:
    from underlay.capabilities import BitmapStore
    from underlay_drivers.qcow2.bitmap_writing import BitmapChange
    from underlay_drivers.qcow2.dirty import Freed
    from underlay_drivers.qcow2.tables import Table

__all__ = ["Merge"]


@attrs.define
class Merge:
    """Sets bits in ascending order, with one cluster of them in memory at a time."""

    change: BitmapChange
    shape: BitmapShape
    #: The bitmap's, which it changes.
    table: Table
    changed: bool = False
    freed: list[Freed] = attrs.field(factory=list["Freed"])
    _number: int = -1
    _page: bytearray = attrs.field(factory=bytearray)

    async def take_over(
        self, store: BitmapStore, name: str, reached: Callable[[int], None]
    ) -> None:
        """Set what the bitmap ``name`` of ``store`` says; ``reached`` hears of guest offsets.

        Raises:
            ConflictError: it is about a disk of another size.
        """
        offset, size = 0, self.shape.disk_size
        while offset < size:
            found = await store.dirty_ranges(name, offset)
            if found.size != size:
                raise ConflictError(
                    f"Bitmaps are of different sizes (destination size is {size}, source size is "
                    f"{found.size}) and can't be merged"
                )
            for start, length in found.ranges:
                await self._set(start, length)
                reached(start + length)
            offset = found.end
            reached(offset)
        await self._finish()

    async def _set(self, start: int, length: int) -> None:
        """Set the bits that guest bytes ``start`` on belong to."""
        bit, last = self.shape.bit_run(start, length)
        while bit < last:
            number = bit // self.shape.page_bits
            base = number * self.shape.page_bits
            end = min(last, base + self.shape.page_bits)
            if number != self._number:
                await self._finish()
                await self._open(number)
            set_bits(self._page, bit - base, end - base)
            bit = end

    async def _open(self, number: int) -> None:
        size = 1 << self.shape.cluster_bits
        word = self.table[number]
        host = word & layout.HOST_OFFSET
        if host:
            self._page = bytearray(await self.change.writer.disk.image.read_bytes(host, size))
        else:
            bits = min(self.shape.page_bits, self.shape.bits - number * self.shape.page_bits)
            self._page = bytearray(size)
            if word & layout.BITMAP_ONES:
                set_bits(self._page, 0, bits)
        self._number = number

    async def _finish(self) -> None:
        """Write the cluster of bits that is in memory, if it has changed."""
        number, self._number = self._number, -1
        if number < 0:
            return
        full = self._page.count(0xFF) == len(self._page)
        old = self.table[number]
        host = old & layout.HOST_OFFSET
        if full:
            word = layout.BITMAP_ONES
            if old == word:
                return
        else:
            image = self.change.writer.disk.image
            if host and await image.read_bytes(host, len(self._page)) == self._page:
                return
            word = await self.change.write_data(self._page)
        if host:
            self.freed.append((host, 1))
        self.table[number] = word
        self.changed = True
