"""Runs cut into pieces: what is fetched, looked at and written at once."""

from __future__ import annotations

from collections.abc import Generator, Iterable

from underlay.jobs.loading import PIECE
from underlay.jobs.runs import Run

__all__ = ["in_pieces", "in_whole_units", "parts"]


def parts(run: Run, room: int) -> Generator[Run]:
    """A run in parts of at most ``PIECE`` bytes, the first of at most ``room``.

    An encoded unit stays whole, whatever its size: each part of it would be decoded anew.
    """
    if run.special is not None or run.length <= room:
        yield run
        return
    start = run.start
    while start < run.end:
        length = min(room, run.end - start)
        yield run.part(start, length)
        start += length
        room = PIECE


def in_pieces(found: Iterable[Run], most_zeroes: int) -> Generator[list[Run], None, None]:
    """Runs that follow each other, in lists of about ``PIECE`` bytes of data.

    What holds no data stands alone, in lists of one run of at most ``most_zeroes`` bytes.
    """
    piece: list[Run] = []
    length = 0
    for run in found:
        if run.storage is None:
            if piece:
                yield piece
                piece, length = [], 0
            for at in range(run.start, run.end, most_zeroes):
                yield [run.part(at, min(most_zeroes, run.end - at))]
            continue
        for part in parts(run, PIECE - length):
            if length and length + part.length > PIECE:
                yield piece
                piece, length = [], 0
            piece.append(part)
            length += part.length
            if length >= PIECE:
                yield piece
                piece, length = [], 0
    if piece:
        yield piece


def in_whole_units(
    found: Iterable[Run], unit: int, *, shift: int = 0, most: int | None = None
) -> Generator[list[Run], None, None]:
    """The same, cut where ``start + shift`` is a multiple of ``unit``, but at the very ends.

    What holds no data stands alone where it fills whole units, of at most ``most`` bytes.
    """
    piece: list[Run] = []
    limit = 0
    for run in found:
        rest = run
        if run.storage is None:
            start = _border(run.start + shift, unit) - shift
            end = (run.end + shift) // unit * unit - shift
            if start < end:
                yield from _closed(piece, run.part(run.start, start - run.start))
                piece = []
                step = end - start if most is None else max(most // unit, 1) * unit
                for at in range(start, end, step):
                    yield [run.part(at, min(step, end - at))]
                rest = run.part(end, run.end - end)
        while rest.length:
            if not piece:
                limit = _border(rest.start + shift + PIECE, unit) - shift
            if rest.special is not None and rest.end > limit:
                # Decoded once, however much that is.
                limit = _border(rest.end + shift, unit) - shift
            length = min(rest.end, limit) - rest.start
            piece.append(rest.part(rest.start, length))
            if rest.start + length == limit:
                yield piece
                piece = []
            rest = rest.part(rest.start + length, rest.length - length)
    if piece:
        yield piece


def _closed(piece: list[Run], last: Run) -> list[list[Run]]:
    """A piece that ends with a run, either of which may be empty."""
    if last.length:
        piece.append(last)
    return [piece] if piece else []


def _border(offset: int, unit: int) -> int:
    """The first border of units that is not before ``offset``."""
    return -(-offset // unit) * unit
