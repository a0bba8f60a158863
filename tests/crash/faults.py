"""Storages whose k-th call fails."""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable

import attrs

from underlay.errors import storage_error
from underlay.storage import BlockingStorage, PreallocateMode, ReadBuffers, WriteBuffers
from underlay.testing.wrappers import WrappedStorage

from .journal import SECTOR, Journal, Lost

__all__ = ["Faults", "FaultyStorage", "Lasting"]


class Lasting(enum.Enum):
    """How long calls fail, once one has."""

    #: That one alone does.
    ONCE = "once"
    #: All of its kind do, until the operation has failed.
    KIND = "its kind"
    #: All calls do, until the end.
    GONE = "gone"


@attrs.define(kw_only=True)
class Faults:
    """Counts the calls of one run's storages, and says which ones fail."""

    #: The number of the call that fails; the first is 0. None: none does.
    fails: int | None = None
    errno: int = errno.EIO
    lasting: Lasting = Lasting.ONCE
    #: What was called, in order.
    calls: list[str] = attrs.field(factory=list[str], init=False)
    #: The kind of the call that failed, once one has.
    failed: str | None = attrs.field(default=None, init=False)

    def strikes(self, kind: str) -> bool:
        """Count a call; whether it fails."""
        number = len(self.calls)
        self.calls.append(kind)
        if number == self.fails:
            self.failed = kind
            return True
        if self.lasting is Lasting.GONE:
            return self.failed is not None
        return self.lasting is Lasting.KIND and kind == self.failed

    def end(self) -> None:
        """Nothing fails any more, if what fails can be mended."""
        if self.lasting is not Lasting.GONE:
            self.fails, self.lasting = None, Lasting.ONCE


class FaultyStorage(WrappedStorage):
    """Fails when its faults say so; a write that fails has written half."""

    def __init__(
        self, inner: BlockingStorage, faults: Faults, journal: Journal | None = None, file: int = 0
    ) -> None:
        super().__init__(inner)
        self._faults = faults
        self._journal = journal
        self._file = file

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """May fail."""
        self._try("read")
        super().readv(buffers, offset)

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """May fail when half of its sectors are written."""
        data = b"".join(buffers)
        middle = offset + len(data) // 2
        half = data[: max(middle - middle % SECTOR - offset, 0)]

        def write_half() -> None:
            if half:
                self.inner.writev((half,), offset)

        self._try("write", before=write_half)
        super().writev(buffers, offset)

    def write_zeroes(self, offset: int, length: int, allocate: bool = False) -> None:
        """May fail."""
        self._try("write_zeroes")
        super().write_zeroes(offset, length, allocate)

    def discard(self, offset: int, length: int) -> None:
        """May fail."""
        self._try("discard")
        super().discard(offset, length)

    def sync(self) -> None:
        """May fail; then what was to be synced may never reach the disk, as on Linux."""
        self._try("sync", before=self._lose)
        super().sync()

    def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        """May fail."""
        self._try("resize")
        super().resize(size, preallocation)

    def _lose(self) -> None:
        if self._journal is not None:
            self._journal.add(Lost(self._file))

    def _try(self, kind: str, *, before: Callable[[], None] | None = None) -> None:
        if self._faults.strikes(kind):
            if before is not None:
                before()
            error = OSError(self._faults.errno, "made to fail")
            raise storage_error(error, doing=kind, name=self.name())
