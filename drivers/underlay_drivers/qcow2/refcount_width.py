"""Changing how wide reference counts are: new structures beside the old ones, then one switch.

With numpy, as all work on whole tables.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import attrs
import numpy as np

from underlay.errors import OptionError, StorageError
from underlay.face import to_the_end
from underlay_drivers.qcow2.findings import Report
from underlay_drivers.qcow2.rebuild import Rebuild
from underlay_drivers.qcow2.refcount_check import StoredRefcounts
from underlay_drivers.qcow2.references import References, cannot_overflow
from underlay_drivers.qcow2.writeback import HeaderSwitch

if TYPE_CHECKING:
    from underlay.limits import Limits
    from underlay.steps import Steps
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["RefcountWidth"]


class RefcountWidth:
    """One change of the width, for one who is alone with all clusters."""

    def __init__(self, writer: ImageWriter, bits: int, limits: Limits) -> None:
        self._writer = writer
        self._bits = bits
        self._limits = limits

    async def check(self, steps: Steps) -> None:
        """Refuse counts that would be too wide, changing nothing. ``steps`` are the blocks.

        Raises:
            OptionError: a count does not fit into the new width.
            LimitExceededError: the refcount table would become too large.
        """
        async with self._writer.back.all_at_once():
            (await self._rebuild(steps)).plan()
        steps.end()

    async def change(self, steps: Steps) -> None:
        """Change it; raises as ``check`` does. ``steps`` are the old blocks and the new ones."""
        writer, back = self._writer, self._writer.back
        async with back.all_at_once():
            disk = writer.disk
            old = self._structures(await StoredRefcounts.load(disk.image, disk.header))
            rebuild = await self._rebuild(steps)
            rebuild.plan()
            await rebuild.write_structures(steps)
            # The old structures are not among the new counts: they are free from now on.
            await to_the_end(self._switch(rebuild))
            with suppress(StorageError):
                for offset in old:
                    await disk.image.discard(offset, disk.geometry.cluster_size)
        steps.end()

    async def _switch(self, rebuild: Rebuild) -> None:
        """Let the header lead to the new structures, and count in those."""
        await self._writer.back.switch_header_now(HeaderSwitch(change=lambda _: rebuild.header))
        await self._writer.look_around()

    def _structures(self, stored: StoredRefcounts) -> list[int]:
        """The host offsets of all clusters of the refcount table and its blocks."""
        header = self._writer.disk.header
        start, size = header.refcount_table_offset, header.cluster_size
        table = range(start, start + header.refcount_table_clusters * size, size)
        return [*table, *map(stored.offset, np.flatnonzero(stored.table).tolist())]

    async def _rebuild(self, steps: Steps) -> Rebuild:
        """New structures for the counts that are stored, less those of the old structures."""
        disk = self._writer.disk
        image, header = disk.image, disk.header
        async with self._writer.back.lock:
            await self._writer.allocator.believe()  # what they call free is about to be written
        stored = await StoredRefcounts.load(image, header)
        numbers = np.flatnonzero(stored.table).tolist()
        clusters = (numbers[-1] + 1) * stored.in_block if numbers else 0
        wide = attrs.evolve(header, refcount_order=self._bits.bit_length() - 1)
        references = References(
            clusters,
            refcount_bits=64,
            overflow=cannot_overflow,
            limits=self._limits,
            name=image.name(),
        )
        most = (1 << self._bits) - 1
        steps.expect(len(numbers))
        for number in numbers:
            steps.did()
            block = await stored.block(number)
            assert block is not None
            first = number * stored.in_block
            highest = int(block.max())
            if highest > most:
                within = int(np.flatnonzero(block > most)[0])
                raise OptionError(
                    f"Cannot decrease refcount entry width to {self._bits} bits: Cluster at offset "
                    f"{first + within << header.cluster_bits:#x} has a refcount of "
                    f"{int(block[within])}",
                    option="refcount_bits",
                )
            references.make_room(highest)
            references.counts[first : first + stored.in_block] = block
        start = references.end()
        references.counts[
            [offset >> header.cluster_bits for offset in self._structures(stored)]
        ] = 0
        return Rebuild(image, wide, references, Report(), start=start)
