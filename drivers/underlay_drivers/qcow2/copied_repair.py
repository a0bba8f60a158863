"""Mending the COPIED bits of the active tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.check import Checker
from underlay_drivers.qcow2.copied_check import first_of
from underlay_drivers.qcow2.findings import Report, Verb
from underlay_drivers.qcow2.references import Clusters
from underlay_drivers.qcow2.table_uses import hosts_of
from underlay_drivers.qcow2.tables import Geometry
from underlay_drivers.qcow2.validation import metadata_regions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay.steps import Steps
    from underlay_drivers.qcow2.bulk import Words

__all__ = ["CopiedRepair"]


class CopiedRepair:
    """Makes COPIED bits fit the refcounts, as these will be when the repair is done.

    To clear one is always safe: the next write then copies. To set one is right only when the
    refcount *is* one, so that is a step of its own.
    """

    __slots__ = ("_apply", "_check", "_doubtful", "_report")

    def __init__(self, checker: Checker, report: Report, *, apply: bool, doubtful: bool) -> None:
        """In an image that stays ``doubtful``, tables that may be something else are left alone."""
        self._check = checker.copied()
        self._report = report
        self._apply = apply
        self._doubtful = doubtful

    async def mend(self, steps: Steps, *, setting: bool) -> int:
        """Set, or clear, the bits for which that is right; how many there were.

        ``steps`` are the tables.
        """
        mended = await self._mend(steps, setting=setting)
        if mended and self._apply:
            await self._check.image.sync()
        steps.end()
        return mended

    async def _mend(self, steps: Steps, *, setting: bool) -> int:
        l1, header = self._check.l1, self._check.header
        if self._check.is_right():
            return 0
        place, length = header.l1_table_offset, header.l1_size * 8
        if not self._may_be_tables(np.array([place]), length, own="L1 table").all():
            return 0
        if self._doubtful and not l1.is_alone():
            return 0
        mended = 0
        steps.expect(len(l1.active))
        for numbers, first in l1.active_entries():
            hosts = hosts_of(l1.active[numbers])
            mendable = self._are_tables(hosts)
            wrong, counts = await self._check.wrong_l1_entries(numbers)
            wrong &= mendable & ((counts == 1) == setting)
            heard = self._heard(wrong)
            for index in np.flatnonzero(heard | first & mendable).tolist():
                number = int(numbers[index])
                if heard[index]:
                    self._note_l1_entry(number, int(counts[index]))
                if first[index]:
                    mended += await self._mend_table(int(hosts[index]), setting=setting)
                steps.reach(number + 1)
            await self._flip(l1.active, place, numbers[wrong])
            mended += int(np.count_nonzero(wrong))
        return mended

    def _are_tables(self, hosts: Clusters) -> NDArray[np.bool_]:
        """Whether what L1 entries lead to may be written as L2 tables."""
        header = self._check.header
        tables: NDArray[np.bool_] = (hosts != 0) & self._may_be_tables(hosts, header.cluster_size)
        if self._doubtful:
            tables[tables] = self._check.l1.are_only_tables(hosts[tables] >> header.cluster_bits)
        return tables

    def _may_be_tables(
        self, hosts: Clusters, length: int, *, own: str | None = None
    ) -> NDArray[np.bool_]:
        """Whether tables lie inside the file, at a cluster's start, and on no other metadata."""
        header = self._check.header
        fine: NDArray[np.bool_] = (hosts & (header.cluster_size - 1)) == 0
        fine &= hosts + length <= self._check.ledger.file_length
        for region in metadata_regions(header):
            if region.what != own:
                fine &= (hosts >= region.offset + region.length) | (hosts + length <= region.offset)
        return fine

    def _note_l1_entry(self, number: int, count: int) -> None:
        entry = int(self._check.l1.active[number])
        place = self._check.header.l1_table_offset + number * 8
        self._note(place, entry, f"L2 cluster: l1_index={number} l1_entry", count)

    async def _mend_table(self, where: int, *, setting: bool) -> int:
        header = self._check.header
        words, found = await self._check.load_table(where)
        wrong, counts = await self._check.wrong_l2_entries(found)
        mendable = found.copied[wrong] != setting
        # What lies past the end of the file is left as it is.
        if not header.external_data_file:
            mendable &= found.offsets[wrong] < self._check.ledger.file_length
        wrong, counts = wrong[mendable], counts[mendable]
        places = wrong * Geometry.of(header).words
        heard = self._heard(np.ones(len(wrong), np.bool_))
        for at, count in zip(places[heard].tolist(), counts[heard].tolist(), strict=True):
            self._note(where + at * 8, int(words[at]), "data cluster: l2_entry", count)
        await self._flip(words, where, places)
        return len(wrong)

    async def _flip(self, table: Words, where: int, numbers: Clusters) -> None:
        """Make the COPIED bits of some entries of a table at a host offset the others."""
        if self._apply and len(numbers):
            table[numbers] ^= np.uint64(layout.COPIED)
            first, end = int(numbers[0]), int(numbers[-1]) + 1
            changed = table[first:end].astype(">u8").tobytes()
            await self._check.image.write(changed, where + first * 8)

    def _heard(self, wrong: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of the wrong entries anybody hears of; the others are counted."""
        heard = first_of(wrong, max(self._report.room, self._report.repair_room))
        unheard = int(np.count_nonzero(wrong & ~heard))
        self._report.omit(corruptions=unheard)
        self._report.omit_repairs(unheard)
        return heard

    def _note(self, place: int, before: int, line: str, count: int) -> None:
        after = before ^ layout.COPIED
        self._report.corruption(
            f"{Verb.REPAIRING} OFLAG_COPIED {line}={before:x} refcount={count}",
            f"the COPIED bit of the entry at {place:#x} does not fit the refcount {count}",
            offset=place,
            found=before,
            expected=after,
        )
        what = "set" if after & layout.COPIED else "clear"
        self._report.repair(f"{what} the COPIED bit", offset=place, before=before, after=after)
