"""The mapping of a disk: from guest offsets to what lies there, one run at a time.

``locate`` is the hot path of every read. It knows plain data only: an entry with any bit set that
must not be, and an offset that is not surely inside the file, is left to ``get_mapping``, which
finds out. Bulk work is in ``bulk``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from underlay.driver import FormatDriverInstance, Location
from underlay.errors import CorruptImageError, OutOfRangeError, UnsupportedOperationError
from underlay.mapping import Backing, Data, Eof, ShallowMapping, Special, Zero
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.cache import TableCache
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.tables import (
    COMPRESSED,
    DATA,
    MIXED,
    NOWHERE,
    UNALLOCATED,
    ZERO,
    Geometry,
    Run,
    Table,
    continues,
    empty_table,
    swap,
)
from underlay_drivers.qcow2.validation import Region, metadata_regions

if TYPE_CHECKING:
    from underlay.handle import StorageHandle

__all__ = ["ClusterMap"]

#: So many clusters are looked at table by table with numpy; fewer take less time than importing it.
_BULK_CLUSTERS = 65536
#: Further than any file: the data file's "end", since past its end there are zeroes.
_NO_END = 1 << 64
#: No entry is as large.
_NEVER_WRITABLE = 1 << 64


class ClusterMap(FormatDriverInstance):
    """One L1 table and what it leads to: the state that mapping needs, and mapping itself.

    The driver inherits it, so that the hot path has nothing to pass on.
    """

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
        self._writable_from = _NEVER_WRITABLE

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

    def judge_by(self, header: Header) -> None:
        """Judge entries by the rules for this header, which has another version than before."""
        self.geometry = Geometry.of(header)
        self._plain_bad = self.geometry.plain_bad

    def follow(self, header: Header) -> None:
        """Know where the tables are that a header leads to which has been written."""
        self.header = header
        self._look_at_header(header, self.l1, self._l1_offset)

    def replace_l1(self, header: Header, l1: Table) -> None:
        """Map through another L1 table, which leads to the same as far as the old one went."""
        self._look_at_header(header, l1, header.l1_table_offset)
        self._l1_offset = header.l1_table_offset
        self.l1 = l1

    def show_again(self, header: Header, l1: Table, *, size: int) -> None:
        """Map through another L1 table from now on, which leads elsewhere."""
        self.replace_l1(header, l1)
        self.set_size(size)
        self._cache.clear()

    def set_size(self, size: int) -> None:
        """Let the disk end at ``size`` bytes."""
        self._size = size
        plain = not (self.geometry.extended or self.geometry.external)
        #: Where ``locate`` needs more thought: from the last cluster on, if it is not whole.
        self._whole_end = size & ~self._cluster_mask if plain else 0

    # -- one cluster, at once

    def locate(self, offset: int) -> Location | None:
        """See ``FormatDriverInstance.locate``."""
        if offset >= self._whole_end:
            return self._locate_otherwise(offset)
        table = self._table(offset >> self._l1_shift)
        if table is None:
            return None
        entry = table[offset >> self._cluster_bits & self._l2_mask]
        if entry & self._plain_bad:
            return None
        host = entry & 0x00FF_FFFF_FFFF_FE00
        # Host offset 0, which says "nothing here", is the header's and so metadata.
        if host >= self.file_end or host in self._metadata:
            return None
        within = offset & self._cluster_mask
        return (
            self.image,
            host + within,
            self._cluster_size - within,
            entry >= self._writable_from,
        )

    def _locate_otherwise(self, offset: int) -> Location | None:
        """The rarer cases: the disk's last cluster, subclusters, an external data file."""
        data = self._data
        table = self._table(offset >> self._l1_shift)
        if table is None or data is None or offset >= self._size or offset < 0:
            return None
        try:
            kind, host, length = self.run(table, offset, 1)
        except CorruptImageError:
            return None
        if kind != DATA:
            return None
        entry = table[(offset >> self._cluster_bits & self._l2_mask) * self.geometry.words]
        writable = entry >= self._writable_from
        if writable and host != (entry & layout.HOST_OFFSET) + (offset & self._cluster_mask):
            return None  # it has changed in between
        return data, host, min(length, self._size - offset), writable

    # -- a run

    async def get_mapping(self, offset: int, max_length: int) -> ShallowMapping:
        """See ``FormatDriverInstance.get_mapping``.

        Raises:
            CorruptImageError: the tables make no sense there.
        """
        if offset < 0:
            raise OutOfRangeError(f"There is no guest offset {offset}")
        left = self._size - offset
        if left <= 0:
            return Eof()
        wanted = max(1, min(max_length, left))
        kind, host, length = await self.run_at(offset, wanted)
        table_mask = (1 << self._l1_shift) - 1
        # A run ends inside a table because something else follows, unless subclusters are involved.
        while length < wanted and (self.geometry.extended or not (offset + length) & table_mask):
            further = self._run_at_hand(offset + length, wanted - length)
            if further is None or not continues((kind, host, length), further):
                break
            length += further[2]
        return self._mapping(offset, (kind, host, min(length, left)))

    async def iter_mappings(self, offset: int, length: int) -> AsyncIterator[ShallowMapping]:
        """See ``FormatDriverInstance.iter_mappings``. What continues is not split."""
        end = min(offset + length, self._size)
        pending: Run | None = None
        if self._clusters_to_look_at(end - offset) < _BULK_CLUSTERS:
            source = self._runs(offset, end)
        else:
            from underlay_drivers.qcow2.bulk import table_runs

            source = table_runs(self, offset, end)
        try:
            async for runs in source:
                for run in runs:
                    if pending is None:
                        pending = run
                    elif continues(pending, run):
                        pending = (pending[0], pending[1], pending[2] + run[2])
                    else:
                        yield self._mapping(offset, pending)
                        offset += pending[2]
                        pending = run
        except CorruptImageError:
            # What lies before the damage is good.
            if pending is not None:
                yield self._mapping(offset, pending)
            raise
        if pending is not None:
            yield self._mapping(offset, pending)

    def _clusters_to_look_at(self, length: int) -> int:
        tables = len(self.l1) - self.l1.count(0)
        return min(length >> self._cluster_bits, tables * self.geometry.l2_entries)

    async def _runs(self, offset: int, end: int) -> AsyncIterator[Iterable[Run]]:
        """The runs of a range, those of one L2 table at a time."""
        shift = self._l1_shift
        while offset < end:
            table = await self.l2_table(offset >> shift)
            if table is None:
                length = min(self._unallocated_length(offset, end - offset), end - offset)
                yield ((UNALLOCATED, NOWHERE, length),)
                offset += length
            else:
                until = min(end, (offset >> shift) + 1 << shift)
                yield self._table_runs(table, offset, until)
                offset = until

    def _table_runs(self, table: Table, offset: int, until: int) -> Iterator[Run]:
        """The runs of a range that lies inside one L2 table."""
        while offset < until:
            kind, host, length = self.run(table, offset, until - offset)
            length = min(length, until - offset)
            yield kind, host, length
            offset += length

    async def run_at(self, offset: int, wanted: int) -> Run:
        """The run at a guest offset; reads its L2 table if need be."""
        table = await self.l2_table(offset >> self._l1_shift)
        if table is None:
            return UNALLOCATED, NOWHERE, self._unallocated_length(offset, wanted)
        return self.run(table, offset, wanted)

    def _run_at_hand(self, offset: int, wanted: int) -> Run | None:
        """The same without any I/O, and None for damage too: that is for whoever asks for it."""
        number = offset >> self._l1_shift
        table = self._cache.get(number)
        if table is None:
            if self._l1_entry(number):
                return None
            return UNALLOCATED, NOWHERE, self._unallocated_length(offset, wanted)
        try:
            return self.run(table, offset, wanted)
        except CorruptImageError:
            return None

    def _unallocated_length(self, offset: int, wanted: int) -> int:
        """Bytes from ``offset`` to the end of the last of the L1 entries that lead nowhere."""
        number = (offset >> self._l1_shift) + 1
        last = min((offset + wanted - 1) >> self._l1_shift, len(self.l1))
        while number <= last and not self._l1_entry(number):
            number += 1
        return (number << self._l1_shift) - offset

    def run(self, table: Table, offset: int, wanted: int) -> Run:
        """The run at ``offset``, inside its L2 table.

        Raises:
            CorruptImageError: the entry makes no sense.
        """
        geometry = self.geometry
        words = geometry.words
        within = offset & self._cluster_mask
        index = offset >> self._cluster_bits & self._l2_mask
        size = geometry.cluster_size
        if (
            words == 1
            and table[index] & layout.COMPRESSED
            and self._compressed_inside(table[index])
        ):
            return COMPRESSED, table[index], size - within
        entry, bitmap = self.entry(table, index, offset - within)
        kind, host = geometry.decode(entry, bitmap)
        if kind == COMPRESSED:
            return kind, host, size - within
        if kind == MIXED:
            return self._subcluster_run(host, bitmap, within)
        count = 1
        most = (within + wanted + size - 1) >> self._cluster_bits
        if most > 1:
            damage = self._clusters_before_damage(kind, host)
            most = min(most, geometry.l2_entries - index, damage)
            # With a host offset, the bit that tells about its refcount makes no difference.
            step, mask = (0, -1) if host == NOWHERE else (size, ~layout.COPIED)
            expected = entry & mask
            for further in table[(index + 1) * words : (index + most) * words : words]:
                expected += step
                if further & mask != expected:
                    break
                count += 1
            if words > 1:
                bitmaps = table[(index + 1) * words + 1 : (index + count) * words : words]
                for number, further in enumerate(bitmaps, 1):
                    if further != bitmap:
                        count = number
                        break
        return kind, host if host == NOWHERE else host + within, count * size - within

    def _compressed_inside(self, entry: int) -> bool:
        """Whether compressed data lies where it may; a walk asks this of every such cluster."""
        host = entry & self._compressed_mask
        return self._cluster_size <= host < self.file_end and host < self._compressed_end

    def _subcluster_run(self, host: int, bitmap: int, within: int) -> Run:
        size = self.geometry.subcluster_size
        first = within // size
        kind, count = self.geometry.subcluster_run(bitmap, first)
        return kind, host if host == NOWHERE else host + within, (first + count) * size - within

    def _clusters_before_damage(self, kind: int, host: int) -> int:
        """How many clusters from ``host`` on may follow each other before one would be at fault."""
        if kind != DATA or self.geometry.external:
            return 1 << 62
        end = min(
            (region.offset for region in self.regions if region.offset > host),
            default=self.file_end,
        )
        return -(-(min(end, self.file_end) - host) >> self._cluster_bits)

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
        return self._cache.put(number, table, epoch)

    def cached_table(self, number: int) -> Table | None:
        """The L2 table behind an L1 entry, if it is at hand."""
        return self._cache.get(number)

    def pin_table(self, number: int, table: Table) -> None:
        """Keep a table that is changed until it is on disk."""
        self._cache.pin(number, table)

    def unpin_table(self, number: int) -> None:
        """It is on disk."""
        self._cache.unpin(number)

    def allow_writing(self, metadata: AbstractSet[int]) -> None:
        """Let ``locate`` name places that may be written, none of which is in ``metadata``."""
        self._metadata = metadata
        self._writable_from = layout.COPIED

    def forget_table(self, number: int) -> None:
        """Drop a table to which nothing leads any more."""
        self._cache.forget(number)

    def reach(self, end: int) -> None:
        """Data was written up to host offset ``end``."""
        self.file_end = max(self.file_end, end)

    def forbid_writing(self) -> None:
        """Let ``locate`` name no place that may be written."""
        self._writable_from = _NEVER_WRITABLE

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

    # -- values

    def _mapping(self, guest: int, run: Run) -> ShallowMapping:
        """A run for the core."""
        kind, host, length = run
        reserved = None if host == NOWHERE else host
        if kind == DATA:
            writable = self._all_copied(guest, length)
            return Data(self.data_storage(), host, length, writable=writable)
        if kind == ZERO:
            return Zero(length, explicit=True, offset=reserved)
        if kind == UNALLOCATED:
            if self._backing is not None:
                return Backing(self._backing, guest, length, reserved)
            if self._backing_pending is not None:
                raise UnsupportedOperationError(
                    f"'{self.image.name()}': its backing image '{self._backing_pending}' is not "
                    "attached; attach it, or None to read zeroes instead"
                )
            return Zero(length, explicit=False, offset=reserved)
        offset, host_length = self.geometry.compressed(host)
        return Special(
            self,
            self.data_storage(),
            offset,
            min(host_length, self.file_end - offset),
            length,
            guest & self._cluster_mask,
            self.geometry.cluster_size,
        )

    def _all_copied(self, guest: int, length: int) -> bool:
        """Whether a run of data may be written where it lies."""
        if self._writable_from == _NEVER_WRITABLE:
            return False
        words = self.geometry.words
        end = guest + length
        while guest < end:
            number = guest >> self._l1_shift
            table = self._cache.get(number)
            if table is None:
                return False
            first = guest >> self._cluster_bits & self._l2_mask
            guest = min(end, number + 1 << self._l1_shift)
            last = guest - 1 >> self._cluster_bits & self._l2_mask
            entries = table[first * words : last * words + 1 : words]
            if min(entries) < self._writable_from:
                return False
        return True

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
