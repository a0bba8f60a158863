"""Repairing an image, in an order in which a crash at any point leaves it no worse than it was.

What is counted is believed, and what is stored is made to fit. In place, this goes in four steps,
each durable before the next: refcounts rise; entries that must not stay are mended, COPIED bits
that are wrong go; refcounts fall; COPIED bits that are missing come. Where that is not enough, new
refcount structures are built behind the end of the file, and the header is switched to them when
they are durable. What cannot be mended without guessing is left alone and reported.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import numpy as np

from underlay.capabilities import CheckResult, Finding, Repair
from underlay.errors import CorruptImageError, ReadOnlyError
from underlay.limits import Limits
from underlay.steps import Steps
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.check import Checker, check_image
from underlay_drivers.qcow2.copied_repair import CopiedRepair
from underlay_drivers.qcow2.findings import Report
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.loading import load_header
from underlay_drivers.qcow2.rebuild import Front, Rebuild
from underlay_drivers.qcow2.refcount_check import RefcountCheck
from underlay_drivers.qcow2.references import pack_counts
from underlay_drivers.qcow2.snapshots import SnapshotEntry

if TYPE_CHECKING:
    from underlay.handle import StorageHandle

__all__ = ["repair_image"]

#: What a repair goes over all tables for; new refcount structures take as many phases.
_PHASES = ("count", "raise", "clear COPIED", "lower", "set COPIED", "check")
_PHASES_OF_LEAKS = ("count", "lower", "check")
#: Where the incompatible feature bits stand.
_FEATURES = 72


async def repair_image(
    image: StorageHandle,
    header: Header,
    limits: Limits,
    *,
    leaks_only: bool,
    dry_run: bool = False,
    report: Callable[[Finding | Repair], None] | None = None,
    steps: Steps | None = None,
) -> CheckResult:
    """See ``Repairable.repair``. Nothing else may write to the image meanwhile.

    ``steps`` are the disk's tables, as often as they are gone over.
    """
    if not dry_run and not image.writable():
        raise ReadOnlyError(f"'{image.name()}' is open read-only; open it writable to repair it")
    repair = _ImageRepair(
        image,
        header,
        limits,
        report,
        leaks_only=leaks_only,
        dry_run=dry_run,
        steps=steps or Steps(None),
    )
    await repair.mend()
    if dry_run:
        if not repair.hopeless:
            repair.note_sound(header)
        return attrs.evolve(
            repair.checker.result(),
            corruptions_fixed=repair.corruptions_fixed,
            leaks_fixed=repair.leaks_fixed,
        )
    return await repair.verify()


class _ImageRepair:
    """One repair."""

    def __init__(
        self,
        image: StorageHandle,
        header: Header,
        limits: Limits,
        sink: Callable[[Finding | Repair], None] | None,
        *,
        leaks_only: bool,
        dry_run: bool,
        steps: Steps,
    ) -> None:
        self._image = image
        self._header = header
        self._limits = limits
        self._sink = sink
        self._report = Report(sink, sink)
        self._all = not leaks_only
        self._apply = not dry_run
        self._steps = steps
        phases = len(_PHASES) if self._all else len(_PHASES_OF_LEAKS)
        #: What each phase counts for, whatever it has to do.
        self._share = max(header.l1_size, 1)
        steps.expect((phases - dry_run) * self._share)
        #: Whether L2 entries may be mended.
        self._entries = self._all
        self._counting = self._phase()
        self.checker = self._new_checker(self._report, self._counting)
        self.corruptions_fixed = 0
        self.leaks_fixed = 0
        #: Errors that stay.
        self.hopeless = 0

    def _phase(self) -> Steps:
        """The steps of the next phase; to be ended with it."""
        return self._steps.phase(self._share)

    def _new_checker(self, report: Report, steps: Steps | None) -> Checker:
        return Checker(
            self._image, self._header, self._limits, report, steps=steps, mend=self._entries
        )

    def _entries_are_entries(self) -> bool:
        """Whether all entries to be mended lie in L2 tables, and not in what is data as well."""
        places = np.frombuffer(self.checker.tables.to_zero, np.uint64)
        clusters = np.unique(places >> np.uint64(self._header.cluster_bits)).astype(np.int64)
        return bool(self.checker.l1.are_only_tables(clusters).all())

    async def mend(self) -> None:
        """Find out what is wrong, and mend what can be."""
        if not self.checker.l1.is_there():
            raise CorruptImageError(
                f"'{self._image.name()}': its L1 table is not inside the file, so that all data "
                "would be taken for lost, and freed; restore the header, or what was cut off",
                offset=self._header.l1_table_offset,
                field="l1_table_offset",
                value=self._header.l1_table_offset,
            )
        await self.checker.count()
        if not self._entries_are_entries():
            self._entries = False
            self._report = Report(self._sink, self._sink)
            self.checker = self._new_checker(self._report, None)
            await self.checker.count()
        checker, report = self.checker, self._report
        await checker.compare(mend_leaks=True, mend_errors=self._all, keep=True)
        self._counting.end()
        refcounts = checker.refcounts
        if refcounts is None:
            return
        if refcounts.rebuild and not self._all:
            report.note(
                "ERROR need to rebuild refcount structures",
                "the refcount structures must be built anew, which is more than leaks",
            )
            raise CorruptImageError(
                f"'{self._image.name()}': its refcounts are too damaged for leaks to be told from "
                "data; repair all of it",
                field="refcount table",
            )
        told = checker.tables.to_zero[: report.repair_room]
        for place in told:
            report.repair("make the L2 entry that of a zero cluster", offset=place)
        report.omit_repairs(len(checker.tables.to_zero) - len(told))
        self.corruptions_fixed += len(checker.tables.to_zero)
        if refcounts.rebuild or (self._all and checker.incomplete):
            await self._rebuild()
        elif self._all:
            await self._mend_in_place(refcounts)
        else:
            await self._mend_refcounts(refcounts, rising=False)
            self.hopeless = report.corruptions

    async def _mend_in_place(self, refcounts: RefcountCheck) -> None:
        hopeless = self._report.corruptions - self.corruptions_fixed - refcounts.corruptions
        self.hopeless = hopeless
        await self._mend_refcounts(refcounts, rising=True)
        await self._zero_entries()
        copied = CopiedRepair(
            self.checker, self._report, apply=self._apply, doubtful=bool(hopeless)
        )
        self.corruptions_fixed += await copied.mend(self._phase(), setting=False)
        await self._mend_refcounts(refcounts, rising=False)
        if not hopeless and not self._report.check_errors:
            self.corruptions_fixed += await copied.mend(self._phase(), setting=True)

    # -- refcounts

    async def _mend_refcounts(self, refcounts: RefcountCheck, *, rising: bool) -> None:
        """Write the blocks in which a refcount is too low, or too high."""
        stored_refcounts = refcounts.stored
        changed = False
        steps = self._phase()
        steps.expect(refcounts.block_count)
        async for first, stored, wanted in refcounts.blocks():
            steps.did()
            if stored is None:
                continue
            numbers = np.flatnonzero(stored < wanted if rising else stored > wanted)
            if not rising:
                numbers = numbers[~self.checker.ledger.leads_beyond(first + numbers)]
            if not len(numbers):
                continue
            told = numbers[: self._report.repair_room].tolist()
            for number in told:
                self._report.repair(
                    "raise the refcount" if rising else "lower the refcount",
                    offset=(first + number) << self._header.cluster_bits,
                    before=int(stored[number]),
                    after=int(wanted[number]),
                )
            self._report.omit_repairs(len(numbers) - len(told))
            if rising:
                self.corruptions_fixed += len(numbers)
            else:
                self.leaks_fixed += len(numbers)
            if self._apply:
                mended = stored_refcounts.whole_block().astype(np.uint64)
                mended[numbers] = wanted[numbers]
                offset = stored_refcounts.offset(first // stored_refcounts.in_block)
                await self._image.write(pack_counts(mended, stored_refcounts.bits), offset)
                changed = True
        if changed:
            await self._image.sync()
        steps.end()

    async def _rebuild(self) -> None:
        """Count anew without the old refcount structures, and build new ones."""
        self._report.note("Rebuilding refcount structure", "the refcounts are built anew")
        found = self._report
        corruptions, leaks = found.corruptions - self.corruptions_fixed, found.leaks
        await self._zero_entries()
        quiet = Report()
        snapshots, table = self._new_snapshot_table()
        steps = self._phase()
        recount = self._new_checker(quiet, steps)
        await recount.count(without=snapshots)
        steps.end()
        if table is None:
            size = sum(len(snapshot.pack()) for snapshot in snapshots)
            recount.ledger.region("the snapshot table", self._header.snapshots_offset, size)
        references = recount.ledger.references
        self.hopeless = hopeless = quiet.corruptions - len(recount.tables.to_zero)
        start = self.checker.ledger.references.end()
        refcounts = self.checker.refcounts
        if hopeless or refcounts is None or refcounts.broken:
            # What nothing leads to may be what somebody wants to rescue, or an old refcount block.
            start = max(start, -(-self._image.size() >> self._header.cluster_bits))
        rebuild = Rebuild(
            self._image,
            self._header,
            references,
            found,
            start=start,
            front=None if table is None else Front("snapshot table", "snapshots_offset", table),
            clear=self.checker.ledger.clear_of_beyond,
            keep=recount.ledger.leads_beyond,
        )
        rebuild.plan()
        steps = self._phase()
        if self._apply:
            await rebuild.write(steps)
        steps.end()
        recount.header = rebuild.header
        self.corruptions_fixed += max(0, corruptions - hopeless)
        self.leaks_fixed += leaks
        recount.judge_by_references()
        copied = CopiedRepair(recount, found, apply=self._apply, doubtful=bool(hopeless))
        self.corruptions_fixed += await copied.mend(self._phase(), setting=False)
        if not hopeless:
            self.corruptions_fixed += await copied.mend(self._phase(), setting=True)

    def _new_snapshot_table(self) -> tuple[tuple[SnapshotEntry, ...], bytes | None]:
        """The snapshots, and the table for them if the one that there is must not stay."""
        snapshots = self.checker.snapshots
        if not self.checker.incomplete:
            return snapshots, None
        snapshots = tuple(snapshot.completed(self._header.size) for snapshot in snapshots)
        return snapshots, b"".join(snapshot.pack() for snapshot in snapshots)

    # -- the rest

    async def _zero_entries(self) -> None:
        """Let preallocated clusters that lie nowhere be what they read as: zeroes."""
        places = self.checker.tables.to_zero
        if not self._apply or not places:
            return
        if self._header.extended_l2:
            entry = struct.pack(">QQ", 0, layout.ALL_ZERO)
        else:
            entry = struct.pack(">Q", layout.ZERO)
        for place in places:
            await self._image.write(entry, place)
        await self._image.sync()

    def note_sound(self, header: Header) -> int:
        """The incompatible feature bits of an image that is neither dirty nor corrupt."""
        marked = header.incompatible_features
        sound = marked & ~(layout.DIRTY | layout.CORRUPT)
        if sound != marked:
            self._report.repair(
                "clear the bits that mark the image as dirty or corrupt",
                offset=_FEATURES,
                before=marked,
                after=sound,
            )
        return sound

    async def verify(self) -> CheckResult:
        """Check again; an image that is sound now is marked so."""
        header = await load_header(self._image, to_check=True)
        progress = self._steps.part(self._share)
        left = await check_image(self._image, header, self._limits, Report(), progress=progress)
        if not left.corruptions and not left.check_errors:
            sound = self.note_sound(header)
            if sound != header.incompatible_features:
                await self._image.write(struct.pack(">Q", sound), _FEATURES)
                await self._image.sync()
        done = self._report.result()
        return attrs.evolve(
            left,
            corruptions_fixed=self.corruptions_fixed,
            leaks_fixed=self.leaks_fixed,
            findings=done.findings,
            findings_omitted=done.findings_omitted,
            repairs=done.repairs,
            repairs_omitted=done.repairs_omitted,
        )
