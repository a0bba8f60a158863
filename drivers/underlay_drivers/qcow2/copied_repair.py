"""Mending the COPIED bits of the active tables."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.check import Checker
from underlay_drivers.qcow2.findings import Report, Verb
from underlay_drivers.qcow2.table_check import Entries
from underlay_drivers.qcow2.validation import metadata_regions

if TYPE_CHECKING:
    from underlay.steps import Steps
    from underlay_drivers.qcow2.bulk import Words

__all__ = ["CopiedRepair"]


class CopiedRepair:
    """Makes COPIED bits fit the refcounts, as these will be when the repair is done.

    To clear one is always safe: the next write then copies. To set one is right only when the
    refcount *is* one, so that is a step of its own.
    """

    __slots__ = ("_apply", "_checker", "_doubtful", "_report")

    def __init__(self, checker: Checker, report: Report, *, apply: bool, doubtful: bool) -> None:
        """In an image that stays ``doubtful``, tables that may be something else are left alone."""
        self._checker = checker
        self._report = report
        self._apply = apply
        self._doubtful = doubtful

    async def mend(self, steps: Steps, *, setting: bool) -> int:
        """Set, or clear, the bits for which that is right; how many there were.

        ``steps`` are the tables.
        """
        mended = await self._mend(steps, setting=setting)
        if mended and self._apply:
            await self._checker.image.sync()
        steps.end()
        return mended

    async def _mend(self, steps: Steps, *, setting: bool) -> int:
        checker = self._checker
        header = checker.header
        if checker.copied_is_right():
            return 0
        if not self._may_write(header.l1_table_offset, header.l1_size * 8, "L1 table"):
            return 0
        if self._doubtful and not checker.l1_is_alone():
            return 0
        mended = 0
        seen: set[int] = set()
        steps.expect(len(checker.l1))
        for number in np.flatnonzero(checker.l1).tolist():
            table = int(checker.l1[number]) & layout.HOST_OFFSET
            if self._is_table(table):
                mended += await self._mend_l1_entry(number, setting=setting)
                if table not in seen:
                    seen.add(table)
                    mended += await self._mend_table(table, setting=setting)
            steps.reach(number + 1)
        return mended

    def _is_table(self, offset: int) -> bool:
        """Whether what an L1 entry leads to may be written as an L2 table."""
        checker = self._checker
        if not offset or not self._may_write(offset, checker.header.cluster_size, None):
            return False
        return not self._doubtful or checker.is_only_table(offset >> checker.header.cluster_bits)

    async def _mend_l1_entry(self, number: int, *, setting: bool) -> int:
        checker = self._checker
        entry = int(checker.l1[number])
        count = await checker.refcount((entry & layout.HOST_OFFSET) >> checker.header.cluster_bits)
        if (count == 1) == bool(entry & layout.COPIED) or (count == 1) != setting:
            return 0
        place = checker.header.l1_table_offset + number * 8
        changed = entry ^ layout.COPIED
        self._note(place, entry, changed, f"L2 cluster: l1_index={number} l1_entry", count)
        if self._apply:
            await checker.image.write(struct.pack(">Q", changed), place)
        return 1

    async def _mend_table(self, where: int, *, setting: bool) -> int:
        checker = self._checker
        words = await checker.load_table(where)
        if not words.any():
            return 0
        found = Entries.of(words, checker.geometry)
        wrong = await checker.wrong_copied(found)
        wrong = wrong[found.copied[wrong] != setting]
        # What lies past the end of the file is left as it is.
        if not checker.geometry.external:
            wrong = wrong[found.offsets[wrong] < checker.ledger.file_length]
        if not len(wrong):
            return 0
        step = checker.geometry.words
        for index in wrong.tolist():
            entry = int(found.entries[index])
            count = 1
            if not checker.geometry.external:
                count = checker.ledger.references.at(
                    (entry & layout.HOST_OFFSET) >> checker.header.cluster_bits
                )
            place = where + index * step * 8
            self._note(place, entry, entry ^ layout.COPIED, "data cluster: l2_entry", count)
        words[wrong * step] ^= np.uint64(layout.COPIED)
        if self._apply:
            await self._write(words, where, int(wrong[0]) * step, int(wrong[-1]) * step + 1)
        return len(wrong)

    async def _write(self, words: Words, where: int, first: int, end: int) -> None:
        await self._checker.image.write(words[first:end].astype(">u8").tobytes(), where + first * 8)

    def _note(self, place: int, before: int, after: int, line: str, count: int | None) -> None:
        self._report.corruption(
            f"{Verb.REPAIRING} OFLAG_COPIED {line}={before:x} refcount={count}",
            f"the COPIED bit of the entry at {place:#x} does not fit the refcount {count}",
            offset=place,
            found=before,
            expected=after,
        )
        what = "set" if after & layout.COPIED else "clear"
        self._report.repair(f"{what} the COPIED bit", offset=place, before=before, after=after)

    def _may_write(self, offset: int, length: int, own: str | None) -> bool:
        """Whether a table lies inside the file, at a cluster's start, and on no other metadata."""
        checker = self._checker
        if offset % checker.header.cluster_size or offset + length > checker.ledger.file_length:
            return False
        end = offset + length
        return not any(
            region.offset < end and offset < region.offset + region.length
            for region in metadata_regions(checker.header)
            if region.what != own
        )
