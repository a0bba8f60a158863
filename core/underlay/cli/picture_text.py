"""The picture of a disk in the terminal: colours where there are some, and letters where not."""

from __future__ import annotations

import io
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from underlay.cli.output import is_terminal
from underlay.jobs.picture import HostFile, Ink, Kind, Picture
from underlay.jobs.picture.model import COLOURS, PLOT_COLUMNS, PLOT_ROWS
from underlay.jobs.picture.words import (
    count_words,
    key_numbers,
    share_words,
    short_name,
    size_words,
)

__all__ = ["picture_text"]

#: The widest map, and how many lines a map and a diagram have at most.
_WIDEST = 128
_NARROWEST = 16
_LINES = 20
_PLOT_LINES = 8
_FILES = 4
#: Columns for the offset before a line.
_AXIS = 10

#: Hues of the pictures in files, which show on light ground and on dark.
_LAYERS = ("#3d85d8", "#e8960c", "#18a57c", "#d06bac", "#6fb7e6", "#a8602c", "#8f9f2f", "#808894")
_ZERO = "#8a94a2"
#: What stands for plain data, compressed, zeroes and nothing, where colours tell the image.
_HEIGHTS = "▁▂▃▄▅▆▇█"
_BLOCKS = {Kind.DATA: "█", Kind.COMPRESSED: "▒", Kind.ZERO: "░", Kind.UNALLOCATED: "·"}
_ASCII = {Kind.DATA: "#", Kind.COMPRESSED: "%", Kind.ZERO: "0", Kind.UNALLOCATED: "."}
#: Where nothing has a colour, each image has a letter: plain data the large one.
_LETTERS = "ABCDEFGH"


def picture_text(picture: Picture) -> str:
    """The picture for whatever stdout is: as wide, with as many colours and characters."""
    terminal = is_terminal() and os.environ.get("TERM") != "dumb"
    width = min(shutil.get_terminal_size().columns, _WIDEST + _AXIS)
    written = io.StringIO()
    console = Console(
        file=written,
        width=width,
        force_terminal=terminal,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    drawing = _Drawing(
        picture,
        width=max(width - _AXIS, _NARROWEST),
        coloured=terminal and console.color_system is not None and not console.no_color,
        unicode=_shows("█▒░·⣿…"),
    )
    console.print(*drawing.lines(), sep="\n", soft_wrap=True)
    # A table fills its columns up.
    return "".join(f"{line.rstrip(' ')}\n" for line in written.getvalue().splitlines())


def _shows(characters: str) -> bool:
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


class _Drawing:
    """Line by line what is printed."""

    def __init__(self, picture: Picture, *, width: int, coloured: bool, unicode: bool) -> None:
        self._picture = picture
        self._coloured = coloured
        self._unicode = unicode
        self._count = -(-picture.length // picture.cell_size)
        #: Cells of the picture that are one character, and characters in a line.
        self._columns = 1 << (width.bit_length() - 1)
        self._joined = 1
        while self._columns * _LINES * self._joined < self._count:
            self._joined *= 2

    def lines(self) -> Iterator[Text | Table]:
        yield self._title()
        yield Text()
        yield self._numbers()
        yield Text()
        yield from self._legend()
        yield Text()
        yield from self._map()
        fullest = [file for file in self._picture.files if file.plot][:_FILES]
        drawn = sorted(fullest, key=lambda file: file.colour)
        if drawn and self._unicode:
            yield Text()
            for file in drawn:
                yield from self._plot(file)

    def _title(self) -> Text:
        title = Text().append(short_name(self._picture.name), style="bold")
        return title.append(f"  {self._picture.format}", style="dim")

    def _numbers(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for label, number, more in key_numbers(self._picture):
            table.add_row(Text(label, style="dim"), Text(number, style="bold"), Text(more))
        return table

    def _legend(self) -> Iterator[Text]:
        picture = self._picture
        for layer in picture.layers[:COLOURS]:
            line = self._swatch(Ink(Kind.DATA, layer.colour))
            if layer.compressed:
                line.append_text(self._swatch(Ink(Kind.COMPRESSED, layer.colour)))
            share = share_words(layer.data + layer.compressed, picture.length)
            line.append(f" {short_name(layer.name)}").append(f"  {share}", style="dim")
            yield line
        if (more := len(picture.layers) - COLOURS) > 0:
            yield Text(f"   and {count_words(more, 'image', 'images')} beneath, drawn alike")
        line = self._swatch(Ink(Kind.ZERO)).append(" zeroes   ")
        yield line.append_text(self._swatch(Ink(Kind.UNALLOCATED))).append(" unallocated")

    def _swatch(self, ink: Ink) -> Text:
        return Text().append(self._character(ink) * 2, style=self._style(ink))

    def _map(self) -> Iterator[Text]:
        """The disk in its own order; each character is what it has most of."""
        per_line = self._columns * self._joined
        for first in range(0, self._count, per_line):
            offset = size_words(self._picture.start + first * self._picture.cell_size)
            line = Text().append(f"{offset:>{_AXIS - 1}} ", style="dim")
            cells = range(first, min(first + per_line, self._count), self._joined)
            most = (self._most(range(cell, cell + self._joined)) for cell in cells)
            for ink, alike in groupby(most, key=itemgetter(0)):
                line.append(
                    "".join(self._character(ink, share) for _, share in alike),
                    style=self._style(ink),
                )
            yield line

    def _most(self, cells: range) -> tuple[Ink, float]:
        """What there is most of, and its share; what is stored goes before all that is not."""
        found = {
            ink: sum(row[cells.start : cells.stop]) for ink, row in self._picture.cells.items()
        }
        most = max(
            (ink for ink, amount in found.items() if amount),
            key=lambda ink: (ink.kind.stored, found[ink]),
        )
        return most, found[most] / sum(found.values())

    def _character(self, ink: Ink, share: float = 1) -> str:
        if ink.kind.stored and not self._coloured and len(self._picture.layers) > 1:
            letter = _LETTERS[ink.colour]
            return letter if ink.kind is Kind.DATA else letter.lower()
        if self._unicode and ink.kind is Kind.DATA:
            return _HEIGHTS[math.ceil(share * len(_HEIGHTS)) - 1]
        return (_BLOCKS if self._unicode else _ASCII)[ink.kind]

    def _style(self, ink: Ink) -> Style:
        if not self._coloured:
            return Style.null()
        if ink.kind.stored:
            return Style(color=_LAYERS[ink.colour])
        return Style(color=_ZERO) if ink.kind is Kind.ZERO else Style(dim=True)

    def _plot(self, file: HostFile) -> Iterator[Text]:
        """A file in host order: dots in Braille, eight a character, offset 0 at the bottom."""
        fragments = count_words(file.fragments, "fragment", "fragments")
        head = Text(" " * _AXIS).append(short_name(file.name, self._columns), style="bold")
        yield head.append(f"  {fragments}, {size_words(file.stored)}", style="dim")
        across, down = 2 * self._columns, 4 * _PLOT_LINES
        dots = [[0] * self._columns for _ in range(_PLOT_LINES)]
        for place in file.plot:
            row, column = divmod(place, PLOT_COLUMNS)
            for y in _spread(row, PLOT_ROWS, down):
                for x in _spread(column, PLOT_COLUMNS, across):
                    dots[(down - 1 - y) // 4][x // 2] |= _BRAILLE[(down - 1 - y) % 4][x % 2]
        style = Style(color=_LAYERS[file.colour]) if self._coloured else Style.null()
        for index, row_of_dots in enumerate(dots):
            offset = {0: size_words(file.size), _PLOT_LINES - 1: "0 B"}.get(index, "")
            line = Text().append(f"{offset:>{_AXIS - 1}} ", style="dim")
            yield line.append("".join(chr(0x2800 + bits) for bits in row_of_dots), style=style)


#: The bits of a Braille character, by row and column.
_BRAILLE: Sequence[Sequence[int]] = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def _spread(place: int, of: int, onto: int) -> range:
    """The places that one place of a coarser or finer row covers; at least one."""
    first = place * onto // of
    return range(first, max((place + 1) * onto // of, first + 1))
