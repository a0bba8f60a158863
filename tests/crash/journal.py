"""Writes down what a program does to its storages, so that a power loss can be played later.

Several storages share one journal and so one clock: what was written to the image before or after
what was written to its data file is known.
"""

from __future__ import annotations

import threading
from typing import TypeAlias

import attrs

from underlay.storage import BlockingStorage, PreallocateMode, WriteBuffers
from underlay.testing.wrappers import WrappedStorage

__all__ = [
    "SECTOR",
    "Begun",
    "Change",
    "Event",
    "File",
    "Flushed",
    "Journal",
    "Lost",
    "Recorder",
    "Resize",
    "Sync",
    "Write",
    "Zero",
]

#: Bytes that a disk writes whole or not at all.
SECTOR = 512


@attrs.frozen
class Write:
    """Bytes were written; they reach the disk if the file's length does."""

    file: int
    offset: int
    data: bytes


@attrs.frozen
class Zero:
    """A range was zeroed or discarded."""

    file: int
    offset: int
    length: int


@attrs.frozen
class Resize:
    """The length was set, or a write made the file longer: an event of its own, as on a disk."""

    file: int
    size: int
    grows: bool


@attrs.frozen
class Sync:
    """Everything that was done to this file before is durable."""

    file: int


@attrs.frozen
class Lost:
    """A sync failed: what it was for may be missing whatever is synced later, as on Linux."""

    file: int


@attrs.frozen
class Begun:
    """The guest's operation with this number begins."""

    operation: int


@attrs.frozen
class Flushed:
    """The guest was told that all operations up to this one are durable."""

    operation: int


#: What changes a file.
Change: TypeAlias = Write | Zero | Resize
Event: TypeAlias = Change | Sync | Lost | Begun | Flushed


@attrs.define
class Journal:
    """The events of one run, in order, and what the files held before it."""

    start: tuple[bytes, ...]
    #: The guest's operations up to this one are durable from the start.
    operation: int = 0
    events: list[Event] = attrs.field(factory=list[Event], init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def add(self, *events: Event) -> None:
        """Append events that no other thread's may come between."""
        with self._lock:
            self.events += events


class Recorder(WrappedStorage):
    """A storage whose changes go into a journal, as those of its file number."""

    def __init__(self, inner: BlockingStorage, journal: Journal, *, file: int = 0) -> None:
        super().__init__(inner)
        self.journal = journal
        self.file = file

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """Recorded, with the growth that it brings, and as the whole sectors that a disk gets."""
        length = sum(map(len, buffers))
        size = self.inner.size()
        self.inner.writev(buffers, offset)
        if offset + length > size:
            self.journal.add(Resize(self.file, offset + length, grows=True))
        self._written(offset, offset + length)

    def write_zeroes(self, offset: int, length: int, allocate: bool = False) -> None:
        """Recorded."""
        self.inner.write_zeroes(offset, length, allocate)
        self._zeroed(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Recorded."""
        self.inner.discard(offset, length)
        self._zeroed(offset, length)

    def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        """Recorded."""
        if size != self.inner.size():
            self.journal.add(Resize(self.file, size, grows=size > self.inner.size()))
        self.inner.resize(size, preallocation)

    def sync(self) -> None:
        """Recorded."""
        self.inner.sync()
        self.journal.add(Sync(self.file))

    def _zeroed(self, offset: int, length: int) -> None:
        end = min(offset + length, self.inner.size())
        if offset >= end:
            return
        if offset % SECTOR or (end % SECTOR and end < self.inner.size()):
            self._written(offset, end)
        else:
            self.journal.add(Zero(self.file, offset, end - offset))

    def _written(self, start: int, end: int) -> None:
        start -= start % SECTOR
        end = min(end + -end % SECTOR, self.inner.size())
        data = bytearray(end - start)
        self.inner.readv((data,), start)
        self.journal.add(Write(self.file, start, bytes(data)))


class File:
    """A file as a disk holds it: whole sectors, of which the last may reach past its length."""

    __slots__ = ("length", "sectors")

    def __init__(self, content: bytes) -> None:
        self.sectors = bytearray(content.ljust(_rounded(len(content)), b"\0"))
        self.length = len(content)

    def copy(self) -> File:
        """Another one like this."""
        other = File.__new__(File)
        other.sectors, other.length = self.sectors[:], self.length
        return other

    def content(self) -> bytes:
        """What a program reads."""
        return bytes(memoryview(self.sectors)[: self.length])

    def apply(self, change: Change, *, only: int | None = None) -> None:
        """Make a change, of a write only the sectors whose bits are set.

        What lies in sectors past the end is lost: growth is a change of its own.
        """
        match change:
            case Resize(_, size, grows):
                if grows and size > self.length:
                    self.sectors.extend(bytes(_rounded(size) - len(self.sectors)))
                    self.length = size
                elif not grows:
                    self.length = min(size, self.length)
                    del self.sectors[self.length :]
                    self.sectors.extend(bytes(-self.length % SECTOR))
            case Zero(_, offset, length):
                end = min(offset + length, len(self.sectors))
                if offset < end:
                    self.sectors[offset:end] = bytes(end - offset)
            case Write(_, offset, data):
                self._write(offset, data, only)

    def _write(self, offset: int, data: bytes, only: int | None) -> None:
        end = min(offset + len(data), len(self.sectors))
        if offset >= end:
            return
        if only is None:
            self.sectors[offset:end] = data[: end - offset]
            return
        for number, start in enumerate(range(offset, end, SECTOR)):
            if only >> number & 1:
                stop = min(start + SECTOR, end)
                self.sectors[start:stop] = data[start - offset : stop - offset]


def _rounded(length: int) -> int:
    return length + -length % SECTOR
