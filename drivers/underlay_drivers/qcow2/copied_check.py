"""Judging the COPIED bits of the active tables by the refcounts. With numpy.

The bit says that a refcount is exactly one, so that what it is about is written in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.entry_faults import Entries
from underlay_drivers.qcow2.findings import Report, Verb
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.l1_check import L1Check
from underlay_drivers.qcow2.ledger import Ledger
from underlay_drivers.qcow2.loading import load_words
from underlay_drivers.qcow2.refcount_check import RefcountCheck
from underlay_drivers.qcow2.references import Clusters, Counts
from underlay_drivers.qcow2.table_check import TableCheck
from underlay_drivers.qcow2.table_uses import hosts_of
from underlay_drivers.qcow2.tables import Geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay.handle import StorageHandle
    from underlay.steps import Steps
    from underlay_drivers.qcow2.bulk import Words

__all__ = ["CopiedCheck", "first_of"]


@attrs.frozen(kw_only=True)
class CopiedCheck:
    """What a check has counted, as far as COPIED bits are judged by it."""

    image: StorageHandle
    header: Header
    l1: L1Check
    tables: TableCheck
    ledger: Ledger
    refcounts: RefcountCheck
    report: Report

    def is_right(self) -> bool:
        """Whether all bits are already known to fit, as of most images."""
        if self.refcounts.differs or self.refcounts.unknown or not self.tables.all_copied:
            return False
        entries = self.l1.active[(self.l1.active & np.uint64(layout.HOST_OFFSET)) != 0]
        copied = bool(((entries & np.uint64(layout.COPIED)) != 0).all())
        return copied and int(self.ledger.references.counts.max()) == 1

    async def judge(self, steps: Steps) -> None:
        """Report each bit that does not fit. ``steps`` are the entries of the L1 table."""
        if self.is_right():
            return
        begun = steps.done
        steps.expect(len(self.l1.active))
        for numbers, first in self.l1.active_entries():
            hosts = hosts_of(self.l1.active[numbers])
            uses = self.l1.active_uses(hosts)
            wrong, counts = await self.wrong_l1_entries(numbers)
            heard = first_of(wrong, self.report.room)
            self.report.omit(corruptions=int(np.count_nonzero(wrong & ~heard)))
            for index in np.flatnonzero(heard | first).tolist():
                if heard[index]:
                    self._wrong_l1_entry(int(numbers[index]), int(counts[index]))
                if first[index] and hosts[index]:
                    await self._judge_table(int(hosts[index]), int(uses[index]))
                steps.reach(begun + int(numbers[index]) + 1)

    def _wrong_l1_entry(self, number: int, count: int) -> None:
        entry = int(self.l1.active[number])
        self.report.corruption(
            f"{Verb.ERROR} OFLAG_COPIED L2 cluster: l1_index={number} "
            f"l1_entry={entry:x} refcount={count}",
            f"the COPIED bit of L1 entry {number} does not fit the refcount {count}",
            offset=self.header.l1_table_offset + number * 8,
            found=entry,
            expected=entry ^ layout.COPIED,
        )

    async def _judge_table(self, where: int, times: int) -> None:
        _, found = await self.load_table(where)
        wrong, counts = await self.wrong_l2_entries(found)
        room = self.report.room
        for index, count in zip(wrong[:room].tolist(), counts[:room].tolist(), strict=True):
            entry = int(found.entries[index])
            self.report.corruption(
                f"{Verb.ERROR} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={count}",
                f"the COPIED bit of the L2 entry does not fit the refcount {count}",
                offset=where + index * 8 * Geometry.of(self.header).words,
                found=entry,
                expected=entry ^ layout.COPIED,
                times=times,
            )
        self.report.omit(corruptions=len(wrong[room:]) * times)

    # -- for a repair, too

    async def load_table(self, where: int) -> tuple[Words, Entries]:
        """The L2 table at a host offset, as an array that may be changed, and its entries."""
        words = await load_words(self.image, where, self.header.cluster_size // 8)
        return words, Entries.of(words, Geometry.of(self.header))

    async def wrong_l1_entries(self, numbers: Clusters) -> tuple[NDArray[np.bool_], Counts]:
        """Which of these entries of the active table are wrong, and the refcount of each."""
        entries = self.l1.active[numbers]
        hosts = hosts_of(entries)
        counts, known = await self.refcounts.of(hosts >> self.header.cluster_bits)
        copied = (entries & np.uint64(layout.COPIED)) != 0
        return known & (hosts != 0) & ((counts == 1) != copied), counts

    async def wrong_l2_entries(self, found: Entries) -> tuple[Clusters, Counts]:
        """The numbers of a table's entries that are wrong, and the refcount of each."""
        numbers = np.flatnonzero(found.allocated)
        if self.header.external_data_file:
            numbers = numbers[~found.copied[numbers]]
            return numbers, np.ones(len(numbers), np.uint64)
        clusters = found.offsets[numbers] >> self.header.cluster_bits
        counts, known = await self.refcounts.of(clusters)
        wrong = known & ((counts == 1) != found.copied[numbers])
        return numbers[wrong], counts[wrong]


def first_of(marks: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """No more of the marks than so many, from the first on."""
    kept = marks.copy()
    kept[np.flatnonzero(marks)[count:]] = False
    return kept
