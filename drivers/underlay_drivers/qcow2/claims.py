"""Two-phase writes: making room, and showing what was written there.

Between the two the core writes the data. While a ticket is out, nobody else gets one for any of its
clusters, and no table has changed: aborting it only gives the room back.
"""

from __future__ import annotations

import logging
from array import array
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from underlay.driver import WriteTicket
from underlay.errors import CorruptImageError, UnderlayError
from underlay.locks import RangeLocks
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.covering import (
    IN_PLACE,
    NO_ROOM,
    RESERVED,
    fill_from,
    fill_to,
    find,
    references,
    touched,
)
from underlay_drivers.qcow2.tables import Table, empty_table, in_a_row

if TYPE_CHECKING:
    from underlay_drivers.qcow2.allocation import Allocator
    from underlay_drivers.qcow2.bitmap_tracking import Tracking
    from underlay_drivers.qcow2.writable import Writable
    from underlay_drivers.qcow2.writeback import Writeback

__all__ = ["Claim", "Claims"]

_log = logging.getLogger("underlay")

#: What was found or made: kind, host offset, clusters, and whether it was never written.
_Room: TypeAlias = tuple[int, int, int, bool]


@attrs.define(eq=False)
class Claim:
    """What a ticket is about: ``count`` clusters behind one L1 entry, in a row on the host."""

    holder: Any
    number: int
    #: In the L2 table.
    index: int
    count: int
    #: Host offset of the first cluster.
    host: int
    #: ``IN_PLACE``, ``RESERVED`` or ``NO_ROOM``.
    kind: int
    #: Bytes from there on that become data: the write with what is filled around it.
    start: int
    end: int


class Claims:
    """Gives tickets out, and takes them back."""

    __slots__ = ("allocator", "back", "disk", "ready", "tickets", "tracking")

    def __init__(self, disk: Writable, allocator: Allocator, back: Writeback) -> None:
        self.disk = disk
        self.allocator = allocator
        self.back = back
        #: Whether guest data may be changed.
        self.ready = False
        #: Which bitmaps that is recorded in, if there are any.
        self.tracking: Tracking | None = None
        #: Guest clusters for which somebody has a ticket.
        self.tickets = RangeLocks()

    async def make_ready(self) -> None:
        """Let guest data be changed: for one who has a ticket, or is alone."""
        raise NotImplementedError

    # -- the first phase

    async def begin(self, offset: int, length: int) -> WriteTicket:
        """See ``FormatDriverInstance.begin_write``."""
        back = self.back
        await back.relieve()
        if self.tracking is not None and self.tracking.too_large:
            await self.tracking.spill()
        geometry = self.disk.geometry
        shift, bits = geometry.l1_shift, geometry.cluster_bits
        end = min(offset + length, (offset >> shift) + 1 << shift)
        holder = await self.tickets.acquire(offset >> bits, (end - 1 >> bits) + 1, exclusive=True)
        try:
            await self.make_ready()
            async with back.lock:
                return await self.claim(offset, end, holder)
        except CorruptImageError as error:
            self.tickets.release(holder)
            await back.condemn(error)
            raise
        except BaseException:
            self.tickets.release(holder)
            raise

    def try_begin(self, offset: int, length: int) -> WriteTicket | None:
        """See ``FormatDriverInstance.try_begin_write``."""
        back = self.back
        if not self.ready or back.hinders:
            return None
        if self.tracking is not None and self.tracking.too_large:
            return None
        geometry = self.disk.geometry
        shift, bits = geometry.l1_shift, geometry.cluster_bits
        end = min(offset + length, (offset >> shift) + 1 << shift)
        holder = self.tickets.try_acquire(offset >> bits, (end - 1 >> bits) + 1, exclusive=True)
        if holder is None:
            return None
        ticket: WriteTicket | None = None
        try:
            if back.lock.try_acquire():
                try:
                    ticket = self._try_claim(offset, end, holder)
                finally:
                    back.lock.release()
        except CorruptImageError:
            pass  # begin() meets it too, and can mark the image
        finally:
            if ticket is None:
                self.tickets.release(holder)
        return ticket

    async def claim(self, offset: int, end: int, holder: object) -> WriteTicket:
        """The ticket for guest bytes ``offset`` to ``end``, or the first of them; under the lock.

        Both in one L2 table, and locked by ``holder``.
        """
        disk = self.disk
        table = await self.table(offset >> disk.geometry.l1_shift)
        kind, host, count = find(disk, self.allocator, table, offset, end)
        if kind != NO_ROOM or disk.geometry.external:
            clean = self._is_clean(host)
        else:
            if self._must_believe(table, offset, count):
                await self.allocator.believe()
            fresh_from = self.allocator.fresh_from
            host, count = await self.allocator.allocate(count)
            clean = host >= fresh_from
        return self._ticket(table, offset, end, holder, (kind, host, count, clean))

    def _try_claim(self, offset: int, end: int, holder: object) -> WriteTicket | None:
        """The same, if all that it needs is in memory."""
        disk = self.disk
        table = self._table_at_hand(offset >> disk.geometry.l1_shift)
        if table is None:
            return None
        kind, host, count = find(disk, self.allocator, table, offset, end)
        if kind != NO_ROOM or disk.geometry.external:
            clean = self._is_clean(host)
        else:
            fresh_from = self.allocator.fresh_from
            if self._must_believe(table, offset, count):
                return None
            room = self.allocator.try_allocate(count)
            if room is None:
                return None
            host, count = room
            clean = host >= fresh_from
        return self._ticket(table, offset, end, holder, (kind, host, count, clean))

    def _ticket(
        self, table: Table, offset: int, end: int, holder: object, room: _Room
    ) -> WriteTicket:
        """The ticket for what was found or made."""
        kind, host, count, clean = room
        disk = self.disk
        geometry = disk.geometry
        size = geometry.cluster_size
        guest = offset & -size
        if geometry.external:
            host = guest
        stop = min(end, guest + count * size)
        start, filled = offset, stop
        if self.tracking is not None:
            self.tracking.mark(offset, stop)
        if kind != IN_PLACE and (offset | stop) & size - 1:
            start = fill_from(disk, table, kind, offset, clean=clean)
            filled = fill_to(disk, table, kind, stop, clean=clean)
        return WriteTicket(
            driver=disk,
            storage=disk.data_storage(),
            guest_offset=offset,
            offset=offset + host - guest,
            length=stop - offset,
            before=offset - start,
            after=filled - stop,
            token=Claim(
                holder,
                offset >> geometry.l1_shift,
                (offset >> geometry.cluster_bits) % geometry.l2_entries,
                count,
                host,
                kind,
                start - guest,
                filled - guest,
            ),
        )

    def _must_believe(self, table: Table, offset: int, count: int) -> bool:
        """Whether the counts have to be verified first.

        They have if any of ``count`` clusters from guest ``offset`` on has room that it will lose.
        """
        if self.allocator.believed:
            return False
        geometry = self.disk.geometry
        index = (offset >> geometry.cluster_bits) % geometry.l2_entries
        words = geometry.words
        return any(
            entry > layout.ZERO for entry in table[index * words : (index + count) * words : words]
        )

    def _is_clean(self, host: int) -> bool:
        """Whether room that the image had already was never written: it lies past the file."""
        return not self.disk.geometry.external and host >= self.disk.image.size()

    # -- the second phase

    async def commit(self, ticket: WriteTicket) -> None:
        """See ``FormatDriverInstance.commit_write``."""
        claim = ticket.token
        assert isinstance(claim, Claim)
        try:
            if claim.kind != IN_PLACE:
                async with self.back.lock:
                    try:
                        self.back.check()
                        self._show(claim, await self.table(claim.number))
                    except BaseException:
                        await self._give_back(claim)
                        raise
        finally:
            self._release(claim)

    def try_commit(self, ticket: WriteTicket) -> bool:
        """See ``FormatDriverInstance.try_commit_write``."""
        claim = ticket.token
        assert isinstance(claim, Claim)
        if claim.kind != IN_PLACE:
            back = self.back
            if back.broken or not back.lock.try_acquire():
                return False
            try:
                table = self._table_at_hand(claim.number)
                if table is None:
                    return False
                self._show(claim, table)
            finally:
                back.lock.release()
        self._release(claim)
        return True

    async def abort(self, ticket: WriteTicket) -> None:
        """See ``FormatDriverInstance.abort_write``."""
        claim = ticket.token
        assert isinstance(claim, Claim)
        try:
            async with self.back.lock:
                await self._give_back(claim)
        finally:
            self._release(claim)

    def _release(self, claim: Claim) -> None:
        if claim.holder is not None:
            self.tickets.release(claim.holder)

    async def _give_back(self, claim: Claim) -> None:
        """Free what was never shown, at once."""
        if claim.kind == NO_ROOM and not self.disk.geometry.external:
            try:
                await self.allocator.lower(claim.host, claim.count)
            except UnderlayError as error:
                _log.warning("%d clusters are leaked: %s", claim.count, error)

    def _show(self, claim: Claim, table: Table) -> None:
        """Let the entries lead to what was written; under the lock."""
        geometry = self.disk.geometry
        size, index, count = geometry.cluster_size, claim.index, claim.count
        first = claim.host | layout.COPIED
        if geometry.extended:
            for number in range(count):
                self._show_subclusters(claim, table, number, first + number * size)
        elif count == 1:
            old = table[index]
            table[index] = first
            if old and claim.kind == NO_ROOM:
                self.let_go(old)
        else:
            entries = table[index : index + count]
            table[index : index + count] = in_a_row(first, size, count)
            if claim.kind == NO_ROOM and any(entries):
                for entry in entries:
                    self.let_go(entry)
        if not geometry.external:
            self.disk.reach(claim.host + claim.end)
        self.back.touch_l2(claim.number, table, index, count, shows=True)

    def _show_subclusters(self, claim: Claim, table: Table, number: int, entry: int) -> None:
        at = (claim.index + number) * 2
        old, bitmap = table[at : at + 2]
        geometry = self.disk.geometry
        shift = number * geometry.cluster_size
        shown = touched(geometry, claim.start - shift, claim.end - shift)
        allocated = shown
        if claim.kind == RESERVED:
            allocated |= bitmap & layout.ALL_ALLOCATED
        zero = (bitmap >> layout.SUBCLUSTERS) & ~shown
        table[at : at + 2] = array("Q", (entry, allocated | zero << layout.SUBCLUSTERS))
        if claim.kind == NO_ROOM:
            self.let_go(old)

    # -- what entries lead to

    def let_go(self, *entries: int) -> None:
        """Free, late, what L2 entries led to that are no more; under the lock.

        Raises:
            CorruptImageError: as ``clusters_of`` does; nothing is freed.
        """
        freed = [run for entry in entries for run in self.clusters_of(entry)]
        for offset, clusters in freed:
            self.back.release(offset, clusters)

    def clusters_of(self, entry: int) -> list[tuple[int, int]]:
        """What an L2 entry holds a reference to: host offset and clusters, of the image file.

        Raises:
            CorruptImageError: there is metadata.
        """
        return references(self.disk, self.allocator, entry)

    def clusters(self, length: int) -> int:
        """How many clusters hold so many bytes."""
        return -(-length >> self.disk.geometry.cluster_bits)

    # -- tables

    async def table(self, number: int) -> Table:
        """The L2 table behind an L1 entry, made or copied if need be; under the lock."""
        disk = self.disk
        entry = disk.l1[number]
        old = await disk.l2_table(number)
        if old is not None and entry & layout.COPIED:
            return old
        if entry:
            await self.allocator.believe()  # a snapshot may have it too
        offset, _ = await self.allocator.allocate(1)
        self.allocator.metadata.add(offset)
        table = empty_table(disk.geometry.cluster_size // 8) if old is None else old[:]
        self.back.link_l2(number, table, offset)
        if entry:
            self.back.release(entry & layout.HOST_OFFSET)
        return table

    def _table_at_hand(self, number: int) -> Table | None:
        """The same, if it is in memory and needs no change."""
        if self.disk.l1[number] & layout.COPIED:
            return self.disk.cached_table(number)
        return None
