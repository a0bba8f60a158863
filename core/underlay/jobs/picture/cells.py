"""The map in guest order: what each part of the disk is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from underlay.jobs.picture.model import Ink, Picture
from underlay.jobs.picture.palette import ink_class
from underlay.jobs.picture.words import share_words, size_words

__all__ = ["COLUMNS", "Map", "cell_height", "ink_words", "parts"]

#: Cells in a row.
COLUMNS = 64
#: Pixels from cell to cell; a pixel of each is left free.
_PITCH = 9
_HEIGHT = 306
_TALLEST = 18
#: Inks in one cell, at most.
_INKS = 4
#: Tooltips in all, cells that share one if that becomes too many, and inks that one tells of.
_TIPS = 512
_SHARED = (1, 2, 4)
_TOLD_INKS = 3
#: Pixels between two labels of the axis.
_LABELS = 26


def ink_words(ink: Ink, *, layers: int) -> str:
    """What an ink stands for."""
    if not ink.kind.stored or layers == 1:
        return ink.kind.value
    return f"{ink.kind.value} of image {ink.colour}"


def parts(picture: Picture, cells: range) -> list[tuple[Ink, int]]:
    """The inks of some cells with their bytes, in the order of a legend."""
    found = ((ink, sum(row[cells.start : cells.stop])) for ink, row in picture.cells.items())
    return sorted((part for part in found if part[1]), key=lambda part: part[0].order)


def cell_height(inks: Sequence[tuple[Ink, int]], height: int) -> Iterator[tuple[Ink, int]]:
    """Share ``height`` among inks by their bytes; what is there at all is seen."""
    if len(inks) > _INKS:
        # What is stored is worth more than how much of it is not.
        largest = sorted(inks, key=lambda part: (not part[0].kind.stored, -part[1]))[:_INKS]
        inks = sorted(largest, key=lambda part: part[0].order)
    whole = sum(amount for _, amount in inks)
    heights = [max(round(height * amount / whole), 1) for _, amount in inks]
    while (excess := sum(heights) - height) != 0:
        heights[heights.index(max(heights))] -= 1 if excess > 0 else -1
    return zip((ink for ink, _ in inks), heights, strict=True)


class Map:
    """Rows of cells, with their offsets to the left."""

    width = COLUMNS * _PITCH

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        self._count = -(-picture.length // picture.cell_size)
        self.rows = max(-(-self._count // COLUMNS), 1)
        self._pitch = min(max(_HEIGHT // self.rows, _PITCH), _TALLEST)
        self.height = self.rows * self._pitch

    def geometry(self) -> str:
        """Attributes for a script: which cell is where."""
        return (
            f'data-cell="{self._picture.cell_size}" data-columns="{COLUMNS}" '
            f'data-pitch="{_PITCH}" data-high="{self._pitch}"'
        )

    def draw(self) -> Iterator[str]:
        """The map, its upper left corner at 0, 0; labels are to the left of it."""
        yield from self._cells()
        yield '<g class="tip">'
        tips: list[str] = []
        for shared in _SHARED:
            tips = [self._tip(*place) for place in self._told(shared)]
            if len(tips) <= _TIPS:
                break
        yield from tips
        yield "</g>"
        yield from self._labels()

    def _cells(self) -> Iterator[str]:
        """One path for each ink: a stroke as wide as a cell for each piece."""
        paths: dict[Ink, list[str]] = {}
        tall = self._pitch - 1
        for cell in range(self._count):
            row, column = divmod(cell, COLUMNS)
            x, y = column * _PITCH + _PITCH // 2, row * self._pitch + tall
            for ink, height in cell_height(parts(self._picture, range(cell, cell + 1)), tall):
                paths.setdefault(ink, []).append(f"M{x} {y}v-{height}")
                y -= height
        yield f'<g class="m" stroke-width="{_PITCH - 1}">'
        for ink in sorted(paths, key=lambda ink: ink.order):
            yield f'<path class="{ink_class(ink)}" d="{"".join(paths[ink])}"/>'
        yield "</g>"

    def _told(self, shared: int) -> Iterator[tuple[int, int, int]]:
        """Rows, and from where to where something is told of them, ``shared`` cells at a time.

        Where it is the same from end to end, it is told once a row.
        """
        for row in range(self.rows):
            end = min((row + 1) * COLUMNS, self._count)
            first = row * COLUMNS
            while first < end:
                last = min(first + shared, end)
                inks = parts(self._picture, range(first, last))
                while len(inks) == 1 and last < end:
                    more = min(last + shared, end)
                    if [ink for ink, _ in parts(self._picture, range(last, more))] != [inks[0][0]]:
                        break
                    last = more
                yield row, first, last
                first = last

    def _tip(self, row: int, first: int, last: int) -> str:
        picture = self._picture
        inks = parts(picture, range(first, last))
        whole = sum(amount for _, amount in inks)
        told = sorted(inks, key=lambda part: -part[1])[:_TOLD_INKS]
        said = ", ".join(
            (f"{share_words(amount, whole)} " if len(inks) > 1 else "")
            + ink_words(ink, layers=len(picture.layers))
            for ink, amount in told
        )
        if len(inks) > len(told):
            said += ", …"
        begin = picture.start + first * picture.cell_size
        end = min(picture.start + last * picture.cell_size, picture.start + picture.length)
        x, y = (first - row * COLUMNS) * _PITCH, row * self._pitch
        width, height = (last - first) * _PITCH - 1, self._pitch - 1
        return (
            f'<path d="M{x} {y}h{width}v{height}h-{width}z">'
            f"<title>{size_words(begin)} to {size_words(end)}: {escape(said)}</title></path>"
        )

    def _labels(self) -> Iterator[str]:
        picture = self._picture
        step = 1
        while step * self._pitch < _LABELS:
            step *= 2
        yield '<g font-size="11">'
        for row in range(0, self.rows, step):
            offset = picture.start + row * COLUMNS * picture.cell_size
            y = row * self._pitch + self._pitch // 2 + 4
            yield f'<text class="mu" x="-72" y="{y}">{size_words(offset)}</text>'
        yield "</g>"
