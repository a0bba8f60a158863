"""The content of one dirty bitmap: its table, and the bits in the clusters behind it.

A table entry is the host offset of a cluster of bits, or says that they are all zeroes or ones. The
lowest bit of a byte comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from underlay.capabilities import DirtyRanges
from underlay.errors import CorruptImageError, OutOfRangeError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.bitmaps import BitmapEntry
from underlay_drivers.qcow2.header import Header, text
from underlay_drivers.qcow2.loading import load_table

if TYPE_CHECKING:
    from underlay.handle import StorageHandle
    from underlay.limits import Limits
    from underlay_drivers.qcow2.tables import Table

__all__ = [
    "BitmapShape",
    "load_bitmap_table",
    "ranges_from",
    "read_dirty_ranges",
    "set_bits",
]

#: First and last bit + 1 of a run of ones.
BitRun: TypeAlias = tuple[int, int]

#: Bytes of bits that are looked at together. Every second bit may be one.
_PIECE: Final = 16 << 10
#: Ranges beyond which no more are looked for in one go.
_ENOUGH: Final = 4096


@attrs.frozen(kw_only=True)
class BitmapShape:
    """How many bits a bitmap has, and how they are laid out."""

    #: Of the virtual disk, in bytes.
    disk_size: int
    granularity_bits: int
    cluster_bits: int

    @classmethod
    def of(cls, header: Header, granularity_bits: int) -> BitmapShape:
        """The layout of a bitmap of the disk in an image with this header."""
        return cls(
            disk_size=header.size,
            granularity_bits=granularity_bits,
            cluster_bits=header.cluster_bits,
        )

    @property
    def bits(self) -> int:
        """How many there are."""
        return -(-self.disk_size >> self.granularity_bits)

    @property
    def length(self) -> int:
        """Bytes that hold them."""
        return -(-self.bits // 8)

    @property
    def entries(self) -> int:
        """Of the table."""
        return -(-self.length >> self.cluster_bits)

    @property
    def page_bits(self) -> int:
        """Bits in one cluster."""
        return 8 << self.cluster_bits

    def check(self, image: StorageHandle, entry: BitmapEntry) -> None:
        """Refuse a bitmap of another size.

        Raises:
            CorruptImageError: its table does not fit the disk.
        """
        if entry.bitmap_table_size != self.entries:
            raise CorruptImageError(
                f"'{image.name()}': the table of the bitmap '{text(entry.name)}' has "
                f"{entry.bitmap_table_size} entries, and the disk needs {self.entries}; the bitmap "
                "is lost",
                offset=entry.bitmap_table_offset,
                field="bitmap_table_size",
                value=entry.bitmap_table_size,
            )

    def bit_run(self, start: int, length: int) -> BitRun:
        """The bits that guest bytes ``start`` on belong to."""
        end = min(start + length, self.disk_size)
        return start >> self.granularity_bits, -(-end >> self.granularity_bits)

    def guest_range(self, run: BitRun) -> tuple[int, int]:
        """The guest offset and the bytes of a run of bits."""
        start = run[0] << self.granularity_bits
        return start, min(run[1] << self.granularity_bits, self.disk_size) - start


async def load_bitmap_table(
    image: StorageHandle, header: Header, entry: BitmapEntry, limits: Limits
) -> Table:
    """The table of a bitmap.

    Raises:
        CorruptImageError: it lies past the end of the file, or leads where no bits can be.
        LimitExceededError: it is larger than ``limits.metadata``.
    """
    name, size = image.name(), entry.bitmap_table_size * 8
    cluster_size = header.cluster_size
    offset = entry.bitmap_table_offset
    what = f"the table of the bitmap '{text(entry.name)}'"
    if offset % cluster_size or (size and not offset) or offset + size > image.size():
        raise CorruptImageError(
            f"'{name}': {what} at {offset:#x} is not inside the file; the bitmap is lost",
            offset=offset,
            field="bitmap_table_offset",
            value=offset,
        )
    table = await load_table(image, offset, entry.bitmap_table_size, limits, what=what)
    seen: set[int] = set()
    end = image.size()
    for number, word in enumerate(table):
        host = word & layout.HOST_OFFSET
        odd = word & layout.BITMAP_TABLE_RESERVED or (host and word & layout.BITMAP_ONES)
        if odd or host % cluster_size or host >= end or host in seen:
            raise CorruptImageError(
                f"'{name}': {what} has the entry {word:#x}, which makes no sense; the bitmap is "
                "lost",
                offset=offset + number * 8,
                field="bitmap table entry",
                value=word,
            )
        if host:
            seen.add(host)
    return table


async def read_dirty_ranges(
    image: StorageHandle, header: Header, limits: Limits, entry: BitmapEntry, offset: int
) -> DirtyRanges:
    """See ``BitmapStore.dirty_ranges``; of a bitmap that is ``usable``."""
    shape = BitmapShape.of(header, entry.granularity_bits)
    table = await load_bitmap_table(image, header, entry, limits)
    shape.check(image, entry)
    return await ranges_from(image, table, shape, offset)


async def ranges_from(
    image: StorageHandle, table: Table, shape: BitmapShape, offset: int
) -> DirtyRanges:
    """The dirty ranges from guest ``offset`` on, until there are some."""
    if not 0 <= offset <= shape.disk_size:
        raise OutOfRangeError(f"There is no guest offset {offset}")
    found: list[BitRun] = []
    bit = offset >> shape.granularity_bits
    while bit < shape.bits and len(found) < _ENOUGH:
        number = bit // shape.page_bits
        page_end = min((number + 1) * shape.page_bits, shape.bits)
        word = table[number]
        host = word & layout.HOST_OFFSET
        if not host:
            if word & layout.BITMAP_ONES:
                _append(found, (bit, page_end))
            bit = page_end
            continue
        first = bit % shape.page_bits // 8
        piece_end = min((bit // 8 + _PIECE) * 8, page_end)
        length = -(-piece_end // 8) - bit // 8
        data = await image.read_bytes(host + first, length)
        base = bit // 8 * 8
        for start, end in runs_of_ones(bytes(data)):
            run = max(base + start, bit), min(base + end, piece_end)
            if run[0] < run[1]:
                _append(found, run)
        bit = piece_end
    reached = min(bit << shape.granularity_bits, shape.disk_size)
    ranges = [shape.guest_range(run) for run in found]
    if ranges and ranges[0][0] < offset:
        ranges[0] = offset, sum(ranges[0]) - offset
    return DirtyRanges(ranges=tuple(ranges), end=reached, size=shape.disk_size)


def _append(runs: list[BitRun], run: BitRun) -> None:
    if runs and runs[-1][1] == run[0]:
        runs[-1] = runs[-1][0], run[1]
    else:
        runs.append(run)


def runs_of_ones(data: bytes) -> Iterator[BitRun]:
    """Where the ones are in some bytes of bits."""
    if data.count(0) == len(data):
        return
    if data.count(0xFF) == len(data):
        yield 0, len(data) * 8
        return
    import numpy as np

    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").astype(np.int8)
    edges = np.diff(bits, prepend=np.int8(0), append=np.int8(0))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    yield from zip(starts.tolist(), ends.tolist(), strict=True)


def set_bits(page: bytearray, first: int, last: int) -> None:
    """Set bits ``first`` up to ``last``, which is not among them."""
    start, end = first // 8, last // 8
    if start == end:
        page[start] |= (1 << last % 8) - (1 << first % 8)
        return
    page[start] |= 0xFF << first % 8 & 0xFF
    page[start + 1 : end] = b"\xff" * (end - start - 1)
    if last % 8:
        page[end] |= (1 << last % 8) - 1
