"""Building new refcount structures, and where needed another table, where nothing is in use.

Nothing that is in use is touched until the header is switched to them, which is one write inside
one sector. What the old ones occupied is free from then on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from underlay.errors import LimitExceededError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.findings import Report
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.references import Clusters, Counts, References, pack_counts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay.handle import StorageHandle
    from underlay.steps import Steps

__all__ = ["Front", "Rebuild"]

#: Bytes written at once.
_BATCH: Final = 1 << 20
#: Where the header says where the refcount table is, and then where the snapshot table is.
_POINTER: Final = 48


@attrs.frozen
class Front:
    """Another table, which is built in front of the refcount structures."""

    #: For people.
    what: str
    #: That of the header which leads there.
    field: str
    data: bytes


class Rebuild:
    """New refcount structures for references that were counted without the old ones."""

    def __init__(
        self,
        image: StorageHandle,
        header: Header,
        references: References,
        report: Report,
        *,
        start: int,
        front: Front | None = None,
        clear: Callable[[int, int], int] = lambda start, _count: start,
        keep: Callable[[Clusters], NDArray[np.bool_]] = lambda clusters: clusters < 0,
    ) -> None:
        """From the cluster ``start`` on nothing is used, not even by the old structures.

        ``clear`` finds where so many clusters from there on are that nothing leads to either.
        ``keep`` tells which clusters nobody may be given, though no reference to them is counted.
        """
        self._image = image
        self._front = front
        self._front_clusters = -(-len(front.data) // header.cluster_size) if front else 0
        self._header = header
        self._references = references
        self._report = report
        self._cluster_size = header.cluster_size
        self._in_block = header.cluster_size * 8 // header.refcount_bits
        #: The indexes of the blocks that are needed, in order.
        self._blocks: list[int] = []
        self._start = start
        self._clear = clear
        self._keep = keep
        self.table_clusters = 0

    @property
    def table_offset(self) -> int:
        """The new refcount table's host offset."""
        return (self._start + self._front_clusters) * self._cluster_size

    @property
    def header(self) -> Header:
        """The header that leads to the new structures."""
        places = {} if self._front is None else {self._front.field: self._start_offset}
        return attrs.evolve(
            self._header,
            refcount_table_offset=self.table_offset,
            refcount_table_clusters=self.table_clusters,
            **places,  # type: ignore[arg-type]
        )

    @property
    def _start_offset(self) -> int:
        return self._start * self._cluster_size

    def plan(self) -> None:
        """Work out how much is needed, which depends on itself.

        Raises:
            LimitExceededError: the refcount table would be larger than any may be.
        """
        size, in_block = self._references.size, self._in_block
        if self._references.counts[self._start : size].any():
            raise ValueError(f"something is in use behind cluster {self._start}")
        used = {index for index in range(-(-size // in_block)) if self._in_use(index).any()}
        total = 0
        first = self._start // in_block
        while True:
            new = range(first, (self._start + total) // in_block + 1)
            needed = used.union(new)
            clusters = -(-(max(needed) + 1) * 8 // self._cluster_size)
            size = self._front_clusters + clusters + len(needed)
            start = self._clear(self._start, total)
            if size <= total and start == self._start:
                break
            total, self._start = max(size, total), start
        size = clusters * self._cluster_size
        if size > layout.REFCOUNT_TABLE_BYTES_MAX:
            raise LimitExceededError(
                f"'{self._image.name()}': its refcount table would take {size} bytes, more than "
                "8 MiB; convert the image into a new one",
                limit="refcount table",
                value=size,
                allowed=layout.REFCOUNT_TABLE_BYTES_MAX,
            )
        self._blocks = sorted(needed)
        self.table_clusters = clusters
        if self._front is not None:
            self._report.repair(f"write a new {self._front.what}", offset=self._start_offset)
        self._report.repair(
            f"write a new refcount table and {len(needed)} refcount blocks",
            offset=self.table_offset,
        )
        self._report.repair(
            "let the header lead there",
            offset=_POINTER,
            before=self._header.refcount_table_offset,
            after=self.table_offset,
        )

    @property
    def end(self) -> int:
        """The cluster behind the new structures."""
        tables = self.table_clusters + len(self._blocks)
        return self._start + self._front_clusters + tables

    async def write(self, steps: Steps) -> None:
        """Write the structures, then the pointer to them, each durable before the next.

        ``steps`` are the blocks.
        """
        image = self._image
        await self.write_structures(steps)
        await image.sync()
        new = self.header
        pointer = struct.pack(
            ">QIIQ",
            new.refcount_table_offset,
            new.refcount_table_clusters,
            new.nb_snapshots,
            new.snapshots_offset,
        )
        await image.write(pointer, _POINTER)
        await image.sync()

    async def write_structures(self, steps: Steps) -> None:
        """Write the structures, to be synced before anything leads there.

        ``steps`` are the blocks.
        """
        image, old_size = self._image, self._image.size()
        try:
            await self._write_structures(steps)
        except BaseException:
            if image.size() > old_size:
                await image.resize(old_size)
            raise

    async def _write_structures(self, steps: Steps) -> None:
        if self._front is not None:
            await self._image.write(self._front.data, self._start_offset)
        first_block = self.table_offset + self.table_clusters * self._cluster_size
        table = np.zeros(self.table_clusters * self._cluster_size // 8, np.uint64)
        places = np.arange(len(self._blocks), dtype=np.uint64) * np.uint64(self._cluster_size)
        table[self._blocks] = places + np.uint64(first_block)
        await self._image.write(table.astype(">u8").tobytes(), self.table_offset)
        batch = bytearray()
        at = first_block
        steps.expect(len(self._blocks))
        for index in self._blocks:
            steps.did()
            batch += pack_counts(self._block(index), self._header.refcount_bits)
            if len(batch) >= _BATCH:
                await self._image.write(batch, at)
                at += len(batch)
                batch = bytearray()
        await self._image.write(batch, at)

    def _block(self, index: int) -> Counts:
        """The counts of one block, the new structures' own clusters among them."""
        first = index * self._in_block
        counts = self._in_use(index)
        counts[max(self._start - first, 0) : max(self.end - first, 0)] = 1
        return counts

    def _in_use(self, index: int) -> Counts:
        """The same without them."""
        first = index * self._in_block
        counts = np.zeros(self._in_block, self._references.counts.dtype)
        known = self._references.counts[first : min(first + len(counts), self._references.size)]
        counts[: len(known)] = known
        unused = np.flatnonzero(counts[: max(self._start - first, 0)] == 0)
        counts[unused] = self._keep(first + unused)
        return counts
