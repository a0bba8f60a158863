"""Two-phase writes: making room, and showing what was written there.

Between the two the core writes the data. While a ticket is out, nobody else gets one for any of its
clusters, and no table has changed: aborting it only gives the room back.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs

from underlay.driver import WriteTicket
from underlay.errors import CorruptImageError, UnderlayError
from underlay.face import to_the_end
from underlay.locks import Lock, RangeLocks
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.allocation import Allocator
from underlay_drivers.qcow2.surveying import survey
from underlay_drivers.qcow2.tables import (
    COMPRESSED,
    DATA,
    MIXED,
    NOWHERE,
    UNALLOCATED,
    ZERO,
    Table,
    empty_table,
)
from underlay_drivers.qcow2.writeback import Writeback

if TYPE_CHECKING:
    from underlay.handle import StorageHandle
    from underlay.limits import Limits
    from underlay.storage import PreallocateMode
    from underlay_drivers.qcow2.writable import Writable

__all__ = ["ImageWriter"]

_log = logging.getLogger("underlay")

# What a write finds in a cluster.
#: All that it touches is data that may be written where it lies.
_IN_PLACE: Final = 0
#: There is room of its own, which does not show (all of) what it touches.
_RESERVED: Final = 1
#: There is none: unallocated, compressed, or shared with a snapshot.
_NO_ROOM: Final = 2

#: Further than any host offset.
_FAR: Final = 1 << 64
#: Bytes that are copied at a time.
_COPY: Final = 1 << 20


@attrs.frozen
class _Claim:
    """What a ticket is about: ``count`` clusters behind one L1 entry, in a row on the host."""

    holder: Any
    number: int
    #: In the L2 table.
    index: int
    count: int
    #: Host offset of the first cluster.
    host: int
    kind: int
    #: Bytes from there on that become data: the write with what is filled around it.
    start: int
    end: int


class ImageWriter:
    """The writing side of one open image."""

    __slots__ = (
        "_limits",
        "_preparing",
        "_ready",
        "_resting",
        "allocator",
        "back",
        "disk",
        "tickets",
    )

    def __init__(
        self, disk: Writable, *, limits: Limits, cache_size: int, refcount_cache_size: int
    ) -> None:
        self.disk = disk
        self._limits = limits
        self.allocator = Allocator(
            disk.image, disk.header, metadata=set(), cache_size=refcount_cache_size
        )
        self.back = Writeback(disk, self.allocator, dirty_limit=cache_size // 2)
        #: Guest clusters for which somebody has a ticket.
        self.tickets = RangeLocks()
        self._preparing = Lock()
        self._resting = Lock()
        self._ready = False

    # -- before the first change

    async def prepare(self) -> None:
        """Make the image ready to be changed; opening it for writing alone changes nothing.

        Raises:
            CorruptImageError: its metadata contradicts itself; nothing was changed.
        """
        self.back.check()
        if not self._ready:
            async with self._preparing:
                await self._make_ready()

    async def _make_ready(self) -> None:
        if self._ready:
            return  # somebody else was quicker
        if self.disk.header.incompatible_features & layout.DIRTY:
            await self._mend()
        await self.look_around()
        await self._clear_autoclear_bits()
        self._ready = True
        self.disk.allow_writing(self.allocator.metadata)

    async def _mend(self) -> None:
        """The image was not closed properly: its reference counts may be stale, so count anew."""
        from underlay_drivers.qcow2.repair import repair_image

        disk = self.disk
        result = await repair_image(disk.image, disk.header, self._limits, leaks_only=False)
        if result.corruptions or result.check_errors:
            raise CorruptImageError(
                f"'{disk.image.name()}' was not closed properly, and {result.corruptions} errors "
                "in it cannot be mended; read it, and copy what can be read"
            )
        await disk.reload()

    @asynccontextmanager
    async def forgetting(self) -> AsyncGenerator[None]:
        """While this is held the tables are read anew; what was not flushed is forgotten."""
        async with self.alone(), self.back.forgetting():
            yield
            if self._ready:
                await self.look_around()
                self.disk.allow_writing(self.allocator.metadata)

    async def look_around(self) -> None:
        """Find out where all metadata lies, and what is in use, from what is on disk."""
        metadata = self.allocator.metadata
        metadata.clear()
        metadata |= await survey(self.disk, self._limits)
        await self.allocator.load(self.disk.header)

    async def _clear_autoclear_bits(self) -> None:
        """Tell that what these bits promise is not kept: bitmaps go out of date from now on."""
        header = self.disk.header
        known = layout.RAW_EXTERNAL_DATA if header.external_data_file else 0
        kept = header.autoclear_features & known
        if kept != header.autoclear_features:
            await self.disk.image.write(kept.to_bytes(8, "big"), layout.AUTOCLEAR_FEATURES_OFFSET)
            await self.disk.image.sync()
            self.disk.header = attrs.evolve(header, autoclear_features=kept)

    # -- the two phases

    async def begin(self, offset: int, length: int) -> WriteTicket:
        """See ``FormatDriverInstance.begin_write``."""
        if not self._ready:
            await self.prepare()
        back = self.back
        await back.relieve()
        geometry = self.disk.geometry
        shift, bits = geometry.l1_shift, geometry.cluster_bits
        end = min(offset + length, (offset >> shift) + 1 << shift)
        holder = await self.tickets.acquire(offset >> bits, (end - 1 >> bits) + 1, exclusive=True)
        try:
            async with back.lock:
                return await self._claim(offset, end, holder)
        except CorruptImageError as error:
            self.tickets.release(holder)
            await back.condemn(error)
            raise
        except BaseException:
            self.tickets.release(holder)
            raise

    async def _claim(self, offset: int, end: int, holder: object) -> WriteTicket:
        """The ticket for guest bytes ``offset`` to ``end``, or the first of them; in one table."""
        disk = self.disk
        geometry = disk.geometry
        size = geometry.cluster_size
        number = offset >> geometry.l1_shift
        table = await self.table(number)
        index = (offset >> geometry.cluster_bits) % geometry.l2_entries
        guest = offset & ~(size - 1)
        most = (end - guest + size - 1) >> geometry.cluster_bits
        kind, host = self._look(table, index, guest, offset, end)
        count = 1
        while count < most:
            there = guest + count * size
            further, next_host = self._look(table, index + count, there, there, end)
            if further != kind or (kind != _NO_ROOM and next_host != host + count * size):
                break
            count += 1
        if kind == _NO_ROOM:
            if geometry.external:
                host = guest
            else:
                host, count = await self.allocator.allocate(count)
        last = guest + (count - 1) * size
        stop = min(end, last + size)
        start, filled = offset, stop
        if kind != _IN_PLACE:
            start = self._fill_from(table, index, kind, guest, offset)
            filled = self._fill_to(table, index + count - 1, kind, last, stop)
            if not geometry.extended and host >= self._written_end():
                # Nothing was ever written there: it reads as zeroes without our doing.
                if self._reads_zero(table, index, guest):
                    start = offset
                if self._reads_zero(table, index + count - 1, last):
                    # Whole sectors: a later write to the same one must not depend on growth.
                    filled = stop + -stop % layout.SECTOR
        moved = host - guest
        return WriteTicket(
            driver=disk,
            storage=disk.data_storage(),
            guest_offset=offset,
            offset=offset + moved,
            length=stop - offset,
            before=offset - start,
            after=filled - stop,
            token=_Claim(
                holder=holder,
                number=number,
                index=index,
                count=count,
                host=host,
                kind=kind,
                start=start - guest,
                end=filled - guest,
            ),
        )

    def _look(self, table: Table, index: int, guest: int, offset: int, end: int) -> tuple[int, int]:
        """What a write of ``offset`` to ``end`` finds in the cluster at ``guest``, and its room."""
        disk = self.disk
        geometry = disk.geometry
        entry, bitmap = disk.entry(table, index, guest)
        kind, host = geometry.decode(entry, bitmap)
        if kind == COMPRESSED or host == NOWHERE:
            return _NO_ROOM, NOWHERE
        if not geometry.external:
            if entry < layout.COPIED:
                return _NO_ROOM, NOWHERE
            if host in self.allocator.metadata:
                raise CorruptImageError(
                    f"'{disk.image.name()}': guest offset {guest:#x} keeps a cluster at {host:#x}, "
                    "where there is metadata; check the image",
                    offset=host,
                    field="L2 entry",
                    value=entry,
                )
        if kind in {MIXED, UNALLOCATED}:
            touched = self._subclusters(offset - guest, min(end - guest, geometry.cluster_size))
            return (_RESERVED if touched & ~bitmap else _IN_PLACE), host
        return (_IN_PLACE if kind == DATA else _RESERVED), host

    def _subclusters(self, start: int, end: int) -> int:
        """The bits of the subclusters that bytes ``start`` to ``end`` of a cluster touch."""
        size = self.disk.geometry.subcluster_size
        first = max(start, 0) // size
        last = (min(end, self.disk.geometry.cluster_size) - 1) // size
        return (1 << last + 1) - (1 << first)

    def _fill_from(self, table: Table, index: int, kind: int, guest: int, offset: int) -> int:
        """From which guest offset on the new room of the first cluster has to be filled."""
        unit = self._fill_unit(table, index, kind, guest, offset)
        return offset - offset % unit

    def _fill_to(self, table: Table, index: int, kind: int, guest: int, stop: int) -> int:
        """Up to which guest offset the new room of the last cluster has to be filled."""
        unit = self._fill_unit(table, index, kind, guest, stop - 1)
        return stop + -stop % unit

    def _fill_unit(self, table: Table, index: int, kind: int, guest: int, at: int) -> int:
        """The block around guest offset ``at`` that becomes data as a whole; 1 if it is already."""
        geometry = self.disk.geometry
        if not geometry.extended:
            return geometry.cluster_size
        entry, bitmap = self.disk.entry(table, index, guest)
        allocated = bitmap & layout.ALL_ALLOCATED
        if kind == _NO_ROOM:
            # What has data elsewhere is copied whole; else subclusters may stay as they are.
            elsewhere = allocated or entry & layout.COMPRESSED
            return geometry.cluster_size if elsewhere else geometry.subcluster_size
        if allocated >> (at - guest) // geometry.subcluster_size & 1:
            return 1
        return geometry.subcluster_size

    def _reads_zero(self, table: Table, index: int, guest: int) -> bool:
        """Whether a cluster without subclusters is known to read as zeroes."""
        kind, _ = self.disk.geometry.decode(*self.disk.entry(table, index, guest))
        return kind == ZERO or (kind == UNALLOCATED and self.disk.nothing_reads_zero())

    def _written_end(self) -> int:
        """The host offset from which on data clusters were never written."""
        return _FAR if self.disk.geometry.external else self.disk.image.size()

    async def commit(self, ticket: WriteTicket) -> None:
        """See ``FormatDriverInstance.commit_write``."""
        claim = ticket.token
        assert isinstance(claim, _Claim)
        try:
            if claim.kind != _IN_PLACE:
                async with self.back.lock:
                    try:
                        self.back.check()
                        self._show(claim, await self.table(claim.number))
                    except BaseException:
                        await self._give_back(claim)
                        raise
        finally:
            self._release(claim)

    async def abort(self, ticket: WriteTicket) -> None:
        """See ``FormatDriverInstance.abort_write``."""
        claim = ticket.token
        assert isinstance(claim, _Claim)
        try:
            async with self.back.lock:
                await self._give_back(claim)
        finally:
            self._release(claim)

    def _release(self, claim: _Claim) -> None:
        if claim.holder is not None:
            self.tickets.release(claim.holder)

    async def _give_back(self, claim: _Claim) -> None:
        """Free what was never shown, at once."""
        if claim.kind == _NO_ROOM and not self.disk.geometry.external:
            try:
                await self.allocator.lower(claim.host, claim.count)
            except UnderlayError as error:
                _log.warning("%d clusters are leaked: %s", claim.count, error)

    def _show(self, claim: _Claim, table: Table) -> None:
        """Let the entries lead to what was written."""
        geometry = self.disk.geometry
        size, count = geometry.cluster_size, claim.count
        first = claim.host | layout.COPIED
        if geometry.extended:
            for number in range(count):
                self._show_subclusters(claim, table, number, first + number * size)
        else:
            old = table[claim.index : claim.index + count]
            table[claim.index : claim.index + count] = array(
                "Q", range(first, first + count * size, size)
            )
            if claim.kind == _NO_ROOM and any(old):
                for entry in old:
                    self.let_go(entry)
        if not geometry.external:
            self.disk.reach(claim.host + claim.end)
        self.back.touch_l2(claim.number, table, claim.index, count, shows=True)

    def _show_subclusters(self, claim: _Claim, table: Table, number: int, entry: int) -> None:
        at = (claim.index + number) * 2
        old, bitmap = table[at : at + 2]
        shift = number * self.disk.geometry.cluster_size
        touched = self._subclusters(claim.start - shift, claim.end - shift)
        allocated = touched
        if claim.kind == _RESERVED:
            allocated |= bitmap & layout.ALL_ALLOCATED
        zero = (bitmap >> layout.SUBCLUSTERS) & ~touched
        table[at : at + 2] = array("Q", (entry, allocated | zero << layout.SUBCLUSTERS))
        if claim.kind == _NO_ROOM:
            self.let_go(old)

    def let_go(self, entry: int) -> None:
        """Free, late, what an L2 entry led to that is no more; under the lock."""
        for offset, clusters in self.clusters_of(entry):
            self.back.release(offset, clusters)

    def clusters_of(self, entry: int) -> list[tuple[int, int]]:
        """What an L2 entry holds a reference to: host offset and clusters, of the image file."""
        geometry = self.disk.geometry
        if entry & layout.COMPRESSED:
            offset, length = geometry.compressed(entry)
            first = offset & ~(geometry.cluster_size - 1)
            return [(first, self.clusters(offset + length - first))]
        if not geometry.external and entry & layout.HOST_OFFSET:
            return [(entry & layout.HOST_OFFSET, 1)]
        return []

    def clusters(self, length: int) -> int:
        """How many clusters hold so many bytes."""
        return -(-length >> self.disk.geometry.cluster_bits)

    async def _unwritten(self, claim: _Claim, start: int, end: int) -> list[tuple[int, int]]:
        """Which guest bytes of a claim's are not data in their own place yet.

        The rest must not be written: somebody may be doing that, who needs no ticket for it.
        """
        if claim.kind != _RESERVED:
            return [] if claim.kind == _IN_PLACE else [(start, end)]
        pieces: list[tuple[int, int]] = []
        while start < end:
            kind, _, length = await self.disk.run_at(start, end - start)
            if kind != DATA:
                pieces.append((start, min(start + length, end)))
            start += length
        return pieces

    # -- tables

    async def table(self, number: int) -> Table:
        """The L2 table behind an L1 entry, made or copied if need be; under the lock."""
        disk = self.disk
        entry = disk.l1[number]
        old = await disk.l2_table(number)
        if old is not None and entry & layout.COPIED:
            return old
        offset, _ = await self.allocator.allocate(1)
        self.allocator.metadata.add(offset)
        table = empty_table(disk.geometry.cluster_size // 8) if old is None else old[:]
        self.back.link_l2(number, table, offset)
        if entry:
            self.back.release(entry & layout.HOST_OFFSET)
        return table

    # -- for one who is alone with all clusters: resizing, snapshots, and the like

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[None]:
        """While this is held, nobody has a ticket, and no entry is changed by others."""
        async with self.tickets.hold(0, _FAR, exclusive=True):
            yield

    @asynccontextmanager
    async def at_rest(self) -> AsyncGenerator[None]:
        """As ``alone``; and nobody writes through a mapping that he got before.

        Raises:
            ConflictError: somebody has held a lease for too long.
        """
        async with self._resting:
            # From now on even rewriting takes a ticket.
            self.disk.forbid_writing()
            try:
                await self.back.leases_ended()
                async with self.alone():
                    yield
            finally:
                if not self.back.broken:
                    self.disk.allow_writing(self.allocator.metadata)

    async def snapshot_table_bytes(self) -> int:
        """How long the snapshot table is."""
        from underlay_drivers.qcow2.snapshots import read_snapshots

        entries = await read_snapshots(self.disk.image, self.disk.header, self._limits)
        return sum(len(entry.pack()) for entry in entries)

    async def write_zeroes(self, offset: int, end: int) -> None:
        """Write zeroes to guest bytes ``offset`` to ``end``, which may lie past the disk's end."""
        zeroes = memoryview(bytes(min(end - offset, _COPY)))
        while offset < end:
            number = offset >> self.disk.geometry.l1_shift
            stop = min(end, offset + len(zeroes), number + 1 << self.disk.geometry.l1_shift)
            async with self.back.lock:
                ticket = await self._claim(offset, stop, None)
            await self._fulfil(ticket, zeroes[: ticket.length])
            offset += ticket.length

    async def reserve(self, offset: int, end: int, preallocation: PreallocateMode) -> int:
        """Give the clusters from guest ``offset`` on room that reads as zeroes: for how many bytes.

        They are unallocated, and nothing shows through them.
        """
        disk = self.disk
        geometry = disk.geometry
        stop = min(end, (offset >> geometry.l1_shift) + 1 << geometry.l1_shift)
        async with self.back.lock:
            ticket = await self._claim(offset, stop, None)
        claim = ticket.token
        assert isinstance(claim, _Claim)
        if claim.kind != _NO_ROOM:
            return ticket.length
        host_end = claim.host + claim.count * geometry.cluster_size
        try:
            if not geometry.external:
                size = disk.image.size()
                if claim.host < size:
                    await disk.image.write_zeroes(
                        claim.host, min(host_end, size) - claim.host, allocate=True
                    )
                if host_end > size:
                    await disk.image.resize(host_end, preallocation)
        except BaseException:
            await to_the_end(self.abort(ticket))
            raise
        async with self.back.lock:
            table = await self.table(claim.number)
            if geometry.extended:
                entries = table[claim.index * 2 : (claim.index + claim.count) * 2]
                first = claim.host | layout.COPIED
                entries[::2] = array(
                    "Q",
                    range(
                        first, first + claim.count * geometry.cluster_size, geometry.cluster_size
                    ),
                )
                table[claim.index * 2 : (claim.index + claim.count) * 2] = entries
                self.back.touch_l2(claim.number, table, claim.index, claim.count, shows=True)
            else:
                self._show(claim, table)
            if not geometry.external:
                disk.reach(host_end)
        return ticket.length

    def claim_metadata(self, offset: int, clusters: int) -> None:
        """These clusters hold a table from now on; under the lock."""
        size = self.disk.geometry.cluster_size
        self.allocator.metadata.update(range(offset, offset + clusters * size, size))

    async def give_back_metadata(self, offset: int, clusters: int) -> None:
        """Free clusters at once to which nothing on disk has ever led."""
        size = self.disk.geometry.cluster_size
        async with self.back.lock:
            await self.allocator.lower(offset, clusters)
            self.allocator.metadata.difference_update(range(offset, offset + clusters * size, size))

    # -- mapping for others

    async def ensure_data(self, offset: int, length: int) -> tuple[StorageHandle, int, int]:
        """See ``FormatDriverInstance.ensure_data_mapping``; what is new holds the old content."""
        await self.prepare()
        location = self.disk.locate(offset)
        if location is not None and location[3]:
            return location[0], location[1], min(location[2], length)
        ticket = await self.begin(offset, length)
        await self._fulfil(ticket, None)
        return ticket.storage, ticket.offset, ticket.length

    async def _fulfil(self, ticket: WriteTicket, data: memoryview | None) -> None:
        """Write a ticket's data (None: what is there now) with what surrounds it, and show it."""
        from underlay.reading import Reader

        claim = ticket.token
        assert isinstance(claim, _Claim)
        reader = Reader(self.disk)
        moved = ticket.offset - ticket.guest_offset
        start = ticket.guest_offset - ticket.before
        end = ticket.guest_offset + ticket.length + ticket.after
        try:
            pieces = [(start, ticket.guest_offset), (ticket.guest_offset + ticket.length, end)]
            if data is None:
                pieces = await self._unwritten(claim, start, end)
            for first, stop in pieces:
                at = first
                while at < stop:
                    piece = memoryview(bytearray(min(stop - at, _COPY)))
                    await reader.readv((piece,), at)
                    await ticket.storage.writev((piece,), at + moved)
                    at += len(piece)
            if data is not None:
                await ticket.storage.writev((data,), ticket.offset)
        except BaseException:
            await to_the_end(self.abort(ticket))
            raise
        await to_the_end(self.commit(ticket))
