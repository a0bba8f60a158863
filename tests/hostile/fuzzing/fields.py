"""Where an image keeps what: each field of its header, its extensions and its tables.

Made for images that are good, or were before they were damaged: what cannot be found is left out.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

import attrs

__all__ = ["Field", "Group", "fields"]

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED = 1 << 62
_BITMAPS = 0x23852875
_EXTENDED = 1 << 4
#: Of one table, besides the entries that are not zero.
_EMPTY_ENTRIES = 3
#: Of one image, lest a damaged one keeps us busy.
_MOST_TABLES = 16
_MOST_ENTRIES = 96


class Group(enum.Enum):
    """What a field belongs to."""

    HEADER = enum.auto()
    EXTENSIONS = enum.auto()
    L1 = enum.auto()
    L2 = enum.auto()
    COMPRESSED = enum.auto()
    REFCOUNTS = enum.auto()
    SNAPSHOTS = enum.auto()
    BITMAPS = enum.auto()


@attrs.frozen
class Field:
    """Some bytes that mean one thing."""

    group: Group
    name: str
    offset: int
    #: Bytes. 1, 2, 4 or 8 is a big-endian number; anything else is text or a stream.
    width: int


#: Name, offset, width.
_HEADER = (
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing_file_offset", 8, 8),
    ("backing_file_size", 16, 4),
    ("cluster_bits", 20, 4),
    ("size", 24, 8),
    ("crypt_method", 32, 4),
    ("l1_size", 36, 4),
    ("l1_table_offset", 40, 8),
    ("refcount_table_offset", 48, 8),
    ("refcount_table_clusters", 56, 4),
    ("nb_snapshots", 60, 4),
    ("snapshots_offset", 64, 8),
)
_HEADER_3 = (
    ("incompatible_features", 72, 8),
    ("compatible_features", 80, 8),
    ("autoclear_features", 88, 8),
    ("refcount_order", 96, 4),
    ("header_length", 100, 4),
    ("compression_type", 104, 1),
)
_SNAPSHOT = (
    ("l1_table_offset", 0, 8),
    ("l1_size", 8, 4),
    ("id_str_size", 12, 2),
    ("name_size", 14, 2),
    ("date_sec", 16, 4),
    ("date_nsec", 20, 4),
    ("vm_clock_nsec", 24, 8),
    ("vm_state_size", 32, 4),
    ("extra_data_size", 36, 4),
)
_SNAPSHOT_EXTRA = (("extra vm_state_size", 40, 8), ("extra disk_size", 48, 8), ("icount", 56, 8))
_BITMAP = (
    ("bitmap_table_offset", 0, 8),
    ("bitmap_table_size", 8, 4),
    ("flags", 12, 4),
    ("type", 16, 1),
    ("granularity_bits", 17, 1),
    ("name_size", 18, 2),
    ("extra_data_size", 20, 4),
)
_BITMAPS_EXTENSION = (
    ("nb_bitmaps", 8, 4),
    ("reserved", 12, 4),
    ("bitmap_directory_size", 16, 8),
    ("bitmap_directory_offset", 24, 8),
)


def fields(data: bytes | bytearray) -> list[Field]:
    """Every field that can be found."""
    found: list[Field] = []
    seen: set[tuple[int, int]] = set()
    for field in _Walk(data).all():
        place = (field.offset, field.width)
        if place not in seen and field.width > 0 and field.offset + field.width <= len(data):
            seen.add(place)
            found.append(field)
    return found


class _Walk:
    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        self.tables = 0

    def number(self, offset: int, form: str) -> int:
        """A big-endian number; 0 beyond the end."""
        if not 0 <= offset <= len(self.data) - struct.calcsize(form):
            return 0
        (value,) = struct.unpack_from(">" + form, self.data, offset)
        return int(value)

    def all(self) -> Iterator[Field]:
        yield from (Field(Group.HEADER, *field) for field in _HEADER)
        third = self.number(4, "I") > 2
        if third:
            yield from (Field(Group.HEADER, *field) for field in _HEADER_3)
        self.bits = min(max(self.number(20, "I"), 9), 21)
        self.cluster = 1 << self.bits
        self.words = 2 if third and self.number(72, "Q") & _EXTENDED else 1
        self.refcount_order = min(self.number(96, "I"), 6) if third else 4
        yield Field(Group.HEADER, "backing name", self.number(8, "Q"), self.number(16, "I"))
        yield from self.extensions(self.number(100, "I") if third else 72)
        yield from self.l1(self.number(40, "Q"), self.number(36, "I"), "L1")
        yield from self.refcounts()
        yield from self.snapshots()

    def entries(self, offset: int, count: int) -> Iterator[tuple[int, int]]:
        """Where the entries of a table are that are not zero, and a few that are; their values."""
        self.tables += 1
        if self.tables > _MOST_TABLES or offset >= len(self.data):
            return
        count = min(count, self.cluster // 8 * 4, (len(self.data) - offset) // 8)
        values = struct.unpack_from(f">{count}Q", self.data, offset)
        used = [index for index, value in enumerate(values) if value][:_MOST_ENTRIES]
        empty = [index for index, value in enumerate(values[: 4 * _MOST_ENTRIES]) if not value]
        for index in sorted(used + empty[:_EMPTY_ENTRIES]):
            yield offset + 8 * index, values[index]

    def extensions(self, at: int) -> Iterator[Field]:
        for _ in range(16):
            kind, length = self.number(at, "I"), self.number(at + 4, "I")
            yield Field(Group.EXTENSIONS, "extension type", at, 4)
            yield Field(Group.EXTENSIONS, "extension length", at + 4, 4)
            yield Field(Group.EXTENSIONS, "extension data", at + 8, length)
            if not kind or at + 8 + length > self.cluster:
                return
            if kind == _BITMAPS:
                for name, offset, width in _BITMAPS_EXTENSION:
                    yield Field(Group.BITMAPS, name, at + offset, width)
                yield from self.bitmaps(self.number(at + 24, "Q"), self.number(at + 8, "I"))
            at += 8 + length + -length % 8

    def l1(self, offset: int, size: int, name: str) -> Iterator[Field]:
        for at, value in self.entries(offset, size):
            yield Field(Group.L1, f"{name} entry", at, 8)
            if value & _OFFSET:
                yield from self.l2(value & _OFFSET)

    def l2(self, offset: int) -> Iterator[Field]:
        for at, value in self.entries(offset, self.cluster // 8):
            if self.words == 2 and (at - offset) % 16:
                yield Field(Group.L2, "subcluster bitmap", at, 8)
                continue
            yield Field(Group.L2, "L2 entry", at, 8)
            if value & _COMPRESSED:
                shift = 62 - (self.bits - 8)
                start = value & ((1 << shift) - 1)
                sectors = (value >> shift & ((1 << (self.bits - 8)) - 1)) + 1
                length = min(sectors * 512 - start % 512, len(self.data) - start)
                yield Field(Group.COMPRESSED, "compressed descriptor", at, 8)
                yield Field(Group.COMPRESSED, "start of a stream", start, 24)
                yield Field(Group.COMPRESSED, "stream", start, max(length, 25))

    def refcounts(self) -> Iterator[Field]:
        table = self.number(48, "Q")
        width = 1 << self.refcount_order
        for at, block in self.entries(table, self.number(56, "I") * self.cluster // 8):
            yield Field(Group.REFCOUNTS, "refcount table entry", at, 8)
            if not block:
                continue
            used = min(len(self.data) // self.cluster + 3, self.cluster * 8 // width, 128)
            step = max(width // 8, 1)
            for index in range(0, max(used * width // 8, 1), step):
                yield Field(Group.REFCOUNTS, "refcount", block + index, step)

    def snapshots(self) -> Iterator[Field]:
        at = self.number(64, "Q")
        for _ in range(min(self.number(60, "I"), 8)):
            extra = self.number(at + 36, "I")
            id_size, name_size = self.number(at + 12, "H"), self.number(at + 14, "H")
            for name, offset, width in _SNAPSHOT + _SNAPSHOT_EXTRA[: extra // 8]:
                yield Field(Group.SNAPSHOTS, f"snapshot {name}", at + offset, width)
            yield Field(Group.SNAPSHOTS, "snapshot id", at + 40 + extra, id_size)
            yield Field(Group.SNAPSHOTS, "snapshot name", at + 40 + extra + id_size, name_size)
            for field in self.l1(self.number(at, "Q"), self.number(at + 8, "I"), "snapshot L1"):
                yield attrs.evolve(field, group=Group.SNAPSHOTS)
            at += 40 + extra + id_size + name_size
            at += -at % 8

    def bitmaps(self, at: int, count: int) -> Iterator[Field]:
        for _ in range(min(count, 8)):
            for name, offset, width in _BITMAP:
                yield Field(Group.BITMAPS, f"bitmap {name}", at + offset, width)
            name_size, extra = self.number(at + 18, "H"), self.number(at + 20, "I")
            yield Field(Group.BITMAPS, "bitmap name", at + 24 + extra, name_size)
            for where, _value in self.entries(self.number(at, "Q"), self.number(at + 8, "I")):
                yield Field(Group.BITMAPS, "bitmap table entry", where, 8)
            at += 24 + extra + name_size
            at += -at % 8
