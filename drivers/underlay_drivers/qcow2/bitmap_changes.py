"""Adding, removing and changing dirty bitmaps.

What is new is written to new places and made durable, reference counts included. Then one write,
inside one sector, shows it: of the header, of the pointer to a bitmap's table, or of its flags.
What that lets go is freed late. A crash leaves the bitmap as it was or as it is to be, and leaks at
worst; guest data is never touched.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs

from underlay.errors import (
    ConflictError,
    CorruptImageError,
    LimitExceededError,
    OptionError,
    UnderlayError,
    UnsupportedOperationError,
)
from underlay.face import to_the_end
from underlay.steps import Steps, StepsCallback
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.bitmap_data import BitmapShape, load_bitmap_table, set_bits
from underlay_drivers.qcow2.bitmaps import BitmapEntry, find_bitmap, read_bitmaps
from underlay_drivers.qcow2.header import BitmapsExtension, Extension, Header, text
from underlay_drivers.qcow2.tables import Table, packed
from underlay_drivers.qcow2.writeback import HeaderSwitch

if TYPE_CHECKING:
    from underlay.capabilities import BitmapStore
    from underlay.limits import Limits
    from underlay_drivers.qcow2.dependencies import Dependencies
    from underlay_drivers.qcow2.dirty import Freed
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = [
    "BitmapChange",
    "add_bitmap",
    "clear_bitmap",
    "enable_bitmap",
    "merge_bitmap",
    "remove_bitmap",
]

#: Where the granularity is chosen by us: a cluster, but neither less nor more than these.
_GRANULARITY: Final = (4096, 65536)


async def add_bitmap(
    writer: ImageWriter, limits: Limits, name: str, *, granularity: int | None, enabled: bool
) -> BitmapEntry:
    """See ``BitmapStore.add_bitmap``."""
    disk = writer.disk
    stored = name.encode("utf-8", "surrogateescape")
    if not stored:
        raise OptionError("Bitmap name cannot be empty", option="name")
    low, high = _GRANULARITY
    size = granularity or min(max(disk.geometry.cluster_size, low), high)
    if size.bit_count() != 1 or size.bit_length() - 1 not in layout.GRANULARITY_BITS:
        raise OptionError("Granularity must be power of 2 and at least 512", option="granularity")
    async with _changing(writer, limits) as change:
        if any(entry.name == stored for entry in change.entries):
            raise ConflictError(f"Bitmap already exists: {name}")
        shape = BitmapShape.of(disk.header, size.bit_length() - 1)
        _check_room(disk, change.entries, name, len(stored), shape)
        entry = BitmapEntry(
            bitmap_table_offset=await change.write_table(array("Q", bytes(8 * shape.entries))),
            bitmap_table_size=shape.entries,
            flags=layout.BITMAP_AUTO if enabled else 0,
            type=layout.DIRTY_TRACKING,
            granularity_bits=shape.granularity_bits,
            extra=b"",
            name=stored,
        )
        await change.list((*change.entries, entry))
    return entry


def _check_room(
    disk: Dependencies, entries: Sequence[BitmapEntry], name: str, length: int, shape: BitmapShape
) -> None:
    """Refuse a bitmap that cannot be stored."""

    def refuse(why: str) -> str:
        return f"Can't make bitmap '{name}' persistent in '{disk.image.name()}': {why}"

    if disk.header.version == 2:  # noqa: PLR2004 (a version is its own best name)
        raise UnsupportedOperationError(refuse("Cannot store dirty bitmaps in qcow2 v2 files"))
    if not shape.bits:
        raise UnsupportedOperationError(refuse("The disk has no bytes, and so its bitmap no bits"))
    if length > layout.BITMAP_NAME_MAX:
        most = layout.BITMAP_NAME_MAX
        raise OptionError(refuse(f"Name length exceeds maximum ({most} characters)"), option="name")
    if shape.length > layout.BITMAP_BYTES_MAX:
        raise OptionError(
            refuse("Too much space will be occupied by the bitmap. Use larger granularity"),
            option="granularity",
        )
    if len(entries) >= layout.BITMAPS_MAX:
        raise LimitExceededError(
            refuse("Maximum number of persistent bitmaps is already reached"),
            limit="bitmaps",
            value=len(entries) + 1,
            allowed=layout.BITMAPS_MAX,
        )


async def remove_bitmap(
    writer: ImageWriter, limits: Limits, name: str, progress: StepsCallback | None = None
) -> None:
    """See ``BitmapStore.remove_bitmap``."""
    steps = Steps(progress, writer.disk.size())
    async with _changing(writer, limits) as change:
        at = find_bitmap(change.entries, name)
        _, freed = await change.load(change.entries[at], steps)
        await change.list((*change.entries[:at], *change.entries[at + 1 :]), freed)
    steps.end()


async def enable_bitmap(writer: ImageWriter, limits: Limits, name: str, *, enabled: bool) -> None:
    """See ``BitmapStore.enable_bitmap`` and ``disable_bitmap``."""
    async with _changing(writer, limits) as change:
        at = find_bitmap(change.entries, name)
        entry = change.entries[at].usable()
        flags = entry.flags & ~layout.BITMAP_AUTO | (layout.BITMAP_AUTO if enabled else 0)
        if flags != entry.flags:
            await change.overwrite(at, layout.BITMAP_FLAGS_OFFSET, flags.to_bytes(4, "big"))


async def clear_bitmap(
    writer: ImageWriter, limits: Limits, name: str, progress: StepsCallback | None = None
) -> None:
    """See ``BitmapStore.clear_bitmap``."""
    steps = Steps(progress, writer.disk.size())
    async with _changing(writer, limits) as change:
        at = find_bitmap(change.entries, name)
        entry = change.entries[at].usable()
        table, freed = await change.load(entry, steps)
        if any(table):
            place = await change.write_table(array("Q", bytes(8 * len(table))))
            await change.overwrite(at, 0, place.to_bytes(8, "big"), freed)
    steps.end()


async def merge_bitmap(
    writer: ImageWriter,
    limits: Limits,
    name: str,
    source: str,
    store: BitmapStore,
    *,
    progress: StepsCallback | None = None,
) -> None:
    """See ``BitmapStore.merge_bitmap``."""
    steps = Steps(progress, writer.disk.size())
    async with _changing(writer, limits) as change:
        at = find_bitmap(change.entries, name)
        entry = change.entries[at].usable()
        table, _ = await change.load(entry)
        shape = BitmapShape.of(writer.disk.header, entry.granularity_bits)
        shape.check(writer.disk.image, entry)
        merge = _Merge(change, shape, table)
        offset, size = 0, writer.disk.header.size
        while offset < size:
            found = await store.dirty_ranges(source, offset)
            if found.size != size:
                raise ConflictError(
                    f"Bitmaps are of different sizes (destination size is {size}, source size is "
                    f"{found.size}) and can't be merged"
                )
            for start, length in found.ranges:
                await merge.set(start, length)
                steps.reach(start + length)
            offset = found.end
            steps.reach(offset)
        await merge.finish()
        if merge.changed:
            place = await change.write_table(table)
            old = (entry.bitmap_table_offset, writer.clusters(len(table) * 8))
            await change.overwrite(at, 0, place.to_bytes(8, "big"), [old, *merge.freed])
    steps.end()


@attrs.define
class _Merge:
    """Sets bits in ascending order, with one cluster of them in memory at a time."""

    change: BitmapChange
    shape: BitmapShape
    #: The bitmap's, which it changes.
    table: Table
    changed: bool = False
    freed: list[Freed] = attrs.field(factory=list["Freed"])
    _number: int = -1
    _page: bytearray = attrs.field(factory=bytearray)

    async def set(self, start: int, length: int) -> None:
        """Set the bits that guest bytes ``start`` on belong to."""
        bit, last = self.shape.bit_run(start, length)
        while bit < last:
            number = bit // self.shape.page_bits
            base = number * self.shape.page_bits
            end = min(last, base + self.shape.page_bits)
            if number != self._number:
                await self.finish()
                await self._open(number)
            set_bits(self._page, bit - base, end - base)
            bit = end

    async def _open(self, number: int) -> None:
        size = 1 << self.shape.cluster_bits
        word = self.table[number]
        host = word & layout.HOST_OFFSET
        if host:
            self._page = bytearray(await self.change.writer.disk.image.read_bytes(host, size))
        else:
            bits = min(self.shape.page_bits, self.shape.bits - number * self.shape.page_bits)
            self._page = bytearray(size)
            if word & layout.BITMAP_ONES:
                set_bits(self._page, 0, bits)
        self._number = number

    async def finish(self) -> None:
        """Write the cluster of bits that is in memory, if it has changed."""
        number, self._number = self._number, -1
        if number < 0:
            return
        full = self._page.count(0xFF) == len(self._page)
        old = self.table[number]
        host = old & layout.HOST_OFFSET
        if full:
            word = layout.BITMAP_ONES
            if old == word:
                return
        else:
            image = self.change.writer.disk.image
            if host and await image.read_bytes(host, len(self._page)) == self._page:
                return
            word = await self.change.write_data(self._page)
        if host:
            self.freed.append((host, 1))
        self.table[number] = word
        self.changed = True


# -- the change of an image


@asynccontextmanager
async def _changing(writer: ImageWriter, limits: Limits) -> AsyncGenerator[BitmapChange]:
    """A change of the bitmaps; what fails before it is shown leaves nothing behind."""
    async with writer.bitmaps_at_rest():
        disk = writer.disk
        change = BitmapChange(writer, limits, await read_bitmaps(disk.image, disk.header, limits))
        try:
            yield change
        except BaseException:
            if not writer.back.broken:
                await to_the_end(change.undo())
            raise


@attrs.define
class BitmapChange:
    """A change of an image's bitmaps, with what it has written so far and nothing leads to."""

    writer: ImageWriter
    limits: Limits
    entries: tuple[BitmapEntry, ...]
    _made: list[Freed] = attrs.field(factory=list["Freed"])

    async def load(
        self, entry: BitmapEntry, steps: Steps | None = None
    ) -> tuple[Table, list[Freed]]:
        """A bitmap's table; and the clusters that it and the bits behind it take.

        ``steps`` are the bytes of the disk.

        Raises:
            CorruptImageError: it makes no sense, or something it leads to counts as free.
        """
        disk = self.writer.disk
        size = disk.geometry.cluster_size
        table = await load_bitmap_table(disk.image, disk.header, entry, self.limits)
        clusters = self.writer.clusters(len(table) * 8)
        hosts = [entry.bitmap_table_offset + number * size for number in range(clusters)]
        hosts += [word & layout.HOST_OFFSET for word in table if word & layout.HOST_OFFSET]
        allocator = self.writer.allocator
        tell = None if steps is None else steps.part(disk.size())
        for number, host in enumerate(hosts):
            if tell is not None:
                tell(number, len(hosts))
            wrong = number >= clusters and host in allocator.metadata
            if wrong or not await allocator.refcount(host):
                raise CorruptImageError(
                    f"'{disk.image.name()}': the bitmap '{text(entry.name)}' leads to {host:#x}, "
                    "which is not its own; check the image",
                    offset=host,
                    field="bitmap table entry",
                    value=host,
                )
        if len(hosts) > clusters:
            async with self.writer.back.lock:
                await allocator.believe()
        return table, [(host, 1) for host in hosts]

    async def write_table(self, table: Table) -> int:
        """Write a table to where nothing leads yet: its host offset."""
        return await self._write(packed(table), metadata=True)

    async def write_data(self, page: bytearray) -> int:
        """The same for a cluster of bits."""
        return await self._write(bytes(page), metadata=False)

    async def _write(self, data: bytes, *, metadata: bool) -> int:
        writer = self.writer
        clusters = writer.clusters(len(data))
        async with writer.back.lock:
            offset = await writer.allocator.allocate_exactly(clusters)
            self._made.append((offset, clusters))
            if metadata:
                writer.claim_metadata(offset, clusters)
        whole = clusters << writer.disk.geometry.cluster_bits
        await writer.disk.image.write(data.ljust(whole, b"\0"), offset)
        await writer.back.relieve()
        return offset

    async def undo(self) -> None:
        """Give back what was written, since nothing will lead to it."""
        for offset, clusters in self._made:
            await self.writer.give_back_metadata(offset, clusters)

    async def list(self, entries: Sequence[BitmapEntry], freed: Sequence[Freed] = ()) -> None:
        """Let the image have these bitmaps from now on; ``freed`` is what it does without."""
        writer = self.writer
        old = writer.disk.header.bitmaps if self.entries else None
        extension = None
        if entries:
            directory = b"".join(entry.pack() for entry in entries)
            if len(directory) > layout.BITMAP_DIRECTORY_BYTES_MAX:
                raise LimitExceededError(
                    f"'{writer.disk.image.name()}': there is no room for another bitmap; remove "
                    "some first",
                    limit="bitmap directory",
                    value=len(directory),
                    allowed=layout.BITMAP_DIRECTORY_BYTES_MAX,
                )
            extension = BitmapsExtension(
                nb_bitmaps=len(entries),
                reserved=0,
                directory_size=len(directory),
                directory_offset=await self._write(directory, metadata=True),
            )
        if old is not None:
            freed = [*freed, (old.directory_offset, writer.clusters(old.directory_size))]
        await writer.back.flush()
        await to_the_end(self._switch(extension, freed))

    async def _switch(self, extension: BitmapsExtension | None, freed: Sequence[Freed]) -> None:
        await self.writer.back.switch_header(
            HeaderSwitch(change=lambda header: _with_bitmaps(header, extension), freed=freed)
        )
        self._made.clear()

    async def overwrite(
        self, number: int, field: int, data: bytes, freed: Sequence[Freed] = ()
    ) -> None:
        """Change a field of a bitmap's directory entry in place, when all else is durable."""
        writer = self.writer
        extension = writer.disk.header.bitmaps
        assert extension is not None
        before = sum(len(entry.pack()) for entry in self.entries[:number])
        await writer.back.flush()
        await writer.back.sync()

        async def write() -> None:
            image = writer.disk.image
            try:
                await image.write(data, extension.directory_offset + before + field)
                await image.sync()
            except UnderlayError as error:
                writer.back.give_up("the bitmap directory could not be written", error)
                raise
            self._made.clear()
            for offset, clusters in freed:
                writer.back.release(offset, clusters)

        await to_the_end(write())


def _with_bitmaps(header: Header, bitmaps: BitmapsExtension | None) -> Header:
    """``header`` leading to this bitmap directory, or to none."""
    kinds = [extension.type for extension in header.extensions]
    extensions = list(header.extensions)
    present = layout.EXTENSION_BITMAPS in kinds
    at = kinds.index(layout.EXTENSION_BITMAPS) if present else len(kinds)
    autoclear = header.autoclear_features & ~layout.BITMAPS_CONSISTENT
    if bitmaps is None:
        extensions[at : at + 1] = []
    else:
        extensions[at : at + 1] = [Extension(layout.EXTENSION_BITMAPS, bitmaps.pack())]
        autoclear |= layout.BITMAPS_CONSISTENT
    return attrs.evolve(header, extensions=tuple(extensions), autoclear_features=autoclear)
