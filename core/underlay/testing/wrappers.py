"""Storages around another one, for faults and demands that no real part shows on request."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping

from underlay.buffers import address_of
from underlay.storage import (
    BlockingStorage,
    Extent,
    PreallocateMode,
    ReadBuffers,
    WriteBuffers,
)

__all__ = ["AlignedStorage", "PausedStorage", "WrappedStorage"]


class WrappedStorage(BlockingStorage):
    """Hands every call on to ``inner``. Override what is to be different."""

    def __init__(self, inner: BlockingStorage) -> None:
        self.inner = inner

    def size(self) -> int:
        """Handed on."""
        return self.inner.size()

    def name(self) -> str:
        """Handed on."""
        return self.inner.name()

    def identity(self) -> Hashable | None:
        """Handed on."""
        return self.inner.identity()

    def writable(self) -> bool:
        """Handed on."""
        return self.inner.writable()

    def mem_align(self) -> int:
        """Handed on."""
        return self.inner.mem_align()

    def req_align(self) -> int:
        """Handed on."""
        return self.inner.req_align()

    def zero_align(self) -> int:
        """Handed on."""
        return self.inner.zero_align()

    def discard_align(self) -> int:
        """Handed on."""
        return self.inner.discard_align()

    def descriptor(self) -> int | None:
        """None: I/O on the descriptor would pass this object by."""
        return None

    def real_path(self) -> str | None:
        """Handed on."""
        return self.inner.real_path()

    def resolve_relative(self, name: str) -> str:
        """Handed on."""
        return self.inner.resolve_relative(name)

    def describe(self) -> Mapping[str, object]:
        """Handed on."""
        return self.inner.describe()

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """Handed on."""
        self.inner.readv(buffers, offset)

    def try_readv(self, buffers: ReadBuffers, offset: int) -> int | None:
        """None, so that every read is a call of ``readv``."""
        return None

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """Handed on."""
        self.inner.writev(buffers, offset)

    def write_zeroes(self, offset: int, length: int, allocate: bool = False) -> None:
        """Handed on."""
        self.inner.write_zeroes(offset, length, allocate)

    def discard(self, offset: int, length: int) -> None:
        """Handed on."""
        self.inner.discard(offset, length)

    def extent_at(self, offset: int) -> Extent:
        """Handed on."""
        return self.inner.extent_at(offset)

    def flush(self) -> None:
        """Handed on."""
        self.inner.flush()

    def sync(self) -> None:
        """Handed on."""
        self.inner.sync()

    def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        """Handed on."""
        self.inner.resize(size, preallocation)

    def invalidate_cache(self) -> None:
        """Handed on."""
        self.inner.invalidate_cache()

    def abandon(self) -> None:
        """Handed on."""
        self.inner.abandon()

    def close(self) -> None:
        """Handed on."""
        self.inner.close()


class AlignedStorage(WrappedStorage):
    """Takes whole blocks only, in aligned memory: whatever else comes is an AssertionError."""

    def __init__(self, inner: BlockingStorage, *, request: int = 512, memory: int = 1) -> None:
        """``request`` for offsets and lengths, ``memory`` for buffers, in bytes."""
        super().__init__(inner)
        self._request = request
        self._memory = memory

    def req_align(self) -> int:
        """As it was made."""
        return self._request

    def mem_align(self) -> int:
        """As it was made."""
        return self._memory

    def zero_align(self) -> int:
        """The same as for requests."""
        return self._request

    def discard_align(self) -> int:
        """The same as for requests."""
        return self._request

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """Checked, and handed on."""
        self._check(buffers, offset)
        super().readv(buffers, offset)

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """Checked, and handed on."""
        self._check(buffers, offset)
        super().writev(buffers, offset)

    def write_zeroes(self, offset: int, length: int, allocate: bool = False) -> None:
        """Checked, and handed on."""
        self._check_range(offset, length)
        super().write_zeroes(offset, length, allocate)

    def discard(self, offset: int, length: int) -> None:
        """Checked, and handed on."""
        self._check_range(offset, length)
        super().discard(offset, length)

    def _check(self, buffers: WriteBuffers, offset: int) -> None:
        self._check_range(offset, sum(map(len, buffers)))
        for buffer in buffers:
            if self._memory > 1:
                address = address_of(buffer)
                if address is None or (address | len(buffer)) % self._memory:
                    raise AssertionError("a buffer is not aligned")

    def _check_range(self, offset: int, length: int) -> None:
        if (offset | length) % self._request:
            raise AssertionError(f"{length} bytes at {offset} are not aligned")


class PausedStorage(WrappedStorage):
    """Every read and write waits until ``go_on`` is set; ``waiting`` says that one does."""

    def __init__(self, inner: BlockingStorage) -> None:
        super().__init__(inner)
        self.waiting = threading.Event()
        self.go_on = threading.Event()

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """Waits, then is handed on."""
        self._pause()
        super().readv(buffers, offset)

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """Waits, then is handed on."""
        self._pause()
        super().writev(buffers, offset)

    def _pause(self) -> None:
        self.waiting.set()
        if not self.go_on.wait(timeout=60):
            raise AssertionError("nobody let this storage go on for a minute")
