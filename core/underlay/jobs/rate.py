"""Going no faster than was asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["RateLimit"]

#: Seconds of waiting after which somebody looks whether the job was stopped.
_LOOK = 0.1


class RateLimit:
    """So many bytes a second, over the whole job. Thread-safe."""

    __slots__ = ("_lock", "_next", "a_second")

    def __init__(self, rate: int) -> None:
        self.a_second = rate
        self._lock = threading.Lock()
        #: When the bytes that were taken so far are paid for.
        self._next = 0.0

    def take(self, length: int, stopped: Callable[[], bool]) -> None:
        """Wait until ``length`` bytes more may be written, or the job was stopped."""
        with self._lock:
            now = time.monotonic()
            begin = max(self._next, now)
            self._next = begin + length / self.a_second
        while not stopped():
            wait = begin - time.monotonic()
            if wait <= 0:
                return
            time.sleep(min(wait, _LOOK))
