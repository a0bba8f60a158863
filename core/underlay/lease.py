"""Leases: how long a mapping that somebody holds stays good.

A driver that frees host space must not reuse, punch or cut it while somebody may still read or
write it through a mapping got earlier. Whoever uses a mapping holds a lease; whoever frees defers
what is dangerous until every lease that is older than the free has ended.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager

__all__ = ["Leases"]


class Leases:
    """The leases on the mappings of one disk. Thread-safe."""

    __slots__ = ("_deferred", "_held", "_lock", "_next")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0
        #: Leases by number, the oldest first.
        self._held: dict[int, None] = {}
        #: Actions with the number of the first lease that does not hold them up, in order.
        self._deferred: deque[tuple[int, Callable[[], None]]] = deque()

    def acquire(self) -> int:
        """Begin a lease; give its number to ``release``."""
        with self._lock:
            number = self._next
            self._next += 1
            self._held[number] = None
            return number

    def release(self, number: int) -> None:
        """End a lease, and run what only waited for it."""
        with self._lock:
            del self._held[number]
            ready = self._take_ready()
        _run(ready)

    @contextmanager
    def hold(self) -> Generator[None]:
        """A lease for the length of a ``with`` block."""
        number = self.acquire()
        try:
            yield
        finally:
            self.release(number)

    def defer(self, action: Callable[[], None]) -> None:
        """Run ``action`` (quick, no I/O) once every lease held now has ended; now if none is."""
        with self._lock:
            self._deferred.append((self._next, action))
            ready = self._take_ready()
        _run(ready)

    def _take_ready(self) -> list[Callable[[], None]]:
        oldest = next(iter(self._held), self._next)
        ready: list[Callable[[], None]] = []
        while self._deferred and self._deferred[0][0] <= oldest:
            ready.append(self._deferred.popleft()[1])
        return ready


def _run(actions: list[Callable[[], None]]) -> None:
    """Run all of them, even if one fails: what it guards would wait for ever."""
    first: Exception | None = None
    for action in actions:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - raised when all have run
            first = first or error
    if first is not None:
        raise first
