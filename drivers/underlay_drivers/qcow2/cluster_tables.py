"""One L1 table and the L2 tables that it leads to, in memory; and whether their entries make sense.

A table that was changed is pinned until it is on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final

from underlay.driver import FormatDriverInstance
from underlay.errors import CorruptImageError, UnsupportedOperationError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.cache import TableCache
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.tables import Geometry, Table, empty_table, swap
from underlay_drivers.qcow2.validation import Region, metadata_regions

if TYPE_CHECKING:
    from underlay.handle import StorageHandle
    from underlay_drivers.qcow2.strays import Strays

__all__ = ["NEVER_WRITABLE", "ClusterTables"]

#: Further than any file: the data file's "end", since past its end there are zeroes.
_NO_END = 1 << 64
#: No entry is as large.
NEVER_WRITABLE: Final = 1 << 64


class ClusterTables(FormatDriverInstance):
    """The state that mapping needs."""

    __slots__ = (
        "_backing",
        "_backing_pending",
        "_cache",
        "_cluster_bits",
        "_cluster_mask",
        "_cluster_size",
        "_compressed_end",
        "_compressed_mask",
        "_data",
        "_data_pending",
        "_foundation",
        "_l1_offset",
        "_l1_shift",
        "_l2_mask",
        "_metadata",
        "_plain_bad",
        "_size",
        "_strays",
        "_table",
        "_whole_end",
        "_writable_from",
        "file_end",
        "geometry",
        "image",
        "l1",
        "regions",
    )

    def __init__(self, image: StorageHandle, header: Header, *, cache_size: int) -> None:
        self.image = image
        #: Where guest data lies; None until an external data file is attached.
        self._data: StorageHandle | None = None if header.external_data_file else image
        #: Whether nobody has attached or declined it yet.
        self._data_pending = header.external_data_file
        #: What watches over the tables that are read, once the image is written to.
        self._strays: Strays | None = None
        self._backing: FormatDriverInstance | None = None
        #: The name of a backing image that nobody has attached or declined yet.
        self._backing_pending = header.backing_file
        geometry = Geometry.of(header)
        self.geometry = geometry
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._cluster_mask = geometry.cluster_size - 1
        self._l1_shift = geometry.l1_shift
        self._l2_mask = geometry.l2_entries - 1
        self._plain_bad = geometry.plain_bad
        self._compressed_mask = (1 << geometry.compressed_shift) - 1
        #: With an external data file nothing may be compressed.
        self._compressed_end = 0 if geometry.external else layout.HOST_OFFSET_LIMIT
        self._cache = TableCache(size=cache_size, table_bytes=geometry.cluster_size)
        self._table = self._cache.hit
        #: Entries from this one on (that is, with the bit COPIED) lie where they may be written:
        #: none before the image is made ready for that.
        self._writable_from = NEVER_WRITABLE

    def show(self, header: Header, l1: Table, *, l1_offset: int, size: int) -> None:
        """Map ``size`` bytes through this L1 table from now on."""
        self._look_at_header(header, l1, l1_offset)
        #: What guest data cannot lie in; once the image is written to, all metadata that there is.
        self._metadata: AbstractSet[int] = self._foundation
        self.file_end = _NO_END if self.geometry.external else self.image.size()
        self.l1 = l1
        self._l1_offset = l1_offset
        self.set_size(size)
        self._cache.clear()

    def _look_at_header(self, header: Header, l1: Table, l1_offset: int) -> None:
        """Know where the tables are that the header leads to."""
        regions = metadata_regions(header)
        if all(region.offset != l1_offset for region in regions):
            regions += (Region("snapshot's L1 table", l1_offset, len(l1) * 8),)
        file_size = self.image.size()
        self.regions: tuple[Region, ...] = tuple(
            region for region in regions if region.offset < file_size
        )
        #: The clusters that the header itself says are metadata.
        self._foundation = frozenset(
            offset
            for region in self.regions
            for offset in range(
                region.offset,
                min(region.offset + region.length, file_size),
                self.geometry.cluster_size,
            )
        )

    def follow(self, header: Header, l1: Table | None = None) -> None:
        """Be what a header says that has been written: its size, and its version's rules.

        With ``l1`` its L1 table is that one, in which nothing is dirty.
        """
        self.geometry = Geometry.of(header)
        self._plain_bad = self.geometry.plain_bad
        if l1 is not None:
            self._l1_offset = header.l1_table_offset
            self.l1 = l1
        self._look_at_header(header, self.l1, self._l1_offset)
        self.set_size(header.size)
        if l1 is not None:
            self._cache.clear()

    def set_size(self, size: int) -> None:
        """Let the disk end at ``size`` bytes."""
        self._size = size
        plain = not (self.geometry.extended or self.geometry.external)
        #: Where ``locate`` needs more thought: from the last cluster on, if it is not whole.
        self._whole_end = size & ~self._cluster_mask if plain else 0

    # -- tables

    def _l1_entry(self, number: int) -> int:
        # A snapshot of a smaller disk has fewer entries than the disk now needs.
        return self.l1[number] if number < len(self.l1) else 0

    async def l2_table(self, number: int) -> Table | None:
        """The L2 table behind an L1 entry, or None where there is none."""
        table = self._cache.get(number)
        if table is not None:
            return table
        epoch = self._cache.epoch
        entry = self._l1_entry(number)
        if not entry:
            return None
        # A new table is at hand before an entry leads to it, and long before it is on disk.
        table = self._cache.get(number)
        if table is not None:
            return table
        offset = self._l2_offset(number, entry)
        table = empty_table(self.geometry.cluster_size // 8)
        await self.image.readv((memoryview(table).cast("B"),), offset)
        swap(table)
        if self._strays is not None:
            self._strays.look(number, table)
        return self._cache.put(number, table, epoch)

    def cached_table(self, number: int) -> Table | None:
        """The L2 table behind an L1 entry, if it is at hand."""
        return self._cache.get(number)

    def pin_table(self, number: int, table: Table) -> None:
        """Keep a table that is changed until it is on disk."""
        if self._strays is not None:
            self._strays.expect(number)
        self._cache.pin(number, table)

    def unpin_table(self, number: int) -> None:
        """It is on disk."""
        self._cache.unpin(number)

    def forget_table(self, number: int) -> None:
        """Drop a table to which nothing leads any more."""
        self._cache.forget(number)

    def l2_offset(self, number: int) -> int:
        """The host offset that a non-zero L1 entry leads to.

        Raises:
            CorruptImageError: the entry makes no sense.
        """
        return self._l2_offset(number, self._l1_entry(number))

    def _l2_offset(self, number: int, entry: int) -> int:
        fault = self.geometry.l1_fault(
            entry, file_size=self.image.size(), metadata=self._foundation
        )
        if fault is not None:
            raise CorruptImageError(
                f"'{self.image.name()}': the L1 entry {entry:#x} of guest offset "
                f"{number << self._l1_shift:#x} {fault}; check the image",
                offset=self._l1_offset + number * 8,
                field="L1 entry",
                value=entry,
            )
        return entry & layout.HOST_OFFSET

    # -- entries

    def entry(self, table: Table, index: int, guest: int) -> tuple[int, int]:
        """The L2 entry number ``index``, of the cluster at ``guest``, and its subcluster bitmap.

        Raises:
            CorruptImageError: it makes no sense.
        """
        if self.geometry.words == 1:
            entry, bitmap = table[index], 0
        else:
            # Both at once: somebody may be changing them.
            entry, bitmap = table[index * 2 : index * 2 + 2]
        self._check(entry, bitmap, guest, index)
        return entry, bitmap

    def _check(self, entry: int, bitmap: int, guest: int, index: int) -> None:
        """Raise what is wrong with an L2 entry."""
        fault = self._fault(entry, bitmap, guest)
        if fault is not None and not self.geometry.external:
            # The file may have grown since it was looked at.
            self.file_end = self.image.size()
            fault = self._fault(entry, bitmap, guest)
        if fault is None:
            return
        table_offset = self._l1_entry(guest >> self._l1_shift) & layout.HOST_OFFSET
        raise CorruptImageError(
            f"'{self.image.name()}': the L2 entry {entry:#x} of guest offset {guest:#x} {fault}; "
            "check the image",
            offset=table_offset + index * self.geometry.words * 8,
            field="L2 entry",
            value=entry,
        )

    def _fault(self, entry: int, bitmap: int, guest: int) -> str | None:
        return self.geometry.fault(
            entry, bitmap, guest, file_end=self.file_end, metadata=self._metadata
        )

    # -- for the writing side

    def allow_writing(self, metadata: AbstractSet[int], *, in_place: bool) -> None:
        """Let no entry lead to what is in ``metadata``.

        With ``in_place`` ``locate`` names places that may be written by anybody.
        """
        self._metadata = metadata
        self._writable_from = layout.COPIED if in_place else NEVER_WRITABLE

    def watch(self, strays: Strays) -> None:
        """Let ``strays`` look at each L2 table; none may be dirty."""
        self._strays = strays
        self._cache.clear()

    def forbid_writing(self) -> None:
        """Let ``locate`` name no place that may be written."""
        self._writable_from = NEVER_WRITABLE

    def reach(self, end: int) -> None:
        """Data was written up to host offset ``end``."""
        self.file_end = max(self.file_end, end)

    # -- facts

    def data_storage(self) -> StorageHandle:
        """Where guest data lies.

        Raises:
            UnsupportedOperationError: in a data file that is not attached.
        """
        if self._data is None:
            raise UnsupportedOperationError(
                f"'{self.image.name()}': its data file is not attached; give the image its "
                "data_file"
            )
        return self._data

    def nothing_reads_zero(self) -> bool:
        """Whether what is not mapped reads as zeroes: there is no backing image."""
        return self._backing is None and self._backing_pending is None

    def size(self) -> int:
        """See ``FormatDriverInstance.size``."""
        return self._size

    def collect_storage_dependencies(self) -> Sequence[StorageHandle]:
        """See ``FormatDriverInstance.collect_storage_dependencies``."""
        if self._data is None or self._data is self.image:
            return (self.image,)
        return (self.image, self._data)
