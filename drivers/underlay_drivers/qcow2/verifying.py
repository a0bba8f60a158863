"""Whether the stored reference counts may be believed.

A count that is too low is the lie that destroys data: what it calls free would be handed out, or
punched, while something leads there. So before anything relies on the counts, once, references are
counted over all tables, as a check does it, and compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from underlay.errors import CorruptImageError
from underlay_drivers.qcow2.check import Checker
from underlay_drivers.qcow2.findings import Report
from underlay_drivers.qcow2.references import unpack_counts

if TYPE_CHECKING:
    from underlay.limits import Limits
    from underlay_drivers.qcow2.allocation import Allocator
    from underlay_drivers.qcow2.dependencies import Dependencies

__all__ = ["verify_counts"]


async def verify_counts(disk: Dependencies, allocator: Allocator, limits: Limits) -> bool:
    """Make sure that no cluster is counted less often than tables lead to it; under the lock.

    The tables are those on disk, the counts those in memory: at whatever moment this is, nothing
    on disk leads to what is not counted. Takes a byte of memory for each cluster of the file.
    Whether every entry leads where it may, too.

    Raises:
        CorruptImageError: one is, or what leads to clusters cannot be read.
        LimitExceededError: the file has too many clusters for ``limits.metadata``.
    """
    report = Report()
    checker = Checker(disk.image, disk.header, limits, report)
    await checker.count()
    references = checker.ledger.references
    # Metadata is neither handed out nor let go through an entry, so that it counts is enough.
    clusters = (offset >> disk.geometry.cluster_bits for offset in allocator.metadata)
    # What a damaged image calls its own may lie anywhere.
    known = np.array([cluster for cluster in clusters if cluster < references.size], np.int64)
    sound = not report.corruptions and int(references.counts[known].max(initial=0)) <= 1
    references.counts[known] = np.minimum(references.counts[known], 1)
    counts = allocator.counts
    for first in range(0, references.size, counts.per_block):
        wanted = references.counts[first : min(first + counts.per_block, references.size)]
        if not wanted.any():
            continue
        block = await allocator.block(first // counts.per_block)
        stored = np.zeros(1) if block is None else unpack_counts(block, counts.bits)[: len(wanted)]
        low = np.flatnonzero(stored < wanted)
        if len(low):
            number = int(low[0])
            offset = first + number << disk.geometry.cluster_bits
            count = 0 if block is None else counts.get(block, number)
            used = f"referenced {wanted[number]} times" if count else "in use"
            says = count or "that it is free"
            raise CorruptImageError(
                f"'{disk.image.name()}': the cluster at {offset:#x} is {used}, and its reference "
                f"count says {says}; repair the image",
                offset=offset,
                field="refcount",
                value=count,
            )
    return sound
