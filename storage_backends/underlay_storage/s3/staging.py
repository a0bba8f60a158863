"""What was written and is not published yet: a local file, and a map of what of it counts."""

from __future__ import annotations

import contextlib
import enum
import os
import threading
from bisect import bisect_left, bisect_right
from typing import Final, Generic, TypeVar

from underlay.buffers import split_at, total
from underlay.errors import StorageError, storage_error
from underlay.space import Space
from underlay.storage import ReadBuffers, WriteBuffers

__all__ = ["Run", "Runs", "Source", "Staging"]

T = TypeVar("T")

#: Past the end of every object.
_FAR: Final = 1 << 63
#: How many buffers one system call takes.
_MOST_BUFFERS: Final = 1024


class Source(enum.Enum):
    """Where the bytes of a run are."""

    #: In the object as it was opened; publishing changes none of them.
    BASE = enum.auto()
    #: In the local file, at the same offset.
    LOCAL = enum.auto()
    #: Nowhere: they are zero.
    ZERO = enum.auto()


#: Where it starts and ends, and what it has.
Run = tuple[int, int, T]


class Runs(Generic[T]):
    """A value for every offset, in runs. Its users hold a lock."""

    __slots__ = ("_starts", "_values")

    def __init__(self, value: T) -> None:
        self._starts = [0]
        self._values = [value]

    def set(self, start: int, end: int, value: T) -> None:
        """Let the offsets from ``start`` to ``end`` (behind the last) have a value."""
        if start >= end:
            return
        first, last = self._cut(start), self._cut(end)
        if first and self._values[first - 1] == value:
            first, start = first - 1, self._starts[first - 1]
        if self._values[last] == value:
            last += 1
        self._starts[first:last] = [start]
        self._values[first:last] = [value]

    def _cut(self, offset: int) -> int:
        """Let a run begin at ``offset``; its number."""
        at = bisect_left(self._starts, offset)
        if at == len(self._starts) or self._starts[at] != offset:
            self._starts.insert(at, offset)
            self._values.insert(at, self._values[at - 1])
        return at

    def between(self, start: int, end: int) -> list[Run[T]]:
        """The runs of a range, cut to it."""
        found: list[Run[T]] = []
        at = bisect_right(self._starts, start) - 1
        while start < end:
            at += 1
            stop = self._starts[at] if at < len(self._starts) else _FAR
            found.append((start, min(stop, end), self._values[at - 1]))
            start = stop
        return found


class Staging:
    """The content of an object that is being written. Thread-safe.

    Runs never become ``BASE`` again: what was written stays in the local file after it was
    published too. The file has no name, so that nothing of it outlives the process.
    """

    def __init__(self, folder: str, *, name: str, base_size: int) -> None:
        """For an object of ``base_size`` bytes, called ``name`` in messages.

        Raises:
            StorageError: there can be no file in ``folder``.
        """
        import tempfile

        self._folder = folder
        self._name = name
        #: Bytes.
        self.size = base_size
        self._lock = threading.Lock()
        self._sources = Runs(Source.ZERO)
        self._sources.set(0, base_size, Source.BASE)
        self._changed = Runs(value=False)
        self._space = Space()
        try:
            self._file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115
        except OSError as error:
            raise storage_error(error, doing="stage writes in", name=folder) from error

    def runs(self, start: int, end: int) -> list[Run[Source]]:
        """Where the bytes of a range are, which may reach past the end: zeroes are there."""
        with self._lock:
            return self._sources.between(start, end)

    def source_at(self, offset: int) -> Run[Source]:
        """The run that is at ``offset``, from there to its end or the object's."""
        with self._lock:
            return self._sources.between(offset, self.size)[0]

    def read(self, buffers: ReadBuffers, offset: int) -> None:
        """Fill them from the local file."""
        views = [memoryview(buffer) for buffer in buffers]
        while views:
            try:
                done = os.preadv(self._file.fileno(), views[:_MOST_BUFFERS], offset)
            except OSError as error:
                raise self._failed(error, "read") from error
            if not done:
                # Cut while it was being read: what is behind the end is zero.
                done = len(views[0])
                views[0][:] = bytes(done)
            views = split_at(views, done)[1]
            offset += done

    def write(self, buffers: WriteBuffers, offset: int) -> None:
        """Keep these bytes; the object grows if they reach past its end."""
        end = offset + total(buffers)
        views = [memoryview(buffer) for buffer in buffers]
        at = offset
        while views:
            try:
                done = os.pwritev(self._file.fileno(), views[:_MOST_BUFFERS], at)
            except OSError as error:
                raise self._failed(error, "write") from error
            views = split_at(views, done)[1]
            at += done
        with self._lock:
            self._sources.set(offset, end, Source.LOCAL)
            self._changed.set(min(offset, self.size), end, value=True)
            self.size = max(self.size, end)

    def zero(self, start: int, end: int) -> None:
        """Let a range be zero, as far as the object reaches; it takes no room here any more."""
        with self._lock:
            end = min(end, self.size)
            runs = self._sources.between(start, end)
            self._sources.set(start, end, Source.ZERO)
            self._changed.set(start, end, value=True)
        for first, last, source in runs:
            if source is Source.LOCAL:
                with contextlib.suppress(OSError):  # it only gives room back
                    self._space.punch(self._file.fileno(), first, last - first)

    def resize(self, size: int) -> None:
        """Set the object's length; new bytes are zero."""
        with self._lock:
            if size < self.size:
                self._sources.set(size, _FAR, Source.ZERO)
                with contextlib.suppress(OSError):  # as in zero
                    os.ftruncate(self._file.fileno(), min(size, self._length()))
            self._changed.set(min(size, self.size), max(size, self.size), value=True)
            self.size = size

    def _length(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def changes(self) -> list[tuple[int, int]]:
        """Offset and length of what was changed since the last publication, in order."""
        with self._lock:
            runs = self._changed.between(0, self.size)
        return [(start, end - start) for start, end, changed in runs if changed]

    def published(self) -> None:
        """Everything so far is in the bucket."""
        with self._lock:
            self._changed = Runs(value=False)

    def close(self) -> None:
        """Forget everything. May be called again."""
        self._file.close()

    def _failed(self, error: OSError, doing: str) -> StorageError:
        told = storage_error(error, doing=f"{doing} what is staged for", name=self._name)
        return type(told)(
            f"{told} (in '{self._folder}'; the storage option staging names another folder)",
            errno=error.errno,
            filename=self._folder,
        )
