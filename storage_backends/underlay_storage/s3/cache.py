"""What was read of one object, bounded in memory, and what will probably be read next.

The object's bytes are kept in pieces that never overlap, each as it came with one request. A read
asks for exactly what is missing between them; whoever needs a piece that is on its way waits for
it. A reader that goes on where one ended has what follows fetched before it asks, and the more the
longer it goes on: pieces that were fetched so carry the window that they belong to, and the first
read of such a piece fetches more behind it. So any number of readers are noticed, without a list.
"""

from __future__ import annotations

import copy
import threading
from bisect import bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

import attrs

__all__ = ["PAGE", "Cache", "Fetch"]

#: ``fetch(offset, length)`` gives these bytes of the object; what it has not nobody will read.
Fetch: TypeAlias = Callable[[int, int], memoryview]

#: Requests begin and end at multiples of it (bytes), or where the object ends.
PAGE: Final = 16 << 10
#: No request is for more (bytes): larger ones are made side by side.
_PIECE_MOST: Final = 4 << 20
#: Bytes fetched for a reader that has gone on once; doubled each time it goes on.
_WINDOW_FIRST: Final = 256 << 10
#: What one piece may have of the whole cache, and what is fetched ahead of all readers together.
_PIECE_SHARE: Final = 16
_AHEAD_SHARE: Final = 2
#: How many readers side by side are noticed.
_READERS: Final = 16


@attrs.define(eq=False)
class _Piece:
    """A run of the object that is here, or on its way."""

    start: int
    end: int
    #: How far was fetched ahead when this was, in bytes; 0 for what a reader asked for or had.
    window: int = 0
    data: memoryview | None = None
    error: Exception | None = None
    #: Whether somebody fetches it.
    claimed: bool = False
    #: Set when it has come, or failed.
    settled: threading.Event = attrs.field(factory=threading.Event)

    @property
    def length(self) -> int:
        return self.end - self.start


class Cache:
    """Reads of one object whose bytes do not change. Thread-safe."""

    def __init__(
        self,
        fetch: Fetch,
        *,
        size: int,
        capacity: int,
        submit: Callable[[Callable[[], None]], object],
    ) -> None:
        """For an object of ``size`` bytes; ``capacity`` bytes are kept.

        ``submit`` runs a function in another thread, or drops it.
        """
        self._fetch = fetch
        self._size = size
        self._capacity = capacity
        self._submit = submit
        self._piece_most = max(PAGE, min(_PIECE_MOST, capacity // _PIECE_SHARE & -PAGE))
        self._lock = threading.Lock()
        #: By their first bytes; those used last come last.
        self._pieces: OrderedDict[int, _Piece] = OrderedDict()
        #: The same first bytes, in order.
        self._starts: list[int] = []
        self._held = 0
        #: Bytes that were fetched ahead, and not read yet.
        self._ahead = 0
        #: Where the last reads ended.
        self._ends: deque[int] = deque(maxlen=_READERS)

    @property
    def step(self) -> int:
        """How many bytes one call should ask for at most."""
        return max(self._capacity // 4, PAGE)

    def put(self, data: memoryview) -> None:
        """Keep the object's first bytes, which came when it was opened."""
        with self._lock:
            piece = _Piece(0, len(data), data=data, claimed=True)
            piece.settled.set()
            self._add(piece)

    def ready(self, offset: int, length: int) -> list[memoryview]:
        """What is here of the range, from its first byte on; nothing is waited for."""
        end = offset + length
        with self._lock:
            views, at = self._collect(offset, end)
            more = self._touched(offset, at)
            self._ends.append(at)
        self._start(more)
        return views

    def read(self, offset: int, length: int) -> list[memoryview]:
        """The bytes of a range inside the object, in views that follow each other.

        Raises:
            UnderlayError: as ``fetch`` does.
        """
        end = offset + length
        while True:
            with self._lock:
                views, at = self._collect(offset, end)
                wanted = self._wanted(at, end) if at < end else []
                more = self._touched(offset, end)
                if wanted and offset in self._ends:
                    more += self._run_ahead(end, max(_WINDOW_FIRST, 2 * length))
                self._ends.append(end)
            self._start([piece for piece in wanted[1:] if not piece.claimed])
            self._start(more)
            if all(self._get(piece) for piece in wanted):
                break  # else the thread that fetched one of them was interrupted
        for piece in wanted:
            assert piece.data is not None
            views.append(piece.data[max(at, piece.start) - piece.start : end - piece.start])
        return views

    def clear(self) -> None:
        """Forget everything; what is on its way reaches those that wait for it."""
        with self._lock:
            self._pieces.clear()
            self._starts.clear()
            self._held = self._ahead = 0

    # -- with the lock held

    def _collect(self, offset: int, end: int) -> tuple[list[memoryview], int]:
        """What is here from ``offset`` on without a gap, and where that ends."""
        views: list[memoryview] = []
        while offset < end:
            piece = self._at(offset)
            if piece is None or piece.data is None:
                break
            self._pieces.move_to_end(piece.start)
            views.append(piece.data[offset - piece.start : end - piece.start])
            offset = min(piece.end, end)
        return views, offset

    def _at(self, offset: int) -> _Piece | None:
        """The piece that ``offset`` is in."""
        index = bisect_right(self._starts, offset)
        if not index:
            return None
        piece = self._pieces[self._starts[index - 1]]
        return piece if offset < piece.end else None

    def _wanted(self, offset: int, end: int) -> list[_Piece]:
        """The pieces of a range in order, those that were missing among them."""
        wanted: list[_Piece] = []
        while offset < end:
            piece = self._at(offset)
            if piece is None:
                wanted += self._fill(offset, end)
            else:
                wanted.append(piece)
            offset = wanted[-1].end
        return wanted

    def _fill(self, offset: int, end: int, *, window: int = 0) -> list[_Piece]:
        """New pieces from ``offset``, where there is none, to ``end`` or the next that there is."""
        index = bisect_right(self._starts, offset)
        left = self._pieces[self._starts[index - 1]].end if index else 0
        right = self._starts[index] if index < len(self._starts) else self._size
        at = max(left, offset & -PAGE)
        stop = min(right, -(-end // PAGE) * PAGE)
        made: list[_Piece] = []
        while at < stop:
            piece = _Piece(at, min(at + self._piece_most, stop), window=window)
            self._add(piece)
            made.append(piece)
            at = piece.end
        return made

    def _touched(self, offset: int, end: int) -> list[_Piece]:
        """What to fetch because a reader has come to pieces that were fetched ahead of it."""
        made: list[_Piece] = []
        while offset < end:
            piece = self._at(offset)
            if piece is None:
                break
            if window := piece.window:
                piece.window = 0
                self._ahead -= piece.length
                made += self._run_ahead(offset, 2 * window)
            offset = piece.end
        return made

    def _run_ahead(self, offset: int, window: int) -> list[_Piece]:
        """What to fetch so that ``window`` bytes from ``offset`` on are here, within the bounds."""
        most = self._capacity // _AHEAD_SHARE
        window = min(window, most)
        end = min(offset + window, self._size)
        made: list[_Piece] = []
        while offset < end and self._ahead < most:
            piece = self._at(offset)
            if piece is None:
                new = self._fill(offset, min(end, offset + self._piece_most), window=window)
                self._ahead += sum(piece.length for piece in new)
                made += new
                piece = new[-1]
            offset = piece.end
        return made

    def _add(self, piece: _Piece) -> None:
        self._pieces[piece.start] = piece
        insort(self._starts, piece.start)
        self._held += piece.length
        excess = self._held - self._capacity
        victims: list[_Piece] = []
        for old in self._pieces.values():
            if excess <= 0:
                break
            if old.data is not None:
                victims.append(old)
                excess -= old.length
        for old in victims:
            self._remove(old)

    def _remove(self, piece: _Piece) -> None:
        if self._pieces.get(piece.start) is not piece:
            return
        del self._pieces[piece.start]
        del self._starts[bisect_right(self._starts, piece.start) - 1]
        self._held -= piece.length
        if piece.window:
            self._ahead -= piece.length

    # -- without it

    def _start(self, pieces: list[_Piece]) -> None:
        """Let other threads fetch these."""
        for piece in pieces:
            self._submit(partial(self._bring, piece))

    def _get(self, piece: _Piece) -> bool:
        """Have a piece, fetched here unless somebody does already; False if nobody has."""
        self._bring(piece)
        piece.settled.wait()
        if piece.error is not None:
            raise copy.copy(piece.error)
        return piece.data is not None

    def _bring(self, piece: _Piece) -> None:
        """Fetch a piece, unless somebody does."""
        with self._lock:
            if piece.claimed:
                return
            piece.claimed = True
        try:
            piece.data = self._fetch(piece.start, piece.length)
        except Exception as error:  # noqa: BLE001 - it is raised where the piece is needed
            piece.error = error
        finally:
            if piece.data is None:
                with self._lock:
                    self._remove(piece)
            piece.settled.set()
