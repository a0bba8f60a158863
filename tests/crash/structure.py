"""A second opinion on qcow2 metadata: small, from the specification alone, for small images.

It shares nothing with the driver, so that one mistake cannot hide itself. Every reference to a host
cluster is counted and set beside the image's own reference counts, as ``qemu-img check`` does.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence

import attrs

from .bitmaps import Seen

__all__ = ["TooMuchError", "Verdict", "look_at"]

_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_L1_RESERVED = 0x7F00_0000_0000_01FF
_L2_RESERVED = 0x3F00_0000_0000_01FE
_DATA_FILE = 1 << 2
_EXTENDED = 1 << 4
_BITMAPS = 0x23852875
_BITMAP_RESERVED = 0xFF00_0000_0000_01FE
#: Entries of all tables together, beyond which an image is not small.
_MOST_ENTRIES = 1 << 20


class TooMuchError(Exception):
    """This image is not small."""


@attrs.define
class Verdict:
    """What is wrong with an image."""

    corruptions: list[str] = attrs.field(factory=list[str])
    #: The image says that it was not closed properly, so that opening it for writing mends it.
    dirty: bool = False
    #: Entries whose bit COPIED disagrees with a count, and that do no harm: a cluster will be
    #: copied in vain, or is counted too high.
    flags: list[str] = attrs.field(factory=list[str])
    #: The names of its bitmaps, and those that say that they are up to date.
    bitmap_names: set[str] = attrs.field(factory=set[str])
    bitmaps: dict[str, Seen] = attrs.field(factory=dict[str, "Seen"])
    #: Host clusters that nothing refers to and that are counted as used.
    leaks: list[int] = attrs.field(factory=list[int])

    @property
    def faults(self) -> list[str]:
        """Everything but leaks."""
        dirty = ["it is marked as dirty"] if self.dirty else []
        return self.corruptions + self.flags + dirty


def look_at(image: bytes) -> Verdict:
    """Count every reference and compare."""
    return _Look(image).verdict()


class _Look:
    def __init__(self, image: bytes) -> None:
        self.image = image
        self.found = Verdict()
        self.references: Counter[int] = Counter()
        self.entries = 0
        #: What has the COPIED flag, or could have it: what refers, its flag, the cluster.
        self.copied: list[tuple[str, bool, int]] = []

    def verdict(self) -> Verdict:
        if self.image[:4] != b"QFI\xfb":
            self.bad("there is no header")
            return self.found
        self.header()
        self.reference(0, self.cluster, "the header")
        self.count_tables()
        self.l1(self.l1_offset, self.l1_size, "the active L1 table", active=True)
        self.snapshots()
        self.bitmaps()
        self.compare()
        return self.found

    def bad(self, what: str) -> None:
        self.found.corruptions.append(what)

    def header(self) -> None:
        fields = struct.unpack_from(">4sIQIIQIIQQIIQ", self.image)
        self.version, self.size = fields[1], fields[5]
        self.bits = fields[4]
        self.cluster = 1 << self.bits
        self.l1_size, self.l1_offset = fields[7], fields[8]
        self.table_offset, self.table_clusters = fields[9], fields[10]
        self.snapshot_count, self.snapshots_offset = fields[11], fields[12]
        third = (0, 0, 0, 4, 72)
        if self.version > 2:
            third = struct.unpack_from(">QQQII", self.image, 72)
        self.incompatible, self.autoclear = third[0], third[2]
        self.width = 1 << third[3]
        self.header_length = third[4]
        self.found.dirty = bool(self.incompatible & 1)
        if self.incompatible & 2:
            self.bad("it is marked as corrupt")
        self.extended = bool(self.incompatible & _EXTENDED)
        self.external = bool(self.incompatible & _DATA_FILE)

    # -- references

    def reference(self, offset: int, length: int, what: str) -> None:
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        for cluster in range(first, last + 1):
            if cluster << self.bits >= len(self.image):
                self.bad(f"{what} refers to cluster {cluster}, past the end of the file")
                return
            self.references[cluster] += 1

    def words(self, offset: int, count: int) -> tuple[int, ...]:
        """Numbers of a table; past the end of the file they are zero."""
        self.entries += count
        if self.entries > _MOST_ENTRIES:
            raise TooMuchError
        raw = self.image[offset : offset + count * 8]
        return struct.unpack(f">{count}Q", raw.ljust(count * 8, b"\0"))

    def whole(self, offset: int, what: str) -> bool:
        """Whether a pointer is to a cluster's start, inside the file."""
        if offset & (self.cluster - 1) or not offset:
            self.bad(f"{what} is {offset:#x}, which is no cluster")
            return False
        return True

    def count_tables(self) -> None:
        """The refcount table and its blocks; they refer to themselves."""
        self.blocks: dict[int, int] = {}
        if not self.whole(self.table_offset, "the refcount table's offset"):
            return
        length = self.table_clusters * self.cluster
        self.reference(self.table_offset, length, "the header (refcount table)")
        for index, entry in enumerate(self.words(self.table_offset, length // 8)):
            if entry and self.whole(entry, f"refcount table entry {index}"):
                self.reference(entry, self.cluster, f"refcount table entry {index}")
                self.blocks[index] = entry

    def l1(self, offset: int, count: int, what: str, *, active: bool) -> None:
        if not count:
            return
        if not self.whole(offset, f"the offset of {what}"):
            return
        self.reference(offset, count * 8, what)
        for index, entry in enumerate(self.words(offset, count)):
            table = entry & _OFFSET
            name = f"{what}, entry {index}"
            if not entry:
                continue
            if entry & _L1_RESERVED:
                self.bad(f"{name} has reserved bits: {entry:#x}")
            if self.whole(table, name):
                self.reference(table, self.cluster, name)
                if active:
                    self.copied.append((name, bool(entry & _COPIED), table >> self.bits))
                self.l2(table, name, active=active, index=index)

    def l2(self, table: int, what: str, *, active: bool, index: int) -> None:
        words = 2 if self.extended else 1
        count = self.cluster // 8
        entries = self.words(table, count)
        for number in sorted({at - at % words for at, value in enumerate(entries) if value}):
            entry = entries[number]
            bitmap = entries[number + 1] if self.extended else 0
            name = f"{what}, L2 entry {number // words}"
            if entry & _COMPRESSED:
                self.compressed(entry, bitmap, name)
                continue
            guest = (index * (count // words) + number // words) << self.bits
            self.standard(entry, bitmap, guest, name, active=active)

    def standard(self, entry: int, bitmap: int, guest: int, name: str, *, active: bool) -> None:
        if entry & _L2_RESERVED or (entry & 1 and (self.extended or self.version < 3)):
            self.bad(f"{name} has reserved bits: {entry:#x}")
        if bitmap & bitmap >> 32 & 0xFFFF_FFFF:
            self.bad(f"{name} has subclusters that are both data and zero")
        host = entry & _OFFSET
        if self.external:
            if entry & (_OFFSET | _COPIED) and host != guest:
                self.bad(f"{name} is {entry:#x}, not its guest offset {guest:#x}")
        elif not host:
            if entry & _COPIED or bitmap & 0xFFFF_FFFF:
                self.bad(f"{name} is data at nothing: {entry:#x}")
        elif self.whole(host, name):
            self.reference(host, self.cluster, name)
            if active:
                self.copied.append((name, bool(entry & _COPIED), host >> self.bits))

    def compressed(self, entry: int, bitmap: int, name: str) -> None:
        shift = 62 - (self.bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = (entry >> shift & ((1 << (self.bits - 8)) - 1)) + 1
        if entry & _COPIED or bitmap:
            self.bad(f"{name} is compressed, and has other flags: {entry:#x}")
        if self.external:
            self.bad(f"{name} is compressed, with a data file: {entry:#x}")
        if bitmap or self.external:
            return  # nobody reads that, and nobody counts it
        start = offset & ~511
        self.reference(start, sectors * 512, name)

    def snapshots(self) -> None:
        if not self.snapshot_count:
            return
        at = self.snapshots_offset
        if not self.whole(at, "the snapshot table's offset"):
            return
        for number in range(self.snapshot_count):
            if at + 40 > len(self.image):
                self.bad("the snapshot table is cut")
                return
            fields = struct.unpack_from(">QIHHIIQII", self.image, at)
            self.l1(fields[0], fields[1], f"the L1 table of snapshot {number}", active=False)
            at += 40 + fields[8] + fields[2] + fields[3]
            at += -at % 8
        self.reference(self.snapshots_offset, at - self.snapshots_offset, "the snapshot table")

    def extensions(self) -> Iterator[tuple[int, bytes]]:
        at = self.header_length
        while at + 8 <= self.cluster:
            kind, length = struct.unpack_from(">II", self.image, at)
            if not kind:
                return
            yield kind, self.image[at + 8 : at + 8 + length]
            at += 8 + length + -length % 8

    def bitmaps(self) -> None:
        if not self.autoclear & 1:
            return
        for kind, data in self.extensions():
            if kind == _BITMAPS:
                count, _, size, at = struct.unpack(">IIQQ", data)
                if not self.whole(at, "the bitmap directory"):
                    continue
                self.reference(at, size, "the bitmap directory")
                for number in range(count):
                    if at + 24 > len(self.image):
                        self.bad("the bitmap directory is cut")
                        return
                    fields = struct.unpack_from(">QIIBBHI", self.image, at)
                    bits = self.bitmap(fields[0], fields[1], f"bitmap {number}")
                    start = at + 24 + fields[6]
                    at = start + fields[5]
                    name = self.image[start:at].decode(errors="replace")
                    self.found.bitmap_names.add(name)
                    if not fields[2] & 1:
                        seen = Seen(bool(fields[2] & 2), 1 << fields[4], bits)
                        self.found.bitmaps[name] = seen
                    at += -at % 8

    def bitmap(self, table: int, entries: int, what: str) -> bytes:
        bits = b""
        if self.whole(table, what):
            self.reference(table, entries * 8, what)
            if entries * self.cluster > _MOST_ENTRIES * 8:
                raise TooMuchError
            for entry in self.words(table, entries):
                host = entry & _OFFSET
                if entry & _BITMAP_RESERVED or (host and entry & (self.cluster - 1)):
                    self.bad(f"{what} has an entry that makes no sense: {entry:#x}")
                elif host:
                    self.reference(host, self.cluster, what)
                    bits += self.image[host : host + self.cluster].ljust(self.cluster, b"\0")
                else:
                    bits += (b"\xff" if entry & 1 else b"\0") * self.cluster
        return bits

    # -- the image's own counts

    def refcounts(self) -> list[int]:
        """The image's own count for every cluster of the file."""
        clusters = -(-len(self.image) // self.cluster)
        in_block = self.cluster * 8 // self.width
        counts: list[int] = []
        for index in range(-(-clusters // in_block)):
            block = self.blocks.get(index)
            raw = b"" if block is None else self.image[block : block + self.cluster]
            needed = -(-min(clusters - len(counts), in_block) * self.width // 64) * 8
            counts += _numbers(raw.ljust(self.cluster, b"\0")[:needed], self.width)
        return counts[:clusters]

    def compare(self) -> None:
        counts = self.refcounts()
        for cluster, said in enumerate(counts):
            counted = self.references[cluster]
            if counted > said:
                self.bad(f"cluster {cluster} has refcount {said} and {counted} references")
            elif counted < said:
                self.found.leaks.append(cluster)
        for name, flag, cluster in self.copied:
            said = counts[cluster] if cluster < len(counts) else 0
            if flag != (said == 1):
                what = f"{name} has COPIED={flag:d}, and its cluster {cluster} refcount {said}"
                if flag and self.references[cluster] > 1:
                    self.bad(what)  # writing there changes what others see
                else:
                    self.found.flags.append(what)


def _numbers(block: bytes, width: int) -> Sequence[int]:
    """The numbers of so many bits in a refcount block."""
    if width < 8:
        mask = (1 << width) - 1
        return [byte >> shift & mask for byte in block for shift in range(0, 8, width)]
    return struct.unpack(f">{len(block) * 8 // width}{' BH I   Q'[width // 8]}", block)
