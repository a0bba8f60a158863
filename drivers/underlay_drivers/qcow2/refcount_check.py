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

    def offsets(self, indexes: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The host offsets of blocks."""
        offsets = np.zeros(len(indexes), np.uint64)
        inside = indexes < len(self.table)
        offsets[inside] = self.table[indexes[inside]] & np.uint64(layout.REFCOUNT_BLOCK_OFFSET)
        return offsets

    def readable(self, indexes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether blocks lie where one can be."""
        offsets = self.offsets(indexes)
        fine: NDArray[np.bool_] = (offsets & np.uint64(self.cluster_size - 1)) == 0
        fine &= offsets < np.uint64(_OFFSET_END - self.cluster_size)
        return fine

    async def block(self, index: int) -> Counts | None:
        """The counts in a block, valid until the next call; None where there is no block."""
        offset = self.offset(index)
        return await self.block_at(offset) if offset else None

    async def block_at(self, offset: int) -> Counts:
        """The counts in the block at a host offset, valid until the next call."""
        await self._image.readv((self._buffer,), offset)
        return self.whole_block()

    def whole_block(self) -> Counts:
        """The counts of the last block that was read."""
        return unpack_counts(self._buffer, self.bits)


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
        #: Whether any count cannot be read.
        self.unknown = False

    # -- the structures

    def check_table(self) -> None:
        """Check the refcount table's entries, and count the blocks as references."""
        cluster_size = self.stored.cluster_size
        references = self._ledger.references
        used = np.flatnonzero(self.stored.table)
        entries = self.stored.table[used]
        offsets = entries & np.uint64(layout.REFCOUNT_BLOCK_OFFSET)
        clusters = (offsets // np.uint64(cluster_size)).astype(np.int64)
        odd = (entries != offsets) | (offsets % np.uint64(cluster_size) != 0)
        odd |= clusters >= references.size
        counts = np.ones(len(used), np.uint64)
        already = references.counts[clusters[~odd]] + _times_before(clusters[~odd])
        counts[~odd] = np.minimum(already + np.uint64(1), np.uint64(references.most))
        references.add(clusters[~odd])
        wrong = np.flatnonzero(odd | (counts != 1))
        self.rebuild = self.broken = bool(len(wrong))
        room = self._report.room
        for at in wrong[:room].tolist():
            self._broken_entry(int(used[at]), int(entries[at]), int(counts[at]))
        self._report.omit(corruptions=len(wrong[room:]))

    def _broken_entry(self, index: int, entry: int, count: int) -> None:
        offset = entry & layout.REFCOUNT_BLOCK_OFFSET
        if entry != offset:
            self._report.corruption(
                f"ERROR refcount table entry {index} has reserved bits set",
                f"entry {index} of the refcount table has reserved bits set",
                found=entry,
                expected=offset,
            )
        elif offset % self.stored.cluster_size:
            self._report.corruption(
                f"ERROR refcount block {index} is not cluster aligned; refcount table entry "
                "corrupted",
                f"entry {index} of the refcount table points into a cluster",
                found=offset,
            )
        elif count == 1:
            self._report.corruption(
                f"ERROR refcount block {index} is outside image",
                f"entry {index} of the refcount table points past the end of the file",
                found=offset,
            )
        else:
            self._report.corruption(
                f"ERROR refcount block {index} refcount={count}",
                f"refcount block {index} at {offset:#x} is used for something else too",
                offset=offset,
                found=count,
                expected=1,
            )

    # -- the counts

    @property
    def block_count(self) -> int:
        """How many refcount blocks the file needs at least."""
        return -(-self._ledger.references.size // self.stored.in_block)

    async def blocks(self) -> AsyncIterator[tuple[int, Counts | None, Counts]]:
        """The first cluster, the stored counts (None: all zero) and the references, by block."""
        references = self._ledger.references
        in_block = self.stored.in_block
        unreadable = set(self._unreadable_blocks().tolist())
        for index in range(self.block_count):
            if index in unreadable:
                continue
            first = index * in_block
            wanted = references.counts[first : min(first + in_block, references.size)]
            stored = await self.stored.block(index)
            yield first, None if stored is None else stored[: len(wanted)], wanted

    async def compare(
        self, steps: Steps, *, mend_leaks: bool, mend_errors: bool, keep: bool
    ) -> None:
        """Report every difference. Unless told to ``keep`` them, references become what is stored.

        ``steps`` are the blocks. With ``mend_…`` a difference is reported as one that gets mended.
        """
        async for first, block, wanted in self.blocks():
            steps.did()
            if block is None and not wanted.any():
                continue
            stored = np.zeros(len(wanted), np.uint8) if block is None else block
            self._note_highest(first, stored, wanted)
            differs = np.flatnonzero(stored != wanted)
            if len(differs):
                self._differences(
                    first + differs,
                    stored[differs],
                    wanted[differs],
                    mend_leaks=mend_leaks,
                    mend_errors=mend_errors,
                )
                if not keep:
                    self._ledger.references.make_room(int(stored.max()))
                    self._ledger.references.counts[first : first + len(stored)] = stored
        for index in self._unreadable_blocks().tolist():
            self._unreadable(index)

    def _note_highest(self, first: int, stored: Counts, wanted: Counts) -> None:
        last = len(wanted) - 1
        if not stored[last] and not wanted[last]:
            used = np.flatnonzero((stored != 0) | (wanted != 0))
            if not len(used):
                return
            last = int(used[-1])
        self.highest = max(self.highest, first + last)

    def _differences(
        self,
        clusters: Clusters,
        stored: Counts,
        wanted: Counts,
        *,
        mend_leaks: bool,
        mend_errors: bool,
    ) -> None:
        leaks = stored > wanted
        self.differs = True
        self.rebuild |= not stored.all()
        self.corruptions += int(np.count_nonzero(~leaks))
        room = self._report.room
        heard = clusters[:room]
        lowered = leaks[:room] & ~self._ledger.leads_beyond(heard)
        raised = ~leaks[:room] & (stored[:room] != 0)
        mended = lowered & mend_leaks | raised & mend_errors
        differences = (heard, stored[:room], wanted[:room], mended)
        for cluster, has, needs, is_mended in zip(
            *(one.tolist() for one in differences), strict=True
        ):
            self._difference(cluster, has, needs, mended=is_mended)
        unheard = leaks[room:]
        found = int(np.count_nonzero(unheard))
        self._report.omit(corruptions=len(unheard) - found, leaks=found)

    def _difference(self, cluster: int, stored: int, wanted: int, *, mended: bool) -> None:
        offset = cluster * self.stored.cluster_size
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
            self._report.corruption(
                f"{Verb.REPAIRING if mended else Verb.ERROR} {counts}",
                f"the cluster at {offset:#x} has {wanted} references, and a refcount of {stored}",
                offset=offset,
                found=stored,
                expected=wanted,
            )

    def _unreadable_blocks(self) -> NDArray[np.intp]:
        """The numbers of the blocks that lie where none can be, as far as the file needs them."""
        present = min(self.block_count, len(self.stored.table))
        return np.flatnonzero(~self.stored.readable(np.arange(present)))

    def _unreadable(self, index: int) -> None:
        """Tell of each cluster whose refcount would be in a block."""
        self.unknown = True
        first = index * self.stored.in_block
        end = min(first + self.stored.in_block, self._ledger.references.size)
        heard = min(end, first + self._report.room)
        for cluster in range(first, heard):
            self._report.error(
                f"Can't get refcount for cluster {cluster}: {os.strerror(EIO)}",
                f"the refcount of the cluster at {cluster * self.stored.cluster_size:#x} is in a "
                "block that lies where none can be",
                offset=cluster * self.stored.cluster_size,
            )
        self._report.omit(check_errors=end - heard)

    # -- what COPIED is judged by

    async def of(self, clusters: Clusters) -> tuple[Counts, NDArray[np.bool_]]:
        """The refcount of each cluster, and whether it can be told."""
        references = self._ledger.references
        counts = np.zeros(len(clusters), np.uint64)
        inside = clusters < references.size
        counts[inside] = references.counts[clusters[inside]]
        blocks = clusters // self.stored.in_block
        known = self.stored.readable(blocks)
        # What is past the end is looked up block by block, however many entries lead to one.
        beyond = np.flatnonzero(known & ~inside)
        hosts = self.stored.offsets(blocks[beyond])
        for host in np.unique(hosts[(hosts > 0) & (hosts < self._ledger.file_length)]).tolist():
            there = beyond[hosts == host]
            block = await self.stored.block_at(host)
            counts[there] = block[clusters[there] % self.stored.in_block]
        return counts, known


def _times_before(numbers: Clusters) -> NDArray[np.uint64]:
    """How often each number has been there before."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    before = np.zeros(len(numbers), np.uint64)
    before[order] = np.arange(len(numbers)) - np.searchsorted(ordered, ordered)
    return before
