"""The mapping of a disk: from guest offsets to what lies there, one run at a time.

``locate`` is the hot path of every read. It knows plain data only: an entry with any bit set that
must not be, and an offset that is not surely inside the file, is left to ``get_mapping``, which
finds out. Bulk work is in ``bulk``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Final

from underlay.driver import Location
from underlay.errors import CorruptImageError, OutOfRangeError, UnsupportedOperationError
from underlay.mapping import Backing, Data, Eof, ShallowMapping, Special, Zero
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.cluster_tables import NEVER_WRITABLE, ClusterTables
from underlay_drivers.qcow2.tables import (
    COMPRESSED,
    DATA,
    MIXED,
    NOWHERE,
    UNALLOCATED,
    ZERO,
    Run,
    Table,
    continues,
)

__all__ = ["ClusterMap"]

#: So many clusters are looked at table by table with numpy; fewer take less time than importing it.
_BULK_CLUSTERS: Final = 65536


class ClusterMap(ClusterTables):
    """Mapping by these tables.

    The driver inherits it, so that the hot path has nothing to pass on.
    """

    __slots__ = ()

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
                    elif pending[0] != COMPRESSED and continues(pending, run):
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

    # -- values

    def _mapping(self, guest: int, run: Run) -> ShallowMapping:
        """A run for the core."""
        kind, host, length = run
        if kind == COMPRESSED:
            offset, host_length = self.geometry.compressed(host)
            return Special(
                self,
                self.data_storage(),
                offset,
                min(host_length, self.file_end - offset),
                length,
                guest & self._cluster_mask,
                self._cluster_size,
            )
        reserved = None if host == NOWHERE else host
        if kind == DATA:
            writable = self._all_copied(guest, length)
            return Data(self.data_storage(), host, length, writable=writable)
        if kind == ZERO:
            return Zero(length, explicit=True, offset=reserved)
        assert kind == UNALLOCATED
        if self._backing is not None:
            return Backing(self._backing, guest, length, reserved)
        if self._backing_pending is not None:
            raise UnsupportedOperationError(
                f"'{self.image.name()}': its backing image '{self._backing_pending}' is not "
                "attached; attach it, or None to read zeroes instead"
            )
        return Zero(length, explicit=False, offset=reserved)

    def _all_copied(self, guest: int, length: int) -> bool:
        """Whether a run of data may be written where it lies."""
        if self._writable_from == NEVER_WRITABLE:
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
