"""L1 and L2 tables in memory: where guest offsets fall in them, and what one entry says. Pure."""

from __future__ import annotations

import functools
import sys
from array import array
from collections.abc import Set as AbstractSet
from typing import Final, TypeAlias

import attrs

from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Header

__all__ = [
    "COMPRESSED",
    "DATA",
    "MIXED",
    "NOWHERE",
    "UNALLOCATED",
    "ZERO",
    "Geometry",
    "Run",
    "Table",
    "continues",
    "empty_table",
    "in_a_row",
    "packed",
    "swap",
]

#: 64-bit words in the machine's own order. An extended L2 entry takes two.
Table: TypeAlias = "array[int]"

# What a cluster is. Plain integers: bulk work keeps them in arrays.
UNALLOCATED: Final = 0
ZERO: Final = 1
DATA: Final = 2
COMPRESSED: Final = 3
#: Its subclusters differ.
MIXED: Final = 4

#: Where an entry that has no host offset points.
NOWHERE: Final = -1


#: What a range is, its host offset (or ``NOWHERE``; the L2 entry of compressed data), its bytes.
Run: TypeAlias = tuple[int, int, int]


def empty_table(words: int) -> Table:
    """A table of zero words, to be read into."""
    return array("Q", (0,)) * words


def swap(table: Table) -> None:
    """From the file's order to the machine's, or back, in place."""
    if sys.byteorder == "little":
        table.byteswap()


def packed(table: Table) -> bytes:
    """A table, or a part of one, as it stands on disk."""
    copy = table[:]
    swap(copy)
    return copy.tobytes()


def in_a_row(first: int, step: int, count: int) -> Table:
    """The entries ``first``, ``first + step`` and so on; faster than one by one, of a range."""
    ones, steps = _ladder(step, count)
    words = array("Q", (first * ones + steps).to_bytes(8 * count, "little"))
    if sys.byteorder == "big":
        words.byteswap()
    return words


@functools.lru_cache(maxsize=8)
def _ladder(step: int, count: int) -> tuple[int, int]:
    """Numbers of ``count`` digits of 64 bits: all of them one; each a ``step`` more, from 0 on."""
    ones = int.from_bytes((1).to_bytes(8, "little") * count, "little")
    steps = array("Q", range(0, step * count, step))
    if sys.byteorder == "big":
        steps.byteswap()
    return ones, int.from_bytes(steps.tobytes(), "little")


@attrs.frozen(kw_only=True)
class Geometry:
    """How one image's tables divide its disk, and which bits of their entries must be zero."""

    cluster_bits: int
    #: Bytes.
    cluster_size: int
    #: 64-bit words in an L2 entry: 2 with extended L2 entries.
    words: int
    #: Entries in an L2 table.
    l2_entries: int
    #: Guest offsets shifted by this are indexes into the L1 table.
    l1_shift: int
    #: Bytes; of a whole cluster where there are none.
    subcluster_size: int
    extended: bool
    #: Guest data lies in a file of its own.
    external: bool
    #: Bits that no standard cluster descriptor may have here: reserved ones, and those of a
    #: misaligned offset.
    standard_bad: int
    #: The same, and those that say it is no plain data.
    plain_bad: int
    #: Width of the offset in a compressed cluster descriptor.
    compressed_shift: int

    @classmethod
    def of(cls, header: Header) -> Geometry:
        """The geometry of a valid header."""
        bits = header.cluster_bits
        extended = header.extended_l2
        entry_bits = 4 if extended else 3
        bad = layout.L2_RESERVED | (layout.HOST_OFFSET & ((1 << bits) - 1))
        if extended or header.version < 3:  # noqa: PLR2004 (a version is its own best name)
            bad |= layout.ZERO
        return cls(
            cluster_bits=bits,
            cluster_size=1 << bits,
            words=2 if extended else 1,
            l2_entries=1 << (bits - entry_bits),
            l1_shift=2 * bits - entry_bits,
            subcluster_size=1 << (bits - layout.SUBCLUSTER_BITS if extended else bits),
            extended=extended,
            external=header.external_data_file,
            standard_bad=bad,
            plain_bad=bad | layout.ZERO | layout.COMPRESSED,
            compressed_shift=62 - (bits - 8),
        )

    # -- L1

    def l1_fault(self, entry: int, *, file_size: int, metadata: AbstractSet[int]) -> str | None:
        """What is wrong with a non-zero L1 entry, to complete "the L1 entry …"."""
        offset = entry & layout.HOST_OFFSET
        if entry & layout.L1_RESERVED:
            return "has reserved bits set"
        if offset & (self.cluster_size - 1):
            return "points into a cluster instead of at its start"
        if offset == 0 or offset in metadata:
            return "points at the image's own metadata"
        # A table is always written whole: if the file ends in it, its end is lost.
        if offset + self.cluster_size > file_size:
            return "points past the end of the file"
        return None

    # -- L2

    def fault(
        self, entry: int, bitmap: int, guest: int, *, file_end: int, metadata: AbstractSet[int]
    ) -> str | None:
        """What is wrong with an L2 entry, to complete "the L2 entry …".

        ``guest`` is the guest offset of its cluster, ``file_end`` the size of the file that holds
        the data, ``metadata`` the host offsets of known metadata clusters in it.
        """
        if entry & layout.COMPRESSED:
            return self._compressed_fault(entry, bitmap, file_end)
        return self._descriptor_fault(entry, guest) or self._data_fault(
            entry, bitmap, file_end, metadata
        )

    def _descriptor_fault(self, entry: int, guest: int) -> str | None:
        bad = entry & self.standard_bad
        if bad:
            if bad & layout.HOST_OFFSET:
                return "points into a cluster instead of at its start"
            return "has reserved bits set"
        offset = entry & layout.HOST_OFFSET
        if not offset and not entry & layout.COPIED:
            return None
        if self.external:
            if offset != guest:
                return "does not point at its own guest offset, as with a data file it must"
        elif not offset:
            return "points at the image's own metadata"
        return None

    def _data_fault(
        self, entry: int, bitmap: int, file_end: int, metadata: AbstractSet[int]
    ) -> str | None:
        kind, host = self.decode(entry, bitmap)
        if self.extended:
            allocated = bitmap & layout.ALL_ALLOCATED
            if allocated & bitmap >> layout.SUBCLUSTERS:
                return "has subclusters that are both allocated and zero"
            if allocated and host == NOWHERE:
                return "has allocated subclusters and no host offset"
            reads_data = allocated != 0
        else:
            reads_data = kind == DATA
        if reads_data and not self.external:
            if host in metadata:
                return "points at the image's own metadata"
            if host >= file_end:
                return "points past the end of the file"
        return None

    def _compressed_fault(self, entry: int, bitmap: int, file_end: int) -> str | None:
        if self.external:
            return "is compressed, which with a data file it must not be"
        if bitmap:
            return "is compressed and has subclusters"
        offset, _ = self.compressed(entry)
        if offset >= layout.HOST_OFFSET_LIMIT:
            return "has reserved bits set"
        if offset < self.cluster_size:
            return "points at the image's own metadata"
        if offset >= file_end:
            return "points past the end of the file"
        return None

    def decode(self, entry: int, bitmap: int) -> tuple[int, int]:
        """What a cluster is, and its host offset or ``NOWHERE``; of a compressed one, the entry."""
        if entry & layout.COMPRESSED:
            return COMPRESSED, entry
        offset = entry & layout.HOST_OFFSET
        host = offset if offset or (self.external and entry & layout.COPIED) else NOWHERE
        if self.extended:
            if bitmap == layout.ALL_ALLOCATED:
                return DATA, host
            if bitmap == 0:
                return UNALLOCATED, host
            return (ZERO if bitmap == layout.ALL_ZERO else MIXED), host
        if entry & layout.ZERO:
            return ZERO, offset or NOWHERE
        return (UNALLOCATED if host == NOWHERE else DATA), host

    def compressed(self, entry: int) -> tuple[int, int]:
        """Host offset and bytes of compressed data, up to the end of the last sector it uses."""
        shift = self.compressed_shift
        offset = entry & ((1 << shift) - 1)
        sectors = (entry >> shift & ((1 << (self.cluster_bits - 8)) - 1)) + 1
        return offset, sectors * layout.SECTOR - offset % layout.SECTOR

    def subcluster_run(self, bitmap: int, first: int) -> tuple[int, int]:
        """What the subcluster ``first`` is, and how many from it on are the same."""
        allocated = bitmap >> first & (layout.ALL_ALLOCATED >> first)
        zero = bitmap >> layout.SUBCLUSTERS + first
        if allocated & 1:
            return DATA, _trailing_ones(allocated)
        if zero & 1:
            return ZERO, _trailing_ones(zero)
        neither = ~(allocated | zero) & (layout.ALL_ALLOCATED >> first)
        return UNALLOCATED, _trailing_ones(neither)


def _trailing_ones(value: int) -> int:
    return (value ^ (value + 1)).bit_length() - 1


def continues(run: Run, further: Run) -> bool:
    """Whether ``further``, which follows ``run``, is more of the same."""
    kind, host, length = run
    if kind != further[0] or kind == COMPRESSED:
        return False
    return further[1] == (host if host == NOWHERE else host + length)
