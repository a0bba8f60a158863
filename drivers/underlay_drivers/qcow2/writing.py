"""The writing side of one image: made ready before the first change, and brought to rest.

The two phases of a guest's write are in ``claims``, the order on disk in ``writeback``.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

import attrs

from underlay.driver import WriteTicket
from underlay.errors import CorruptImageError
from underlay.face import to_the_end
from underlay.locks import Lock
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.allocation import Allocator
from underlay_drivers.qcow2.claims import Claim, Claims
from underlay_drivers.qcow2.covering import IN_PLACE, NO_ROOM, RESERVED
from underlay_drivers.qcow2.strays import Strays
from underlay_drivers.qcow2.surveying import survey
from underlay_drivers.qcow2.tables import DATA
from underlay_drivers.qcow2.writeback import Writeback

if TYPE_CHECKING:
    from underlay.handle import StorageHandle
    from underlay.limits import Limits
    from underlay.storage import PreallocateMode
    from underlay_drivers.qcow2.writable import Writable

__all__ = ["ImageWriter"]

#: Further than any host offset.
_FAR: Final = 1 << 64
#: Bytes that are copied at a time.
_COPY: Final = 1 << 20


class ImageWriter(Claims):
    """The writing side of one open image."""

    __slots__ = ("_at_rest", "_known", "_limits", "_preparing", "_resting")

    def __init__(
        self, disk: Writable, *, limits: Limits, cache_size: int, refcount_cache_size: int
    ) -> None:
        allocator = Allocator(
            disk.image,
            disk.header,
            metadata=set(),
            cache_size=refcount_cache_size,
            verify=self._verify_counts,
        )
        super().__init__(disk, allocator, Writeback(disk, allocator, dirty_limit=cache_size // 2))
        self._limits = limits
        self._preparing = Lock()
        self._resting = Lock()
        #: Whether nobody may rewrite plain data in place, since somebody wants rest.
        self._at_rest = False
        #: Whether it is known where everything lies.
        self._known = False

    # -- before the first change

    async def prepare(self) -> None:
        """Make the image ready to be changed; opening it for writing alone changes nothing.

        Raises:
            CorruptImageError: its metadata contradicts itself; it was marked as corrupt, and
                nothing else was changed.
        """
        self.back.check()
        await self.make_ready()

    async def make_ready(self) -> None:
        """The same, for one who has a ticket or is alone: it may have been brought to rest."""
        if not self.ready:
            async with self._preparing:
                await self._make_ready()

    async def survey(self) -> None:
        """Find out where everything lies, for a change that leaves guest data as it is.

        Raises:
            CorruptImageError: as ``prepare`` does.
        """
        self.back.check()
        async with self._preparing:
            await self._survey()

    async def _survey(self) -> None:
        if self._known:
            return
        async with self.back.condemning():
            if self.disk.header.incompatible_features & layout.DIRTY:
                await self._mend()
            await self.look_around()
        self._known = True

    async def _verify_counts(self) -> bool:
        from underlay_drivers.qcow2.verifying import verify_counts

        async with self.back.condemning():
            return await verify_counts(self.disk, self.allocator, self._limits)

    async def _make_ready(self) -> None:
        if self.ready:
            return  # somebody else was quicker
        await self._survey()
        # In one: a bitmap that is marked as in use, and that nobody keeps true, is lost.
        await to_the_end(self._become_ready())

    async def _become_ready(self) -> None:
        if self.disk.header.autoclear_features & layout.BITMAPS_CONSISTENT:
            from underlay_drivers.qcow2.bitmap_tracking import Tracking

            self.tracking = await Tracking.of(self, self._limits)
            if self.tracking is not None and not await self.tracking.start():
                self.tracking = None
        await self._clear_autoclear_bits()
        self.ready = True
        self._allow_writing()

    def _allow_writing(self) -> None:
        """Let plain data be rewritten by anybody, where nobody needs to know of that."""
        if self.ready and not self.back.broken:
            recording = self.tracking is not None and self.tracking.recording
            in_place = not (recording or self._at_rest)
            self.disk.allow_writing(self.allocator.metadata, in_place=in_place)

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
            with self._all_or_no_writing():
                yield
                if self._known:
                    await self.look_around()
                if self.tracking is not None and not await self.tracking.survives():
                    self.tracking = None  # and so its bitmaps stay in use, for ever
            self._allow_writing()

    async def look_around(self) -> None:
        """Find out where all metadata lies, and what is in use, from what is on disk.

        Raises:
            StorageError: it cannot be read. What is in memory is worth nothing then, so an image
                that was changed already cannot be written any more.
        """
        metadata = self.allocator.metadata
        with self._all_or_no_writing():
            metadata.clear()
            metadata |= await survey(self.disk, self._limits)
            await self.allocator.load(self.disk.header)
            self.disk.watch(Strays(self.disk.geometry, self.allocator, name=self.disk.image.name()))

    @contextmanager
    def _all_or_no_writing(self) -> Generator[None]:
        """Once it was changed, an image that is known only in part must not be written."""
        try:
            yield
        except BaseException as error:
            if self._known:
                self.back.give_up("its tables could not be read again", error)
            raise

    async def _clear_autoclear_bits(self) -> None:
        """Tell that what these bits promise is not kept: bitmaps that nobody can keep true."""
        header = self.disk.header
        known = layout.RAW_EXTERNAL_DATA if header.external_data_file else 0
        known |= layout.BITMAPS_CONSISTENT if self.tracking is not None else 0
        kept = header.autoclear_features & known
        if kept != header.autoclear_features:
            await self.disk.image.write(kept.to_bytes(8, "big"), layout.AUTOCLEAR_FEATURES_OFFSET)
            await self.disk.image.sync()
            self.disk.header = attrs.evolve(header, autoclear_features=kept)

    # -- the two phases, which begin when it is ready

    async def begin(self, offset: int, length: int) -> WriteTicket:
        """See ``FormatDriverInstance.begin_write``."""
        if not self.ready:
            await self.prepare()
        return await super().begin(offset, length)

    # -- for one who is alone with all clusters: resizing, snapshots, and the like

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[None]:
        """While this is held, nobody has a ticket, and no entry is changed by others."""
        async with self.tickets.hold(0, _FAR, exclusive=True):
            yield

    @asynccontextmanager
    async def nobody_alone(self) -> AsyncGenerator[None]:
        """While this is held nobody is ``alone``: for those who allocate and have no ticket."""
        async with self.tickets.hold(_FAR - 1, _FAR, exclusive=False):
            yield

    @asynccontextmanager
    async def at_rest(self) -> AsyncGenerator[None]:
        """As ``alone``; and nobody writes through a mapping that he got before.

        Raises:
            ConflictError: somebody has held a lease for too long.
        """
        async with self._resting:
            # From now on even rewriting takes a ticket.
            self._at_rest = True
            self.disk.forbid_writing()
            try:
                await self.back.leases_ended()
                async with self.alone():
                    yield
            finally:
                self._at_rest = False
                self._allow_writing()

    @asynccontextmanager
    async def bitmaps_at_rest(self) -> AsyncGenerator[None]:
        """While this is held no guest data changes, and all bitmaps are as the image says.

        Raises:
            ConflictError: as ``at_rest`` does.
        """
        await self.survey()
        async with self.at_rest(), self._preparing:
            await self.store_bitmaps()
            yield

    async def store_bitmaps(self) -> None:
        """Save the bitmaps; the next change of guest data marks them as in use again."""
        # In one: while some have lost their marks nothing may change that they would not tell of.
        await to_the_end(self._store_bitmaps())

    async def _store_bitmaps(self) -> None:
        has_freed = self.tracking is not None and await self.tracking.store()
        self.disk.forbid_writing()
        self.ready, self.tracking = False, None
        if has_freed:
            await self.back.flush()
            await self.back.sync()

    async def write_zeroes(self, offset: int, end: int) -> None:
        """Write zeroes to guest bytes ``offset`` to ``end``, which may lie past the disk's end."""
        zeroes = memoryview(bytes(min(end - offset, _COPY)))
        while offset < end:
            number = offset >> self.disk.geometry.l1_shift
            stop = min(end, offset + len(zeroes), number + 1 << self.disk.geometry.l1_shift)
            async with self.back.lock:
                ticket = await self.claim(offset, stop, None)
            await self._fulfil(ticket, zeroes[: ticket.length])
            await self.back.relieve()
            offset += ticket.length

    async def reserve(self, offset: int, end: int, preallocation: PreallocateMode) -> int:
        """Give the clusters from guest ``offset`` on room that reads as zeroes: for how many bytes.

        They are unallocated, and nothing shows through them.
        """
        disk = self.disk
        geometry = disk.geometry
        stop = min(end, (offset >> geometry.l1_shift) + 1 << geometry.l1_shift)
        async with self.back.lock:
            ticket = await self.claim(offset, stop, None)
        claim = ticket.token
        assert isinstance(claim, Claim)
        if claim.kind != NO_ROOM:
            return ticket.length
        host_end = claim.host + claim.count * geometry.cluster_size
        try:
            if not geometry.external:
                size = disk.image.size()
                if claim.host < size:
                    await disk.image.write_zeroes(
                        claim.host, min(host_end, size) - claim.host, allocate=True
                    )
                async with self.back.not_flushing():
                    # A table that is written behind it now must not be cut off again.
                    if host_end > disk.image.size():
                        await disk.image.resize(host_end, preallocation)
        except BaseException:
            await to_the_end(self.abort(ticket))
            raise
        await to_the_end(self._show_reserved(claim))
        return ticket.length

    async def _show_reserved(self, claim: Claim) -> None:
        geometry = self.disk.geometry
        size, count = geometry.cluster_size, claim.count
        async with self.back.lock:
            try:
                table = await self.table(claim.number)
            except BaseException:
                await self._give_back(claim)
                raise
            if geometry.extended:
                at, end = claim.index * 2, (claim.index + count) * 2
                entries = table[at:end]
                first = claim.host | layout.COPIED
                entries[::2] = array("Q", range(first, first + count * size, size))
                table[at:end] = entries
                self.back.touch_l2(claim.number, table, claim.index, count, shows=True)
            else:
                self._show(claim, table)
            if not geometry.external:
                self.disk.reach(claim.host + count * size)

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

    async def _unwritten(self, claim: Claim, start: int, end: int) -> list[tuple[int, int]]:
        """Which guest bytes of a claim's are not data in their own place yet.

        The rest must not be written: somebody may be doing that, who needs no ticket for it.
        """
        if claim.kind != RESERVED:
            return [] if claim.kind == IN_PLACE else [(start, end)]
        pieces: list[tuple[int, int]] = []
        while start < end:
            kind, _, length = await self.disk.run_at(start, end - start)
            if kind != DATA:
                pieces.append((start, min(start + length, end)))
            start += length
        return pieces

    async def _fulfil(self, ticket: WriteTicket, data: memoryview | None) -> None:
        """Write a ticket's data (None: what is there now) with what surrounds it, and show it."""
        from underlay.reading import Reader

        claim = ticket.token
        assert isinstance(claim, Claim)
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
