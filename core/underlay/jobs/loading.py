"""Getting runs of a disk into memory: plain reads, and decoding of what is encoded.

What lies in a row on the host comes with one read, and so do small encoded units near each other.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

from underlay.errors import CorruptImageError, StorageError, UnderlayError
from underlay.face import run_blocking
from underlay.handle import MOST_BUFFERS, StorageHandle
from underlay.jobs.runs import Run
from underlay.mapping import Special

__all__ = ["PIECE", "Buffers", "Scratch", "load"]

#: How many bytes are in memory as one piece. It is read, looked at and written while it is still in
#: the processor's cache, which makes this much faster than larger pieces.
PIECE = 1 << 20

#: Encoded bytes of one read, unless one unit has more.
_RAW_MOST = 2 << 20
#: Bytes between two encoded units that are rather read than skipped by another read.
_GAP_MOST = 64 << 10


class Scratch:
    """The memory of one worker, kept from piece to piece."""

    __slots__ = ("_raw", "_unit", "_zeroes", "first", "kept", "kept_bytes", "second")

    def __init__(self) -> None:
        #: Room for a piece. ``bytearray``, since its methods compare without copying.
        self.first = bytearray(PIECE)
        #: Room for another one, once it is needed.
        self.second = bytearray()
        self._raw = bytearray()
        self._unit = bytearray()
        self._zeroes = b""
        #: Units that were encoded and are not stored yet, each with its guest offset.
        self.kept: list[tuple[int, bytes]] = []
        self.kept_bytes = 0

    def make_room(self, length: int, *, twice: bool = False) -> None:
        """Let ``first`` (and with ``twice`` also ``second``) have at least ``length`` bytes."""
        if len(self.first) < length:
            self.first = bytearray(length)
        if twice and len(self.second) < length:
            self.second = bytearray(len(self.first))

    def raw(self, length: int) -> memoryview:
        """Room for encoded bytes."""
        if len(self._raw) < length:
            self._raw = bytearray(length)
        return memoryview(self._raw)[:length]

    def zeroes(self, length: int) -> bytes:
        """So many zeroes, to compare with."""
        if len(self._zeroes) != length:
            self._zeroes = bytes(length)
        return self._zeroes

    def unit(self, length: int) -> memoryview:
        """Room for one decoded unit."""
        if len(self._unit) < length:
            self._unit = bytearray(length)
        return memoryview(self._unit)[:length]


class Buffers:
    """Scratch memory for as many workers as are at work. Thread-safe."""

    __slots__ = ("_idle",)

    def __init__(self) -> None:
        self._idle: list[Scratch] = []

    @contextmanager
    def lend(self) -> Generator[Scratch]:
        """One worker's memory, for the length of a ``with`` block."""
        try:
            scratch = self._idle.pop()
        except IndexError:
            scratch = Scratch()
        try:
            yield scratch
        finally:
            self._idle.append(scratch)


def load(runs: Sequence[Run], into: memoryview, scratch: Scratch) -> None:
    """Fill ``into`` with runs that follow each other.

    Raises:
        CorruptImageError: something does not decode; the message and ``offset`` say where.
        StorageError: a storage failed; the message says at which guest offset.
    """
    base = runs[0].start
    plain: list[Run] = []
    encoded: list[tuple[Special[StorageHandle], Run]] = []
    for run in runs:
        if run.special is not None:
            encoded.append((run.special, run))
        elif run.storage is None:
            into[run.start - base : run.end - base] = bytes(run.length)
        else:
            plain.append(run)
    # Writers in parallel leave clusters and units in another order than the guest's.
    plain.sort(key=_host_order)
    encoded.sort(key=lambda item: _host_order(item[0]))
    for row in _in_a_row(plain):
        _load_plain(row, base, into)
    for group in _neighbours(encoded):
        _load_encoded(group, base, into, scratch)


def _host_order(what: Run | Special[StorageHandle]) -> tuple[int, int]:
    return id(what.storage), what.offset


def _in_a_row(plain: Sequence[Run]) -> Iterator[Sequence[Run]]:
    """Plain runs in host order, in groups of which each begins where the one before it ends."""
    first = 0
    for after, run in enumerate(plain, 1):
        if (
            after == len(plain)
            or after - first == MOST_BUFFERS
            or plain[after].storage is not run.storage
            or plain[after].offset != run.offset + run.length
        ):
            yield plain[first:after]
            first = after


def _load_plain(row: Sequence[Run], base: int, into: memoryview) -> None:
    """Read plain runs that follow each other on the host at once, each to its place."""
    start = row[0]
    assert start.storage is not None
    views = [into[run.start - base : run.end - base] for run in row]
    try:
        _read(start.storage, views, start.offset, start.start)
    except StorageError:
        if len(row) == 1:
            raise
        for run in row:  # which of them is it?
            _load_plain([run], base, into)


def _read(storage: StorageHandle, views: Sequence[memoryview], offset: int, guest: int) -> None:
    """Fill ``views`` from host ``offset``; an error says for which guest offset."""
    inline = storage.inline_readv
    try:
        if inline is not None:
            inline(views, offset)
        else:
            run_blocking(storage.readv(views, offset))
    except UnderlayError as error:
        error.args = (f"{error} (guest offset {guest})",)
        raise


_Encoded = tuple[Special[StorageHandle], Run]


def _neighbours(encoded: Sequence[_Encoded]) -> Iterator[Sequence[_Encoded]]:
    """Encoded units in host order, in groups that are worth one read."""
    first = 0
    while first < len(encoded):
        special = encoded[first][0]
        start, end = special.offset, special.offset + special.host_length
        after = first + 1
        while after < len(encoded):
            further = encoded[after][0]
            until = max(end, further.offset + further.host_length)
            if (
                further.storage is not special.storage
                or further.offset > end + _GAP_MOST
                or until - start > _RAW_MOST
            ):
                break
            end = until
            after += 1
        yield encoded[first:after]
        first = after


def _load_encoded(group: Sequence[_Encoded], base: int, into: memoryview, scratch: Scratch) -> None:
    """Read a group of neighbours at once, and decode each to its place."""
    start = group[0][0].offset
    end = max(special.offset + special.host_length for special, _ in group)
    raw = scratch.raw(end - start)
    _read(group[0][0].storage, [raw], start, group[0][1].start)
    decoded: Special[StorageHandle] | None = None
    for special, run in group:
        at = special.offset - start
        data = raw[at : at + special.host_length]
        out = into[run.start - base : run.end - base]
        try:
            if run.length == special.unit:
                special.layer.decode(special.host_length, data, out)
            else:
                # Parts of one unit follow each other here.
                unit = scratch.unit(special.unit)
                if decoded is not special:
                    special.layer.decode(special.host_length, data, unit)
                    decoded = special
                out[:] = unit[run.offset : run.offset + run.length]
        except CorruptImageError as error:
            if error.offset is None:
                error.offset = special.offset
            error.args = (f"{error} (host offset {special.offset}, guest offset {run.start})",)
            raise
