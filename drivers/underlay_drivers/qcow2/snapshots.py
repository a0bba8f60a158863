"""The snapshot table. Pure, but for ``read_snapshots``."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import attrs

from underlay.capabilities import Snapshot
from underlay.errors import CorruptImageError, OptionError
from underlay.limits import Limits
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Header, text
from underlay_drivers.qcow2.tables import Geometry

if TYPE_CHECKING:
    from underlay.handle import StorageHandle

__all__ = ["SnapshotEntry", "find_snapshot", "read_snapshots", "snapshot_view"]

#: How much of the table is read at once.
_CHUNK: Final = 64 << 10


@attrs.frozen(kw_only=True)
class SnapshotEntry:
    """One entry, under the specification's names; ``id`` and ``name`` as stored."""

    l1_table_offset: int
    l1_size: int
    id: bytes
    name: bytes
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    #: Of bytes 32-35; the extra data may have a wider one.
    vm_state_size_short: int
    #: Kept byte for byte: it may hold what this driver does not know.
    extra: bytes

    @classmethod
    def unpack(cls, data: bytes | bytearray, at: int) -> tuple[SnapshotEntry | None, int]:
        """The entry at ``at`` and where the next one starts; None and the end needed if it is cut.

        Raises:
            ValueError: its extra data is larger than any.
        """
        start = at + layout.SNAPSHOT.size
        if start > len(data):
            return None, start
        fields = layout.SNAPSHOT.unpack_from(data, at)
        id_size, name_size, extra_size = fields[2], fields[3], fields[8]
        if extra_size > layout.SNAPSHOT_EXTRA_MAX:
            raise ValueError(f"has {extra_size} bytes of extra data")
        end = start + extra_size + id_size + name_size
        if end > len(data):
            return None, end
        names = start + extra_size
        entry = cls(
            l1_table_offset=fields[0],
            l1_size=fields[1],
            id=bytes(data[names : names + id_size]),
            name=bytes(data[names + id_size : end]),
            date_sec=fields[4],
            date_nsec=fields[5],
            vm_clock_nsec=fields[6],
            vm_state_size_short=fields[7],
            extra=bytes(data[start:names]),
        )
        return entry, end + -(end - at) % 8

    def pack(self) -> bytes:
        """The entry with its padding."""
        fixed = layout.SNAPSHOT.pack(
            self.l1_table_offset,
            self.l1_size,
            len(self.id),
            len(self.name),
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            self.vm_state_size_short,
            len(self.extra),
        )
        entry = b"".join((fixed, self.extra, self.id, self.name))
        return entry + bytes(-len(entry) % 8)

    def completed(self, disk_size: int) -> SnapshotEntry:
        """This entry with the extra data that version 3 demands, whatever it had."""
        if len(self.extra) >= layout.SNAPSHOT_EXTRA_V3:
            return self
        return attrs.evolve(self, extra=struct.pack(">QQ", self.vm_state_size, disk_size))

    def _extra_field(self, number: int) -> int | None:
        if len(self.extra) < (number + 1) * 8:
            return None
        (value,) = struct.unpack_from(">Q", self.extra, number * 8)
        return int(value)

    @property
    def vm_state_size(self) -> int:
        """Bytes."""
        size = self._extra_field(0)
        return self.vm_state_size_short if size is None else size

    @property
    def disk_size(self) -> int | None:
        """Bytes, or None where the entry does not say (version 2)."""
        return self._extra_field(1)

    @property
    def icount(self) -> int | None:
        """Instructions, or None."""
        count = self._extra_field(2)
        return None if count == layout.NO_ICOUNT else count

    def public(self, *, disk_size: int) -> Snapshot:
        """The snapshot for people; ``disk_size`` is the disk's present size in bytes."""
        own_size = self.disk_size
        return Snapshot(
            id=text(self.id),
            name=text(self.name),
            disk_size=disk_size if own_size is None else own_size,
            vm_state_size=self.vm_state_size,
            date_sec=self.date_sec,
            date_nsec=self.date_nsec,
            vm_clock_nsec=self.vm_clock_nsec,
            icount=self.icount,
        )


async def read_snapshots(
    image: StorageHandle, header: Header, limits: Limits, *, to_check: bool = False
) -> tuple[SnapshotEntry, ...]:
    """The whole table, read piece by piece: how long it is only its entries say.

    With ``to_check`` a table past the end of the file, or nowhere, is what can be read there.

    Raises:
        CorruptImageError: it does not lie inside the file, or an entry makes no sense.
        LimitExceededError: it, or a name in it, is larger than ``limits`` allow.
    """
    entries: list[SnapshotEntry] = []
    data = bytearray()
    at = 0
    table = header.snapshots_offset
    left = image.size() - table if table else 0
    if to_check:
        left = layout.SNAPSHOT_TABLE_BYTES_MAX + _CHUNK

    def damage(what: str) -> CorruptImageError:
        return CorruptImageError(
            f"'{image.name()}': entry {len(entries)} of the snapshot table at {table:#x} {what}; "
            "check the image",
            offset=table + at,
            field="snapshot table",
            value=len(entries),
        )

    while len(entries) < header.nb_snapshots:
        try:
            entry, end = SnapshotEntry.unpack(data, at)
        except ValueError as error:
            raise damage(str(error)) from None
        if entry is None and end > left:
            raise damage("lies past the end of the file")
        if end > layout.SNAPSHOT_TABLE_BYTES_MAX:
            raise damage("makes the table larger than 64 MiB")
        limits.check("metadata", end, what=f"'{image.name()}': the size of the snapshot table")
        if entry is not None:
            longest = max(len(entry.id), len(entry.name))
            what = f"'{image.name()}': the name of snapshot {len(entries)}"
            limits.check("name", longest, what=what)
            entries.append(entry)
            at = end
            continue
        more = min(max(end - len(data), _CHUNK), left - len(data))
        data += await image.read_bytes(table + len(data), more)
    return tuple(entries)


def find_snapshot(entries: Sequence[SnapshotEntry], wanted: str, *, image: str) -> SnapshotEntry:
    """The snapshot with this ID, else the first with this name.

    Raises:
        OptionError: there is none.
    """
    sought = wanted.encode("utf-8", "surrogateescape")
    for entry in entries:
        if entry.id == sought:
            return entry
    for entry in entries:
        if entry.name == sought:
            return entry
    known = ", ".join(f"'{text(entry.name)}'" for entry in entries) or "none"
    raise OptionError(
        f"'{image}': there is no snapshot '{wanted}'; it has: {known}", option="snapshot"
    )


def snapshot_view(
    entry: SnapshotEntry, header: Header, *, file_size: int, image: str
) -> tuple[int, int, int]:
    """The L1 table's host offset and entries, and the disk's size in bytes, of a snapshot.

    Raises:
        CorruptImageError: its L1 table cannot be what the snapshot needs.
    """

    def damage(what: str, *, field: str, value: int) -> CorruptImageError:
        return CorruptImageError(
            f"'{image}': the snapshot '{text(entry.name)}' {what}; the snapshot is damaged",
            offset=header.snapshots_offset,
            field=field,
            value=value,
        )

    offset, entries = entry.l1_table_offset, entry.l1_size
    if header.external_data_file:
        raise damage("has an external data file, which keeps no old data", field="l1_size", value=0)
    if entries * 8 > layout.L1_BYTES_MAX:
        raise damage(f"has an L1 table of {entries} entries", field="l1_size", value=entries)
    if entries and (not offset or offset % header.cluster_size or offset + entries * 8 > file_size):
        raise damage(
            f"has its L1 table at {offset:#x}, where none can be",
            field="l1_table_offset",
            value=offset,
        )
    size = entry.disk_size
    if size is None:
        # Version 2 does not tell. If the disk has grown since, what the table lacks is unallocated.
        return offset, entries, header.size
    if entries << Geometry.of(header).l1_shift < size:
        raise damage(
            f"has {size} bytes, more than its L1 table covers", field="disk_size", value=size
        )
    return offset, entries, size
