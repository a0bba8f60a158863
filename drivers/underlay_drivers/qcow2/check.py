"""Checking an image: QEMU's verdict and counts, and a report of each thing that is wrong.

References are counted over all tables (``l1_check``, ``table_check``, ``bitmap_check``), then
compared with the refcounts that are stored (``refcount_check``); then the COPIED bits of the active
tables are judged by these (``copied_check``). A table that is shared, be it by thousands of
snapshots, is read and judged once, and weighs as much as all that lead to it. One L2 table or
refcount block is in memory at a time, and a byte for each cluster of the file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np

from underlay.capabilities import CheckResult
from underlay.limits import Limits
from underlay.steps import Steps, StepsCallback
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.bitmap_check import BitmapCheck
from underlay_drivers.qcow2.copied_check import CopiedCheck
from underlay_drivers.qcow2.findings import Report, Verb
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.l1_check import L1Check
from underlay_drivers.qcow2.ledger import Ledger
from underlay_drivers.qcow2.refcount_check import RefcountCheck, StoredRefcounts
from underlay_drivers.qcow2.snapshots import SnapshotEntry, read_snapshots
from underlay_drivers.qcow2.table_check import TableCheck

if TYPE_CHECKING:
    from underlay.handle import StorageHandle

__all__ = ["Checker", "check_image"]


async def check_image(
    image: StorageHandle,
    header: Header,
    limits: Limits,
    report: Report,
    *,
    progress: StepsCallback | None = None,
) -> CheckResult:
    """See ``Checkable.check``. ``progress`` counts tables: L2 tables, and refcount blocks."""
    steps = Steps(progress)
    checker = Checker(image, header, limits, report, steps=steps)
    await checker.count()
    await checker.compare()
    await checker.copied().judge(steps)
    steps.end()
    return checker.result()


class Checker:
    """One check, step by step; a repair takes other steps between them."""

    def __init__(
        self,
        image: StorageHandle,
        header: Header,
        limits: Limits,
        report: Report,
        *,
        steps: Steps | None = None,
        mend: bool = False,
    ) -> None:
        """With ``mend``, what a repair will mend is reported so, and counted as if it were.

        What there is to do is expected of ``steps`` when it is known.

        Raises:
            LimitExceededError: the counts would take more memory than ``limits.metadata``.
        """
        self.image = image
        self.header = header
        self.report = report
        self._limits = limits
        self._steps = steps or Steps(None)
        self._mend = mend
        self.ledger = Ledger(header, report, image=image, limits=limits)
        self.tables = TableCheck(header, self.ledger, report, mend=mend)
        self.l1 = L1Check(image, header, limits, self.ledger, report)
        self.refcounts: RefcountCheck | None = None
        self.snapshots: tuple[SnapshotEntry, ...] = ()
        #: Snapshots whose entry lacks extra data that it must have.
        self.incomplete = 0

    # -- counting

    async def count(self, *, without: Sequence[SnapshotEntry] | None = None) -> None:
        """Count every reference.

        ``without`` the refcount structures and the snapshot table where they are going to be
        replaced: then those are the snapshots.

        Raises:
            CorruptImageError: the snapshot table or the bitmap directory cannot be read.
        """
        snapshots = await self._load_snapshots() if without is None else without
        self.snapshots = tuple(snapshots)
        self._steps.expect(self.tables_to_count)
        header, region = self.header, self.ledger.region
        region("the header", 0, header.cluster_size)
        await self.l1.count_active()
        if header.external_data_file and snapshots:
            self.report.corruption(
                f"ERROR {len(snapshots)} snapshots in image with data file",
                "there are snapshots, and a data file, which keeps no old data",
                found=len(snapshots),
                expected=0,
            )
        await self.l1.count_snapshots(snapshots)
        await self._count_l2_tables()
        if without is None:
            table_size = sum(len(snapshot.pack()) for snapshot in snapshots)
            region("the snapshot table", header.snapshots_offset, table_size)
            await self._count_structures()
        bitmaps = BitmapCheck(self.image, header, self._limits, self.ledger, self.report)
        await bitmaps.count()
        if self.refcounts is not None:
            self.refcounts.check_table()

    @property
    def tables_to_count(self) -> int:
        """As many tables as ``count`` and ``compare`` look at, if none is missing."""
        in_block = self.header.cluster_size * 8 // self.header.refcount_bits
        return self.l1_entries + -(-self.ledger.references.size // in_block)

    @property
    def l1_entries(self) -> int:
        """As many as all L1 tables have."""
        snapshots = [entry.l1_size for entry in self.snapshots]
        plausible = [size for size in snapshots if size * 8 <= layout.L1_BYTES_MAX]
        return self.header.l1_size + sum(plausible)

    async def _count_structures(self) -> None:
        """Count the refcount table, and read it."""
        header = self.header
        length = header.refcount_table_clusters * header.cluster_size
        self.ledger.region("the refcount table", header.refcount_table_offset, length)
        stored = await StoredRefcounts.load(self.image, header)
        self.refcounts = RefcountCheck(stored, self.ledger, self.report)

    async def _load_snapshots(self) -> tuple[SnapshotEntry, ...]:
        header = self.header
        snapshots = await read_snapshots(self.image, header, self._limits, to_check=True)
        if header.version > 2:  # noqa: PLR2004 (a version is its own best name)
            for number, snapshot in enumerate(snapshots):
                if len(snapshot.extra) < layout.SNAPSHOT_EXTRA_V3:
                    self.incomplete += 1
                    verb = Verb.REPAIRING if self._mend else Verb.ERROR
                    self.report.corruption(
                        f"{verb} snapshot table entry {number} is incomplete",
                        f"entry {number} of the snapshot table lacks extra data",
                        offset=header.snapshots_offset,
                        found=len(snapshot.extra),
                        expected=layout.SNAPSHOT_EXTRA_V3,
                    )
        return snapshots

    async def _count_l2_tables(self) -> None:
        """Count all that L2 tables lead to, and look at each of these once."""
        buffer = bytearray(self.header.cluster_size)
        words = np.frombuffer(buffer, np.uint64)
        begun, steps, count = self._steps.done, self.l1_entries, self.l1.table_count
        for number, table in enumerate(self.l1.l2_tables(), 1):
            await self.image.readv((buffer,), table.host)
            if sys.byteorder == "little":
                words.byteswap(inplace=True)
            self.tables.scan(words, table)
            self._steps.reach(begun + steps * number // count)
        self._steps.reach(begun + steps)

    # -- judging

    async def compare(
        self, *, mend_leaks: bool = False, mend_errors: bool = False, keep: bool = False
    ) -> None:
        """Report each refcount that is not what was counted; see ``RefcountCheck.compare``."""
        await self._known_refcounts().compare(
            self._steps, mend_leaks=mend_leaks, mend_errors=mend_errors, keep=keep
        )

    def judge_by_references(self) -> None:
        """Let COPIED bits be judged by what was counted: refcounts are about to be made so."""
        nothing = StoredRefcounts(self.image, self.header, np.empty(0, np.uint64))
        self.refcounts = RefcountCheck(nothing, self.ledger, self.report)

    def copied(self) -> CopiedCheck:
        """What judges COPIED bits by the refcounts."""
        return CopiedCheck(
            image=self.image,
            header=self.header,
            l1=self.l1,
            tables=self.tables,
            ledger=self.ledger,
            refcounts=self._known_refcounts(),
            report=self.report,
        )

    def _known_refcounts(self) -> RefcountCheck:
        if self.refcounts is None:
            raise ValueError("the refcount structures were not counted")
        return self.refcounts

    def result(self) -> CheckResult:
        """What was found."""
        highest = 0 if self.refcounts is None else self.refcounts.highest
        sectors = -(-self.header.size // layout.SECTOR) * layout.SECTOR
        return attrs.evolve(
            self.report.result(),
            image_end_offset=(highest + 1) << self.header.cluster_bits,
            total_clusters=-(-sectors >> self.header.cluster_bits),
            allocated_clusters=self.tables.allocated,
            fragmented_clusters=self.tables.fragmented,
            compressed_clusters=self.tables.compressed,
        )
