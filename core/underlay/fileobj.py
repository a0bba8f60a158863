"""A disk as a Python file object, for other people's parsers."""

from __future__ import annotations

import io
import operator
import os
import threading
from typing import TYPE_CHECKING, Any

from underlay.buffers import flat, flat_writable
from underlay.errors import OutOfRangeError, ReadOnlyError

if TYPE_CHECKING:
    from underlay.sync import SyncFormatAccess

__all__ = ["DiskFile"]


class DiskFile(io.BufferedIOBase):
    """Reads and writes a disk at a position of its own; seekable, ``readinto``, any buffer.

    Unbuffered: each call is one request to the disk. Reading stops at the end of the disk, as in a
    file; writing never grows it. Closing flushes and leaves the disk open. Thread-safe.
    """

    def __init__(self, disk: SyncFormatAccess) -> None:
        super().__init__()
        self._disk = disk
        self._position = 0
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """What the disk's first storage is called."""
        storages = self._disk.collect_storage_dependencies()
        return storages[0].name() if storages else repr(self._disk)

    @property
    def mode(self) -> str:
        """``"rb+"`` or ``"rb"``."""
        return "rb+" if self._disk.writable else "rb"

    def readable(self) -> bool:
        """True."""
        return True

    def writable(self) -> bool:
        """Whether the disk was opened for writing."""
        return self._disk.writable

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position, in bytes."""
        self._check()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position; past the end of the disk is allowed, where reads are empty."""
        self._check()
        offset = operator.index(offset)
        with self._lock:
            if whence == os.SEEK_SET:
                position = offset
            elif whence == os.SEEK_CUR:
                position = self._position + offset
            elif whence == os.SEEK_END:
                position = self._disk.size + offset
            else:
                raise ValueError(f"whence must be 0, 1 or 2, not {whence}")
            if position < 0:
                raise ValueError(f"cannot seek to {position}, before the start")
            self._position = position
            return position

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to ``size`` bytes, fewer only at the end of the disk; all that is left by default."""
        self._check()
        with self._lock:
            left = max(0, self._disk.size - self._position)
            length = left if size is None or size < 0 else min(size, left)
            data = self._disk.read_bytes(self._position, length)
            self._position += length
            return data

    def read1(self, size: int = -1, /) -> bytes:
        """As ``read``."""
        return self.read(size)

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer of any kind, less of it only at the end of the disk; how many bytes."""
        self._check()
        view = flat_writable(buffer)
        with self._lock:
            length = min(len(view), max(0, self._disk.size - self._position))
            if length:
                self._disk.read(view[:length], self._position)
                self._position += length
            return length

    def readinto1(self, buffer: Any, /) -> int:
        """As ``readinto``."""
        return self.readinto(buffer)

    def write(self, data: Any, /) -> int:
        """Write all of ``data``; across the end of the disk is an error, and nothing is written."""
        self._check()
        if not self._disk.writable:
            raise ReadOnlyError("This disk is open read-only; open it with writable=True")
        view = flat(data)
        with self._lock:
            self._disk.write(view, self._position)
            self._position += len(view)
            return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Always an error unless nothing would change: a disk is resized by ``disk.resize``."""
        self._check()
        wanted = self._position if size is None else size
        if wanted != self._disk.size:
            raise OutOfRangeError("A disk does not change its size through a file object")
        return wanted

    def flush(self) -> None:
        """Flush the disk; nothing is left to flush once that is closed."""
        self._check()
        if self._disk.writable and not self._disk.closed:
            self._disk.flush()

    def _check(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
