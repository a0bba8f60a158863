"""The diagrams in host order: where in its file each part of the disk lies."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from underlay.jobs.picture.model import PLOT_COLUMNS, PLOT_ROWS, HostFile, Picture
from underlay.jobs.picture.words import count_words, short_name, size_words

__all__ = ["Plots"]

#: Files with a diagram: the fullest.
_FILES = 4
#: Pixels above a diagram for its file's name.
_HEAD = 20
#: Pixels that a file at least has, and between two.
_LEAST = 56
#: Characters of its name above it.
_ROOM = 20
_GAP = 14
#: What stands beside it where it has so many pixels.
_BESIDE = ((180, "offset in the file →"), (76, "file →"))
#: How dense a cell is drawn, and from which part of its bytes on.
_DENSITIES = ((0.5, 1.0), (0.1, 0.8), (0.0, 0.6))


class Plots:
    """A diagram for each file, one above the other, over one axis of guest offsets."""

    def __init__(self, picture: Picture, *, width: int, height: int) -> None:
        self._picture = picture
        fullest = [file for file in picture.files if file.plot][:_FILES]
        self._files = sorted(fullest, key=lambda file: file.colour)
        self.left_out = len(picture.files) - len(self._files)
        self._width = width
        count = max(len(self._files), 1)
        self._each = max((height - _GAP * (count - 1)) // count - _HEAD, _LEAST)
        self.height = count * (_HEAD + self._each) + _GAP * (count - 1)

    def geometry(self) -> str:
        """Attributes for a script: which bytes are where."""
        return (
            f'data-start="{self._picture.start}" data-length="{self._picture.length}" '
            f'data-width="{self._width}" data-height="{self.height}"'
        )

    def draw(self) -> Iterator[str]:
        """The diagrams, their upper left corner at 0, 0; labels are to the left and below."""
        if not self._files:
            yield f'<rect class="pl" width="{self._width}" height="{self.height}" rx="3"/>'
            yield (
                f'<text class="mu" x="{self._width // 2}" y="{self.height // 2}" font-size="13" '
                f'text-anchor="middle">nothing is stored</text>'
            )
        for index, file in enumerate(self._files):
            yield f'<g transform="translate(0 {index * (_HEAD + self._each + _GAP)})">'
            yield from self._file(file)
            yield "</g>"
        yield from self._guest_axis()

    def _file(self, file: HostFile) -> Iterator[str]:
        name = escape(short_name(file.name))
        fragments = count_words(file.fragments, "fragment", "fragments")
        yield (
            f'<text y="12" font-size="12"><title>{name}</title>'
            f"{escape(short_name(file.name, _ROOM))}</text>"
            f'<text class="mu" x="{self._width}" y="12" font-size="11" text-anchor="end">'
            f"{fragments} · {size_words(file.stored)}</text>"
            f'<g class="host" transform="translate(0 {_HEAD})" data-size="{file.size}">'
            f'<rect class="pl" width="{self._width}" height="{self._each}" rx="3">'
            f"<title>{name}: {size_words(file.stored)} in {fragments}</title></rect>"
        )
        yield from self._dots(file)
        yield '<g font-size="11" text-anchor="end">'
        yield f'<text class="mu" x="-8" y="8">{size_words(file.size)}</text>'
        yield f'<text class="mu" x="-8" y="{self._each}">0 B</text>'
        words = next((words for least, words in _BESIDE if self._each >= least), None)
        if words is not None:
            yield (
                f'<text class="mu" text-anchor="middle" '
                f'transform="translate(-12 {self._each // 2 + 2}) rotate(-90)">{words}</text>'
            )
        yield "</g></g>"

    def _dots(self, file: HostFile) -> Iterator[str]:
        """A stroke for each stretch of cells that are filled alike, row 0 at the bottom."""
        rows = min(max(self._each // 4, 1), PLOT_ROWS)
        filled: dict[int, int] = {}
        for place, amount in file.plot.items():
            row, column = divmod(place, PLOT_COLUMNS)
            row = rows - 1 - row * rows // PLOT_ROWS
            filled[row * PLOT_COLUMNS + column] = (
                filled.get(row * PLOT_COLUMNS + column, 0) + amount
            )
        full = max(min(self._picture.length / PLOT_COLUMNS, file.size / rows), 1)
        paths: dict[float, list[str]] = {}
        last: tuple[int, int, float] | None = None
        for place in [*sorted(filled), -1]:
            density = 0.0
            if place >= 0:
                share = filled[place] / full
                density = next(opacity for least, opacity in _DENSITIES if share >= least)
            if last is not None:
                first, end, before = last
                if place == end and before == density and place % PLOT_COLUMNS:
                    last = first, end + 1, before
                    continue
                row, column = divmod(first, PLOT_COLUMNS)
                paths.setdefault(before, []).append(f"M{column} {row}h{end - first}")
            last = place, place + 1, density
        across, down = self._width / PLOT_COLUMNS, self._each / rows
        yield (
            f'<g class="m" pointer-events="none" transform="translate(0 {down / 2:.4g}) '
            f'scale({across:.6g} {down:.6g})">'
        )
        for density, strokes in sorted(paths.items()):
            yield (
                f'<path class="d{file.colour}" stroke-opacity="{density}" d="{"".join(strokes)}"/>'
            )
        yield "</g>"

    def _guest_axis(self) -> Iterator[str]:
        picture = self._picture
        yield f'<g class="guest" font-size="11" transform="translate(0 {self.height + 16})">'
        middle = self._width // 2
        for x, anchor, words in (
            (0, "start", size_words(picture.start)),
            (middle, "middle", "offset in the disk →"),
            (self._width, "end", size_words(picture.start + picture.length)),
        ):
            yield f'<text class="mu" x="{x}" text-anchor="{anchor}">{words}</text>'
        yield "</g>"
