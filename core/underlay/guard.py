"""The guard of a raw disk that was only guessed to be raw.

Whoever writes to such a disk (a guest, say) could write another format's header into it, and the
next ``open_any()`` would believe it. So a change after which the disk would probe as something else
is refused.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

from underlay.errors import ReadOnlyError
from underlay.handle import StorageHandle
from underlay.locks import Lock
from underlay.probing import VIEW_BYTES, ProbeView

__all__ = ["RawGuard"]


class RawGuard:
    """Looks at the two ends of the object as they would be after a change."""

    __slots__ = ("_base", "_lock", "_matches", "_storage")

    def __init__(
        self,
        storage: StorageHandle,
        *,
        base: int,
        matches: Callable[[ProbeView], Sequence[str]],
        lock: Lock | None = None,
    ) -> None:
        self._storage = storage
        #: The host offset of the disk's first byte.
        self._base = base
        self._matches = matches
        self._lock = Lock() if lock is None else lock

    def shifted(self, offset: int) -> RawGuard:
        """The guard of a slice that begins at guest ``offset``."""
        return RawGuard(
            self._storage, base=self._base + offset, matches=self._matches, lock=self._lock
        )

    @asynccontextmanager
    async def write(
        self, offset: int, length: int, views: Sequence[memoryview] | None
    ) -> AsyncGenerator[None]:
        """Around a write of ``views`` (None: zeroes) at guest ``offset``.

        Raises:
            ReadOnlyError: the disk would probe as something else.
        """
        start, end, size = self._base + offset, self._base + offset + length, self._storage.size()
        if not length or (start >= VIEW_BYTES and end <= size - VIEW_BYTES):
            yield
            return
        async with self._lock:  # two harmless changes must not become a harmful one together
            ends: list[bytes] = []
            for at in (0, max(0, size - VIEW_BYTES)):
                window = await self._storage.read_bytes(at, min(size, VIEW_BYTES))
                _overlay(window, at, start=start, length=length, views=views)
                ends.append(bytes(window))
            self._refuse(
                ProbeView(ends[0], ends[1], size), what=f"writing {length} bytes at {offset}"
            )
            yield

    @asynccontextmanager
    async def resize(self, size: int) -> AsyncGenerator[None]:
        """Around a resize to ``size`` guest bytes; raises as ``write`` does."""
        async with self._lock:
            size += self._base
            present = min(size, self._storage.size())
            head = await self._storage.read_bytes(0, min(present, VIEW_BYTES))
            tail_at = max(0, size - VIEW_BYTES)
            tail = await self._storage.read_bytes(tail_at, max(0, present - tail_at))
            view = ProbeView(
                bytes(head).ljust(min(size, VIEW_BYTES), b"\0"),
                bytes(tail).ljust(min(size, VIEW_BYTES), b"\0"),
                size,
            )
            self._refuse(view, what=f"resizing to {size} bytes")
            yield

    def _refuse(self, view: ProbeView, *, what: str) -> None:
        formats = self._matches(view)
        if formats:
            raise ReadOnlyError(
                f"'{self._storage.name()}' was guessed to be raw, and {what} would make it look "
                f"like {' or '.join(formats)}; open it with format='raw' if that is meant"
            )


def _overlay(
    window: bytearray,
    at: int,
    *,
    start: int,
    length: int,
    views: Sequence[memoryview] | None,
) -> None:
    """Put what is to be written at ``start`` into a window of the object that begins at ``at``."""
    if views is None:
        low, high = max(start, at), min(start + length, at + len(window))
        if low < high:
            window[low - at : high - at] = bytes(high - low)
        return
    for view in views:
        low, high = max(start, at), min(start + len(view), at + len(window))
        if low < high:
            window[low - at : high - at] = view[low - start : high - start]
        start += len(view)
