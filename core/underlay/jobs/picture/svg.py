"""The whole picture as one SVG file."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from underlay.jobs.picture.cells import COLUMNS, Map
from underlay.jobs.picture.model import COLOURS, Ink, Kind, Picture
from underlay.jobs.picture.palette import ink_class, patterns, stylesheet
from underlay.jobs.picture.plot import Plots
from underlay.jobs.picture.words import (
    count_words,
    key_numbers,
    share_words,
    short_name,
    size_words,
)

__all__ = ["draw"]

_WIDTH = 1120
_MARGIN = 40
_INNER = _WIDTH - 2 * _MARGIN
#: Where the bar of shares is, and the first line of the legend.
_BAR = 176
_LEGEND = 222
_LINE = 22
#: Where the images' column of the legend ends, and the other one begins.
_IMAGES = 660
_KINDS = 720
#: Where the map and the diagrams begin, and how wide these are.
_MAP = 112
_PLOTS = 780
_PLOT_WIDTH = _WIDTH - _MARGIN - _PLOTS
#: Pixels of the headings above them, and of the axis below.
_HEADING = 52
_FOOT = 44


def draw(picture: Picture) -> str:
    """An SVG file, with XML declaration."""
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + "\n".join(element(picture)) + "\n"


def element(picture: Picture) -> Iterator[str]:
    """The ``svg`` element, line by line."""
    chart = Map(picture)
    rows = len(_images(picture))
    top = _LEGEND + max(rows, len(_kinds(picture))) * _LINE + 24
    plots = Plots(picture, width=_PLOT_WIDTH, height=max(chart.height, 160))
    height = top + _HEADING + max(chart.height, plots.height) + _FOOT
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img">'
    )
    yield f"<title>{escape(short_name(picture.name))}</title>"
    yield f"<desc>{escape(_described(picture))}</desc>"
    yield f"<style>{stylesheet()}</style>"
    yield f"<defs>{patterns({layer.colour for layer in picture.layers})}</defs>"
    yield f'<rect class="bg" width="{_WIDTH}" height="{height}" rx="14"/>'
    yield from _header(picture)
    yield from _bar(picture)
    yield from _legend(picture)
    yield from _heading(_MARGIN, top, "The disk in its own order", _map_words(picture))
    words = "a diagonal is in order, a cloud is scattered"
    if plots.left_out:
        words = f"the fullest; {count_words(plots.left_out, 'more file', 'more files')} not drawn"
    yield from _heading(_KINDS, top, "Where it lies in its files", words)
    yield (f'<g class="guests" transform="translate({_MAP} {top + _HEADING})" {chart.geometry()}>')
    yield from chart.draw()
    yield (
        f'</g><g class="plots" transform="translate({_PLOTS} {top + _HEADING})" {plots.geometry()}>'
    )
    yield from plots.draw()
    yield "</g></svg>"


def _described(picture: Picture) -> str:
    return "; ".join(f"{label}: {number} ({more})" for label, number, more in key_numbers(picture))


def _map_words(picture: Picture) -> str:
    if not picture.length:
        return "it has no bytes"
    cell, row = size_words(picture.cell_size), size_words(picture.cell_size * COLUMNS)
    return f"row by row; a cell is {cell}, a row {row}"


def _heading(x: int, y: int, title: str, words: str) -> Iterator[str]:
    yield f'<text x="{x}" y="{y + 14}" font-size="15" font-weight="600">{title}</text>'
    yield f'<text class="mu" x="{x}" y="{y + 33}" font-size="12">{words}</text>'


def _header(picture: Picture) -> Iterator[str]:
    yield (
        f'<text x="{_MARGIN}" y="58" font-size="26" font-weight="700">'
        f"{escape(short_name(picture.name, 56))}</text>"
        f'<text class="mu" x="{_WIDTH - _MARGIN}" y="58" font-size="14" text-anchor="end">'
        f"{escape(picture.format)}</text>"
    )
    numbers = list(key_numbers(picture))
    step = _INNER / len(numbers)
    for index, (label, number, more) in enumerate(numbers):
        x = round(_MARGIN + index * step)
        yield (
            f'<text class="mu" x="{x}" y="96" font-size="12">{label}</text>'
            f'<text x="{x}" y="124" font-size="23" font-weight="600">{escape(number)}</text>'
            f'<text class="mu" x="{x}" y="145" font-size="12">{escape(more)}</text>'
        )


def _bar(picture: Picture) -> Iterator[str]:
    """The shares of the disk, in the order of the legend."""
    inks = sorted(picture.cells, key=lambda ink: ink.order)
    totals = {ink: sum(picture.cells[ink]) for ink in inks}
    x = float(_MARGIN)
    yield (
        f'<clipPath id="bar"><rect x="{_MARGIN}" y="{_BAR}" width="{_INNER}" height="14" rx="4"/>'
        '</clipPath><g class="f" clip-path="url(#bar)">'
    )
    yield f'<rect class="un" x="{_MARGIN}" y="{_BAR}" width="{_INNER}" height="14"/>'
    # What is there at all is two pixels wide; the rest shares the rest.
    least = 2
    room = _INNER - least * len(inks)
    for ink in inks:
        width = least + room * totals[ink] / max(picture.length, 1)
        yield (
            f'<rect class="{ink_class(ink)}" x="{x:.1f}" y="{_BAR}" width="{width:.1f}" '
            f'height="14"/>'
        )
        x += width
    yield "</g>"


def _images(picture: Picture) -> list[tuple[int, str, int, int]]:
    """Lines of the legend: colour, full name, data, compressed."""
    shown, rest = picture.layers[:COLOURS], picture.layers[COLOURS:]
    lines = [(one.colour, one.name, one.data, one.compressed) for one in shown]
    if rest:
        lines[-1:] = [
            (
                COLOURS - 1,
                f"{len(rest) + 1} images beneath",
                sum(one.data for one in (shown[-1], *rest)),
                sum(one.compressed for one in (shown[-1], *rest)),
            )
        ]
    return lines


def _kinds(picture: Picture) -> list[tuple[Ink, str, int]]:
    lines = [
        (Ink(Kind.ZERO), "zeroes: the image says so", picture.zero),
        (Ink(Kind.UNALLOCATED), "unallocated: nothing is stored", picture.unallocated),
    ]
    if picture.compressed:
        striped = next(ink for ink in picture.cells if ink.kind is Kind.COMPRESSED)
        lines.insert(0, (striped, "striped: compressed", picture.compressed))
    return lines


def _legend(picture: Picture) -> Iterator[str]:
    yield '<g font-size="13">'
    more = len(picture.layers) > COLOURS
    for index, (colour, name, data, compressed) in enumerate(_images(picture)):
        y = _LEGEND + index * _LINE
        told = [f"{size_words(data)} data"] if data or not compressed else []
        if compressed:
            told.append(f"{size_words(compressed)} compressed")
        told.append(share_words(data + compressed, picture.length))
        image = f"{index} " if len(picture.layers) > 1 and index < COLOURS - more else ""
        yield _swatch(_MARGIN, y, f"d{colour}")
        yield (
            f'<text x="{_MARGIN + 22}" y="{y + 11}"><title>{escape(short_name(name))}</title>'
            f'<tspan class="mu">{image}</tspan>{escape(short_name(name, 38))}</text>'
            f'<text class="mu" x="{_IMAGES}" y="{y + 11}" text-anchor="end">'
            f"{escape(' · '.join(told))}</text>"
        )
    for index, (ink, words, amount) in enumerate(_kinds(picture)):
        y = _LEGEND + index * _LINE
        yield _swatch(_KINDS, y, ink_class(ink))
        yield (
            f'<text x="{_KINDS + 22}" y="{y + 11}">{words}</text>'
            f'<text class="mu" x="{_WIDTH - _MARGIN}" y="{y + 11}" text-anchor="end">'
            f"{escape(share_words(amount, picture.length))}</text>"
        )
    yield "</g>"


def _swatch(x: int, y: int, name: str) -> str:
    return f'<g class="f"><rect class="{name}" x="{x}" y="{y}" width="13" height="13" rx="2"/></g>'
