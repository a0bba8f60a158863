"""Checking reference counts as they are stored against references as they were counted."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from errno import EIO
from typing import TYPE_CHECKING, Final

import numpy as np

from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.findings import Report, Verb
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.ledger import Ledger
from underlay_drivers.qcow2.references import Clusters, Counts, unpack_counts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay.handle import StorageHandle
    from underlay.steps import Steps

__all__ = ["RefcountCheck", "StoredRefcounts"]

_OFFSET_END: Final = 1 << 63


class StoredRefcounts:
    """The refcount table, and the blocks that it leads to."""

    __slots__ = ("_buffer", "_image", "bits", "cluster_size", "in_block", "table")

    def __init__(self, image: StorageHandle, header: Header, table: Counts) -> None:
        self._image = image
        self.table = table
        self.bits = header.refcount_bits
        self.cluster_size = header.cluster_size
        #: Refcounts in one block.
        self.in_block = header.cluster_size * 8 // header.refcount_bits
        self._buffer = bytearray(header.cluster_size)

    @classmethod
    async def load(cls, image: StorageHandle, header: Header) -> StoredRefcounts:
        """Read the table; what lies past the end of the file is zero."""
        length = header.refcount_table_clusters * header.cluster_size
        data = await image.read_bytes(header.refcount_table_offset, length)
        return cls(image, header, np.frombuffer(data, ">u8").astype(np.uint64))

    def offset(self, index: int) -> int:
        """The host offset of a block: 0 if there is none."""
        if index >= len(self.table):
            return 0
        return int(self.table[index]) & layout.REFCOUNT_BLOCK_OFFSET

    def readable(self, index: int) -> bool:
        """Whether a block lies where one can be."""
        offset = self.offset(index)
        return not offset % self.cluster_size and offset + self.cluster_size < _OFFSET_END

    async def block(self, index: int) -> Counts | None:
        """The counts in a block, valid until the next call; None where there is no block."""
        offset = self.offset(index)
        if not offset:
            return None
        await self._image.readv((self._buffer,), offset)
        return unpack_counts(self._buffer, self.bits)

    def whole_block(self) -> Counts:
        """The counts of the last block that was read."""
        return unpack_counts(self._buffer, self.bits)

    async def one(self, cluster: int) -> int | None:
        """The refcount of one cluster, or None if it cannot be told."""
        index, within = divmod(cluster, self.in_block)
        if not self.readable(index):
            return None
        block = await self.block(index)
        return 0 if block is None else int(block[within])


class RefcountCheck:
    """Compares, and then knows what the COPIED bits are to be judged by."""

    __slots__ = (
        "_ledger",
        "_report",
        "broken",
        "corruptions",
        "differs",
        "highest",
        "rebuild",
        "stored",
        "unknown",
    )

    def __init__(self, stored: StoredRefcounts, ledger: Ledger, report: Report) -> None:
        self.stored = stored
        self._ledger = ledger
        self._report = report
        #: How many refcounts are too low.
        self.corruptions = 0
        #: The last cluster that is in use.
        self.highest = 0
        #: Whether nothing less than new refcount structures can mend the image.
        self.rebuild = False
        #: Whether the refcount table itself is wrong.
        self.broken = False
        #: Whether any count is not what it should be.
        self.differs = False
        #: Clusters, from the first to before the last, whose refcount cannot be read.
        self.unknown: list[tuple[int, int]] = []

    # -- the structures

    def check_table(self) -> None:
        """Check the refcount table's entries, and count the blocks as references."""
        cluster_size = self.stored.cluster_size
        references = self._ledger.references
        for index in np.flatnonzero(self.stored.table).tolist():
            entry = int(self.stored.table[index])
            offset = entry & layout.REFCOUNT_BLOCK_OFFSET
            cluster = offset // cluster_size
            if entry != offset:
                self._broken(
                    f"ERROR refcount table entry {index} has reserved bits set",
                    f"entry {index} of the refcount table has reserved bits set",
                    found=entry,
                    expected=offset,
                )
            elif offset % cluster_size:
                self._broken(
                    f"ERROR refcount block {index} is not cluster aligned; refcount table entry "
                    "corrupted",
                    f"entry {index} of the refcount table points into a cluster",
                    found=offset,
                )
            elif cluster >= references.size:
                self._broken(
                    f"ERROR refcount block {index} is outside image",
                    f"entry {index} of the refcount table points past the end of the file",
                    found=offset,
                )
            else:
                self._ledger.region("a refcount block", offset, cluster_size)
                count = references.at(cluster)
                if count != 1:
                    self._broken(
                        f"ERROR refcount block {index} refcount={count}",
                        f"refcount block {index} at {offset:#x} is used for something else too",
                        offset=offset,
                        found=count,
                        expected=1,
                    )

    def _broken(
        self,
        line: str,
        what: str,
        *,
        found: int,
        offset: int | None = None,
        expected: int | None = None,
    ) -> None:
        self.rebuild = self.broken = True
        self._report.corruption(line, what, offset=offset, found=found, expected=expected)

    # -- the counts

    @property
    def block_count(self) -> int:
        """How many refcount blocks the file needs at least."""
        return -(-self._ledger.references.size // self.stored.in_block)

    async def blocks(self) -> AsyncIterator[tuple[int, Counts | None, Counts]]:
        """The first cluster, the stored counts (None: all zero) and the references, by block."""
        references = self._ledger.references
        in_block = self.stored.in_block
        for index in range(self.block_count):
            first = index * in_block
            wanted = references.counts[first : min(first + in_block, references.size)]
            if not self.stored.readable(index):
                self.unknown.append((first, first + len(wanted)))
                continue
            stored = await self.stored.block(index)
            yield first, None if stored is None else stored[: len(wanted)], wanted

    async def compare(
        self, steps: Steps, *, mend_leaks: bool, mend_errors: bool, keep: bool
    ) -> None:
        """Report every difference. Unless told to ``keep`` them, references become what is stored.

        ``steps`` are the blocks.

        With ``mend_…`` a difference is reported as one that gets mended.
        """
        async for first, block, wanted in self.blocks():
            steps.did()
            if block is None and not wanted.any():
                continue
            stored = np.zeros(len(wanted), np.uint8) if block is None else block
            self._note_highest(first, stored, wanted)
            differs = stored != wanted
            if differs.any():
                self.differs = True
                for index in np.flatnonzero(differs).tolist():
                    self._difference(
                        first + index,
                        int(stored[index]),
                        int(wanted[index]),
                        mend_leaks=mend_leaks,
                        mend_errors=mend_errors,
                    )
                if not keep:
                    self._ledger.references.make_room(int(stored.max()))
                    self._ledger.references.counts[first : first + len(stored)] = stored
        for first, end in self.unknown:
            self._unreadable(first, end)

    def _note_highest(self, first: int, stored: Counts, wanted: Counts) -> None:
        last = len(wanted) - 1
        if not stored[last] and not wanted[last]:
            used = np.flatnonzero((stored != 0) | (wanted != 0))
            if not len(used):
                return
            last = int(used[-1])
        self.highest = max(self.highest, first + last)

    def _difference(
        self, cluster: int, stored: int, wanted: int, *, mend_leaks: bool, mend_errors: bool
    ) -> None:
        offset = cluster * self.stored.cluster_size
        if stored == 0:
            self.rebuild = True
            mended = False
        else:
            mended = mend_leaks if stored > wanted else mend_errors
        counts = f"cluster {cluster} refcount={stored} reference={wanted}"
        if stored > wanted:
            self._report.leak(
                f"{Verb.REPAIRING if mended else Verb.LEAKED} {counts}",
                f"the cluster at {offset:#x} has a refcount of {stored}, and {wanted} references",
                offset=offset,
                found=stored,
                expected=wanted,
            )
        else:
            self.corruptions += 1
            self._report.corruption(
                f"{Verb.REPAIRING if mended else Verb.ERROR} {counts}",
                f"the cluster at {offset:#x} has {wanted} references, and a refcount of {stored}",
                offset=offset,
                found=stored,
                expected=wanted,
            )

    def _unreadable(self, first: int, end: int) -> None:
        for cluster in range(first, end):
            self._report.error(
                f"Can't get refcount for cluster {cluster}: {os.strerror(EIO)}",
                f"the refcount of the cluster at {cluster * self.stored.cluster_size:#x} is in a "
                "block that lies where none can be",
                offset=cluster * self.stored.cluster_size,
            )

    # -- what COPIED is judged by

    async def is_one(self, clusters: Clusters) -> NDArray[np.bool_]:
        """Which clusters have a refcount of exactly one."""
        references = self._ledger.references
        inside = clusters < references.size
        ones = np.zeros(len(clusters), np.bool_)
        ones[inside] = references.counts[clusters[inside]] == 1
        for index in np.flatnonzero(~inside).tolist():
            ones[index] = await self.stored.one(int(clusters[index])) == 1
        return ones

    def is_known(self, clusters: Clusters) -> NDArray[np.bool_]:
        """Which clusters have a refcount that can be read."""
        known = np.ones(len(clusters), np.bool_)
        for first, end in self.unknown:
            known &= (clusters < first) | (clusters >= end)
        return known

    async def refcount(self, cluster: int) -> int | None:
        """The refcount of one cluster, or None if it cannot be told."""
        if any(first <= cluster < end for first, end in self.unknown):
            return None
        references = self._ledger.references
        if cluster < references.size:
            return references.at(cluster)
        return await self.stored.one(cluster)
