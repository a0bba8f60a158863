"""One walk over a mapping, poured into cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import attrs

from underlay.gate import ImplicitOpenGate
from underlay.jobs.map import MapEntry, StorageNames, batched_extents, entry_of
from underlay.jobs.opened import Source, opened
from underlay.jobs.picture.model import (
    COLOURS,
    PLOT_COLUMNS,
    PLOT_ROWS,
    HostFile,
    Ink,
    Kind,
    Picture,
    PictureLayer,
)
from underlay.jobs.progress import ProgressCallback, counting
from underlay.limits import Limits
from underlay.mapping import Data, DiskExtent, Special
from underlay.steps import Steps
from underlay.storage import AnyStorage
from underlay.sync import SyncFormatAccess

__all__ = ["picture"]

#: Cells of a picture, at most.
_CELLS = 2048
_SMALLEST_CELL = 512
#: Encoded units are packed to the byte, and read in whole sectors.
_SECTOR = 512

_Stored: TypeAlias = "Data[AnyStorage] | Special[AnyStorage]"


def picture(
    disk: Source,
    *,
    start: int = 0,
    length: int | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    storage_options: Mapping[str, object] | None = None,
    progress: ProgressCallback | None = None,
) -> Picture:
    """Gather where the data of a disk lies, from guest offset ``start`` on.

    Takes the time of one walk over the mapping, and as much memory for any disk. ``gate``,
    ``limits`` and ``storage_options`` are for a disk that is given by its name.

    Example::

        picture = underlay.jobs.picture("disk.qcow2")
        assert picture.data == 1 << 20
        with open("disk.svg", "w", encoding="utf-8") as file:
            file.write(picture.svg())

    Raises:
        OutOfRangeError: the range is negative.
        CorruptImageError: the tables make no sense.
    """
    with opened(disk, gate=gate, limits=limits, storage_options=storage_options) as image:
        return _gathered(image, start, length, progress)


def _gathered(
    disk: SyncFormatAccess, start: int, length: int | None, progress: ProgressCallback | None
) -> Picture:
    end = disk.size if length is None else min(start + length, disk.size)
    gathered = _Gathered(disk, start, max(end - start, 0))
    steps = Steps(counting(progress), max(end - start, 0))
    for extent in batched_extents(disk, start, length):
        gathered.add(extent)
        steps.did(extent.length)
    steps.end()
    return gathered.picture()


class _Gathered:
    """All that a picture needs of the runs seen so far."""

    def __init__(self, disk: SyncFormatAccess, start: int, length: int) -> None:
        self._disk = disk
        self._start = start
        self._length = length
        self._names = StorageNames(disk)
        self._chain = disk.chain()
        self._cells = _Cells(length)
        #: By depth, for each kind.
        self._plain: dict[int, _Tally] = {}
        self._compressed: dict[int, _Tally] = {}
        self._zero = self._cells.tally(Ink(Kind.ZERO))
        self._unallocated = self._cells.tally(Ink(Kind.UNALLOCATED))
        self._compressed_size = 0
        self._sizes = {
            id(handle.storage): handle.size()
            for layer in self._chain
            for handle in layer.inner.collect_storage_dependencies()
        }
        self._files: dict[int, _File] = {}
        self._runs = 0
        self._last: MapEntry | None = None

    def add(self, extent: DiskExtent) -> None:
        entry = entry_of(extent, self._names)
        if self._last is None or not entry.follows(self._last):
            self._runs += 1
        self._last = entry
        at, mapping = extent.start - self._start, extent.mapping
        if not entry.zero and isinstance(mapping, Data | Special):
            kind = Kind.COMPRESSED if isinstance(mapping, Special) else Kind.DATA
            tallies = self._compressed if kind is Kind.COMPRESSED else self._plain
            tally = tallies.get(extent.depth)
            if tally is None:
                ink = Ink(kind, min(extent.depth, COLOURS - 1))
                tally = tallies[extent.depth] = self._cells.tally(ink)
            self._store(at, extent, mapping)
        # A hole of a raw file is nothing; one under another format was allocated there.
        elif not entry.present or (extent.hole and not entry.data):
            tally = self._unallocated
        else:
            tally = self._zero
        self._cells.add(tally, at, extent.length)

    def _store(self, at: int, extent: DiskExtent, mapping: _Stored) -> None:
        """Note where in its file a run is."""
        if isinstance(mapping, Special):
            size = mapping.host_length
            self._compressed_size += size
        else:
            size = extent.length
        key = id(mapping.storage)
        file = self._files.get(key)
        if file is None:
            name = self._names.of(mapping.storage) or ""
            colour = min(extent.depth, COLOURS - 1)
            host_size = max(self._sizes.get(key, 0), mapping.offset + size)
            # The images beneath those that have a colour are counted, and not drawn: there may be
            # hundreds.
            width = self._length if extent.depth < COLOURS else 0
            file = self._files[key] = _File(name, colour, host_size, width)
        file.add(at, extent.length, mapping.offset, size)

    def picture(self) -> Picture:
        layers = [
            PictureLayer(
                depth=depth,
                name=self._names.images[depth],
                format=layer.format_name,
                data=_total(self._plain.get(depth)),
                compressed=_total(self._compressed.get(depth)),
            )
            for depth, layer in enumerate(self._chain)
        ]
        files = sorted(self._files.values(), key=lambda file: file.stored, reverse=True)
        return Picture(
            name=layers[0].name,
            format=layers[0].format,
            virtual_size=self._disk.size,
            start=self._start,
            length=self._length,
            data=sum(layer.data for layer in layers),
            compressed=sum(layer.compressed for layer in layers),
            zero=self._zero.total,
            unallocated=self._unallocated.total,
            compressed_size=self._compressed_size,
            runs=self._runs,
            layers=tuple(layers),
            files=tuple(file.frozen() for file in files),
            cell_size=self._cells.size,
            cells=self._cells.inks(),
        )


@attrs.define
class _Tally:
    """The bytes of one kind: of the whole disk, and of each cell."""

    #: One list for all that are drawn with the same ink.
    cells: list[int]
    total: int = 0


def _total(tally: _Tally | None) -> int:
    return 0 if tally is None else tally.total


class _Cells:
    """How many bytes of each cell are drawn with each ink."""

    def __init__(self, length: int) -> None:
        self.size = _SMALLEST_CELL
        while self.size * _CELLS < length:
            self.size *= 2
        self._count = -(-length // self.size)
        self._inks: dict[Ink, list[int]] = {}

    def tally(self, ink: Ink) -> _Tally:
        return _Tally(self._inks.setdefault(ink, [0] * self._count))

    def inks(self) -> dict[Ink, list[int]]:
        """Those that something is drawn with."""
        return {ink: cells for ink, cells in self._inks.items() if any(cells)}

    def add(self, tally: _Tally, at: int, length: int) -> None:
        tally.total += length
        cells, size = tally.cells, self.size
        first, last = at // size, (at + length - 1) // size
        if first == last:
            cells[first] += length
            return
        cells[first] += (first + 1) * size - at
        for cell in range(first + 1, last):
            cells[cell] = size
        cells[last] += at + length - last * size


@attrs.define
class _File:
    """A file in host order."""

    name: str
    colour: int
    size: int
    #: Guest bytes that the diagram is wide; 0 for none.
    width: int
    stored: int = 0
    fragments: int = 0
    plot: dict[int, int] = attrs.field(factory=dict[int, int])
    #: Where the last run ended.
    _end: int | None = None

    def add(self, at: int, length: int, offset: int, size: int) -> None:
        """``size`` host bytes at ``offset`` are ``length`` guest bytes at ``at``."""
        self.stored += size
        if self._end is None or not -_SECTOR < offset - self._end < _SECTOR:
            self.fragments += 1
        self._end = offset + size
        if not self.width:
            return
        left = at * PLOT_COLUMNS // self.width
        right = (at + length - 1) * PLOT_COLUMNS // self.width
        if left == right:
            self._add_column(left, offset, size)
            return
        host = offset
        for column in range(left, right + 1):
            # The first guest byte of the next column, and its place in the file.
            border = -(-(column + 1) * self.width // PLOT_COLUMNS)
            until = offset + min((border - at) * size // length, size)
            self._add_column(column, host, until - host)
            host = until

    def _add_column(self, column: int, offset: int, size: int) -> None:
        while size > 0:
            row = min(offset * PLOT_ROWS // self.size, PLOT_ROWS - 1)
            border = -(-(row + 1) * self.size // PLOT_ROWS)
            part = size if row == PLOT_ROWS - 1 else min(size, border - offset)
            place = row * PLOT_COLUMNS + column
            self.plot[place] = self.plot.get(place, 0) + part
            offset += part
            size -= part

    def frozen(self) -> HostFile:
        return HostFile(
            name=self.name,
            size=self.size,
            stored=self.stored,
            fragments=self.fragments,
            colour=self.colour,
            plot=self.plot,
        )
