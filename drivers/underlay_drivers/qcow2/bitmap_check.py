"""Counting the bitmap directory, the tables that it lists, and the clusters that these lead to.

Many bitmaps of a hostile file may have one table: each word of a table is read once. With numpy.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from underlay_drivers.qcow2.bitmaps import read_bitmaps
from underlay_drivers.qcow2.findings import Report
from underlay_drivers.qcow2.header import Header, text
from underlay_drivers.qcow2.ledger import Ledger
from underlay_drivers.qcow2.loading import load_words
from underlay_drivers.qcow2.table_uses import hosts_of, words_in_use

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay.handle import StorageHandle
    from underlay.limits import Limits
    from underlay_drivers.qcow2.bulk import Words

__all__ = ["BitmapCheck"]

#: Bits of an entry that must not be set.
_RESERVED: Final = np.uint64(0xFF000000000001FE)
#: Instead of an offset: all of the part is dirty.
_ALL_ONES: Final = np.uint64(1)


@attrs.frozen
class BitmapCheck:
    """Counts bitmaps in the ledger, and reports what is wrong."""

    image: StorageHandle
    header: Header
    limits: Limits
    ledger: Ledger
    report: Report

    async def count(self) -> None:
        """Count the directory, and all that it leads to.

        Raises:
            CorruptImageError: the bitmap directory cannot be read.
            LimitExceededError: it, or a table, is larger than ``limits`` allow.
        """
        bitmaps = await read_bitmaps(self.image, self.header, self.limits)
        place = self.header.bitmaps
        if not bitmaps or place is None:
            return
        self.ledger.region("the bitmap directory", place.directory_offset, place.directory_size)
        tables: Counter[tuple[int, int]] = Counter()
        what = f"'{self.image.name()}': the size of a bitmap table"
        for bitmap in bitmaps:
            offset, length = bitmap.bitmap_table_offset, bitmap.bitmap_table_size * 8
            self.limits.check("metadata", length, what=what)
            tables[offset, length] += 1
            if offset % self.header.cluster_size:  # nobody can use it
                self.report.corruption(
                    "",
                    f"the table of bitmap '{text(bitmap.name)}' starts no cluster",
                    offset=place.directory_offset,
                    found=offset,
                )
        self.ledger.regions("a bitmap table", tables)
        readable = {
            (offset, length): times
            for (offset, length), times in tables.items()
            if not offset % self.header.cluster_size and self.ledger.is_inside(offset, length)
        }
        for first, uses in words_in_use(readable, end=self.ledger.file_length):
            table = await load_words(self.image, first, len(uses))
            self._count_entries(table, first, uses)

    def _count_entries(self, table: Words, offset: int, times: NDArray[np.int64]) -> None:
        """Count what entries at a host offset lead to, each so many ``times``."""
        used = np.flatnonzero((table != 0) & (times != 0))
        entries, times = table[used], times[used]
        hosts = hosts_of(entries)
        odd = (entries & _RESERVED) != 0
        odd |= (hosts != 0) & ((entries & _ALL_ONES) != 0)
        odd |= (hosts & (self.header.cluster_size - 1)) != 0
        wrong = np.flatnonzero(odd)
        room = self.report.room
        for at in wrong[:room].tolist():
            place = offset + int(used[at]) * 8
            self.report.corruption(
                "",
                f"the entry at {place:#x} of a bitmap's table makes no sense",
                offset=place,
                found=int(entries[at]),
                times=int(times[at]),
            )
        self.report.omit(corruptions=int(times[wrong[room:]].sum()))
        data = ~odd & (hosts != 0)
        inside = data & (hosts < self.ledger.file_length)
        self.ledger.references.add(hosts[inside] >> self.header.cluster_bits, times[inside])
        self.ledger.regions_beyond(
            "a bitmap's cluster",
            hosts[data & ~inside],
            self.header.cluster_size,
            times=times[data & ~inside],
        )
