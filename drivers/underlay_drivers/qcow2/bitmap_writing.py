"""One change of an image's dirty bitmaps.

What is new is written to new places and made durable, reference counts included. Then one write,
inside one sector, shows it: of the header, of the pointer to a bitmap's table, or of its flags.
What that lets go is freed late. A crash leaves the bitmaps as they were or as they are to be, and
leaks at worst; guest data is never touched.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs

from underlay.errors import CorruptImageError
from underlay.face import to_the_end
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.bitmap_data import load_bitmap_table
from underlay_drivers.qcow2.bitmaps import BitmapDirectory, BitmapEntry
from underlay_drivers.qcow2.header import BitmapsExtension, Extension, Header, text
from underlay_drivers.qcow2.tables import Table, packed
from underlay_drivers.qcow2.writeback import HeaderSwitch

if TYPE_CHECKING:
    from underlay.limits import Limits
    from underlay.steps import Steps
    from underlay_drivers.qcow2.dirty import Freed
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["BitmapChange", "changing", "changing_from", "write_field"]

#: What may be changed where it stands.
InPlace: TypeAlias = Literal["bitmap_table_offset", "flags"]
#: Its place in the entry, and its bytes. Aligned, so that no sector has a part of it.
_IN_PLACE: Final[Mapping[InPlace, tuple[int, int]]] = {
    "bitmap_table_offset": (0, 8),
    "flags": (layout.BITMAP_FLAGS_OFFSET, 4),
}


@asynccontextmanager
async def changing(writer: ImageWriter, limits: Limits) -> AsyncGenerator[BitmapChange]:
    """A change of bitmaps that are at rest; what fails before it is shown leaves nothing behind."""
    async with writer.bitmaps_at_rest():
        directory = await writer.disk.directory.read(writer.disk)
        async with changing_from(writer, limits, directory) as change:
            yield change


@asynccontextmanager
async def changing_from(
    writer: ImageWriter, limits: Limits, directory: BitmapDirectory
) -> AsyncGenerator[BitmapChange]:
    """The same from a directory that is known, for one who is alone with the image."""
    change = BitmapChange(writer, limits, directory)
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
    #: As it is on disk.
    directory: BitmapDirectory
    #: Runs of clusters; what one bitmap after the other takes is mostly one run.
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
            self._remember(offset, clusters)
            if metadata:
                writer.claim_metadata(offset, clusters)
        # What is left of the last cluster may stay a hole: of a table that is nearly all of it.
        await writer.disk.image.write(data, offset)
        await writer.back.relieve()
        return offset

    def _remember(self, offset: int, clusters: int) -> None:
        if self._made:
            start, before = self._made[-1]
            if start + (before << self.writer.disk.geometry.cluster_bits) == offset:
                self._made[-1] = start, before + clusters
                return
        self._made.append((offset, clusters))

    async def undo(self) -> None:
        """Give back what was written, since nothing will lead to it."""
        for offset, clusters in self._made:
            await self.writer.give_back_metadata(offset, clusters)

    async def list(self, entries: Sequence[BitmapEntry], freed: Sequence[Freed] = ()) -> None:
        """Let the image have these bitmaps from now on; ``freed`` is what it does without."""
        writer = self.writer
        old = writer.disk.header.bitmaps if self.directory.entries else None
        extension = None
        if entries:
            directory = b"".join(entry.pack() for entry in entries)
            extension = BitmapsExtension(
                nb_bitmaps=len(entries),
                reserved=0,
                directory_size=len(directory),
                directory_offset=await self._write(directory, metadata=True),
            )
        if old is not None:
            freed = [*freed, (old.directory_offset, writer.clusters(old.directory_size))]
        await writer.back.flush()
        await to_the_end(self._switch(entries, extension, freed))

    async def _switch(
        self,
        entries: Sequence[BitmapEntry],
        extension: BitmapsExtension | None,
        freed: Sequence[Freed],
    ) -> None:
        disk = self.writer.disk
        await self.writer.back.switch_header(
            HeaderSwitch(change=lambda header: _with_bitmaps(header, extension), freed=freed)
        )
        self._made.clear()
        disk.directory.keep(disk, BitmapDirectory.of(entries))

    async def overwrite(
        self,
        number: int,
        field: InPlace,
        value: int,
        freed: Sequence[Freed] = (),
    ) -> None:
        """Change a field of a bitmap's directory entry in place, when all else is durable."""
        back = self.writer.back
        await back.flush()
        await back.sync()

        async def write() -> None:
            await write_field(self.writer, self.directory, field, {number: value})
            self._made.clear()
            for offset, clusters in freed:
                back.release(offset, clusters)

        await to_the_end(write())


async def write_field(
    writer: ImageWriter, directory: BitmapDirectory, field: InPlace, values: Mapping[int, int]
) -> BitmapDirectory:
    """Change a field of the entries of these numbers where they stand, durably.

    Returns the directory as it is then. If that fails, nobody knows what the image says of its
    bitmaps, and nothing of it may change any more.
    """
    disk = writer.disk
    extension = disk.header.bitmaps
    assert extension is not None
    within, size = _IN_PLACE[field]
    try:
        for number, value in values.items():
            at = extension.directory_offset + directory.places[number] + within
            await disk.image.write(value.to_bytes(size, "big"), at)
        await disk.image.sync()
    except BaseException as error:
        writer.back.give_up("the bitmap directory could not be written", error)
        raise
    finally:
        disk.directory.forget()
    written = directory.replaced(field, values)
    disk.directory.keep(disk, written)
    return written


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
