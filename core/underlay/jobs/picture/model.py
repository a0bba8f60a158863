"""What a picture shows: numbers, cells in guest order, and files in host order."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import attrs

__all__ = [
    "COLOURS",
    "PLOT_COLUMNS",
    "PLOT_ROWS",
    "UNIT",
    "HostFile",
    "Ink",
    "Kind",
    "Picture",
    "PictureLayer",
]

#: Images with a colour of their own: those beneath share the last one.
COLOURS = 8
#: Cells of the diagram of a file: guest offsets across, host offsets up.
PLOT_COLUMNS = 112
PLOT_ROWS = 72
#: Bytes of a step, of which fragmentation is the share that leads elsewhere.
UNIT = 64 << 10


class Kind(enum.Enum):
    """What guest bytes are."""

    #: Stored as they are.
    DATA = "data"
    #: Stored, and to be decoded.
    COMPRESSED = "compressed"
    #: An image says that they are zeroes, or has allocated them in a hole of its file.
    ZERO = "zero"
    #: Nothing is stored, so that they are zeroes.
    UNALLOCATED = "unallocated"

    @property
    def stored(self) -> bool:
        """Whether there are host bytes for them."""
        return self is Kind.DATA or self is Kind.COMPRESSED


_KINDS = tuple(Kind)


class Ink(NamedTuple):
    """What a cell is drawn with: the colour of an image, in one of the kinds."""

    kind: Kind
    #: The image of the chain, for what is stored; at most ``COLOURS - 1``.
    colour: int = 0

    @property
    def order(self) -> tuple[int, int, int]:
        """Its place in a legend: what is stored first, the top image before those beneath."""
        place = _KINDS.index(self.kind)
        return (0, self.colour, place) if self.kind.stored else (place, 0, 0)


@attrs.frozen(kw_only=True)
class PictureLayer:
    """An image of the chain: what is read from it."""

    #: 0 is the opened image, 1 its backing image, …
    depth: int
    name: str
    format: str
    #: Guest bytes of the picture's range that are read from it.
    data: int
    compressed: int

    @property
    def colour(self) -> int:
        """Which colour it has."""
        return min(self.depth, COLOURS - 1)


@attrs.frozen(kw_only=True)
class HostFile:
    """A file that bytes of the disk are read from, and where in it they are."""

    name: str
    #: Host bytes.
    size: int
    #: Host bytes that are read for the picture's range.
    stored: int
    #: Pieces without a gap, when the disk is read from its beginning to its end.
    fragments: int
    colour: int
    #: Host bytes by place in the diagram: ``row * PLOT_COLUMNS + column``, row 0 being offset 0.
    plot: Mapping[int, int] = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Picture:
    """Where the data of a disk, or of a range of it, lies. All in guest bytes, but for files."""

    name: str
    format: str
    virtual_size: int
    #: The range that is shown.
    start: int
    length: int
    data: int
    compressed: int
    zero: int
    unallocated: int
    #: Host bytes that the compressed ones take.
    compressed_size: int
    #: As many as ``map_image`` lists.
    runs: int
    layers: Sequence[PictureLayer]
    #: Those that bytes are read from, the fullest first.
    files: Sequence[HostFile]
    #: Guest bytes of one cell.
    cell_size: int
    #: For each ink how many bytes of each cell it stands for.
    cells: Mapping[Ink, Sequence[int]] = attrs.field(repr=False)

    @property
    def fragments(self) -> int:
        """Pieces without a gap, in all files."""
        return sum(file.fragments for file in self.files)

    @property
    def fragmentation(self) -> float:
        """How many of the steps from one 64 KiB of a file to the next lead elsewhere: 0.0 to 1.0.

        0.0 is every file in the order of the disk and without a gap.
        """
        steps = sum(-(-file.stored // UNIT) - 1 for file in self.files)
        jumps = self.fragments - len(self.files)
        return min(jumps / max(steps, 1), 1.0)

    def total(self, kind: Kind) -> int:
        """The guest bytes of a kind."""
        return {
            Kind.DATA: self.data,
            Kind.COMPRESSED: self.compressed,
            Kind.ZERO: self.zero,
            Kind.UNALLOCATED: self.unallocated,
        }[kind]

    def svg(self) -> str:
        """An SVG file, below 300 KiB, light or dark as its reader prefers."""
        from underlay.jobs.picture.svg import draw

        return draw(self)

    def html(self) -> str:
        """An HTML page with the same picture, which tells more under the pointer.

        It stands alone: nothing is loaded from anywhere.
        """
        from underlay.jobs.picture.html import page

        return page(self)
