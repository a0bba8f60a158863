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
    """The leases on the mappings of one disk. Thread-safe.

    The hot path of a disk uses ``hot`` in place of ``hold``, which costs a twentieth::

        quick = leases.hot
        quick.append(None)
        while quick is not leases.hot:
            ...  # pop, and once more: it was exchanged in between, and perhaps counts as ended
        try:
            ...  # locate, and read or write there
        finally:
            quick.pop()

    Such a lease counts as ended when ``hot`` was seen empty. While it is not, newcomers get another
    one, so that those who come after a free never hold it up.
    """

    __slots__ = ("_deferred", "_draining", "_held", "_lock", "_next", "hot")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0
        #: Leases by number, the oldest first.
        self._held: dict[int, None] = {}
        #: Actions with the number of the first lease that does not hold them up, in order.
        self._deferred: deque[tuple[int, Callable[[], None]]] = deque()
        #: One item for each quick lease. Appending and popping are atomic.
        self.hot: deque[None] = deque()
        #: Former ``hot`` ones, each with the number that it stands for among the held.
        self._draining: list[tuple[int, deque[None]]] = []

    def acquire(self) -> int:
        """Begin a lease; give its number to ``release``."""
        with self._lock:
            return self._begin()

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
            if self.hot:
                # Whoever is in there may be older than this; who comes from now on is not.
                former, self.hot = self.hot, deque()
                self._draining.append((self._begin(), former))
            self._deferred.append((self._next, action))
            ready = self._take_ready()
        _run(ready)

    def settle(self) -> None:
        """Run what only waited for quick leases, which do not tell when they end."""
        if self._deferred:
            with self._lock:
                ready = self._take_ready()
            _run(ready)

    def _begin(self) -> int:
        number = self._next
        self._next += 1
        self._held[number] = None
        return number

    def _take_ready(self) -> list[Callable[[], None]]:
        still: list[tuple[int, deque[None]]] = []
        for number, former in self._draining:
            if former:
                still.append((number, former))
            else:
                del self._held[number]
        self._draining = still
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
