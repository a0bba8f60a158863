"""What was fetched, as long as there is room for it; many who want one thing fetch it once.

Objects never change under their names, so nothing here can be out of date.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Cache"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Cache(Generic[K, V]):
    """Values with weights; the one that was not used for longest goes first. Thread-safe."""

    def __init__(self, most: int) -> None:
        """``most`` is what the weights may add up to."""
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._weight = 0
        self._under_way: dict[K, _Fetch[V]] = {}

    def peek(self, key: K) -> V | None:
        """What is there without fetching."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                return None
            self._kept.move_to_end(key)
            return kept[0]

    def put(self, key: K, value: V, weight: int) -> None:
        """Keep a value, if there is room at all."""
        with self._lock:
            self._put(key, value, weight)

    def get(self, key: K, fetch: Callable[[], tuple[V, int]]) -> V:
        """What is there, or what ``fetch`` brings, with its weight; errors are not kept."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept[0]
            found = self._under_way.get(key)
            mine = found is None
            if found is None:
                found = self._under_way[key] = _Fetch()
        if not mine:
            found.done.wait()
            if found.error is not None:
                raise copy.copy(found.error)
            # Without either, the thread that fetched it was interrupted.
            return self.get(key, fetch) if found.value is None else found.value[0]
        try:
            found.value = fetch()
            with self._lock:
                self._put(key, *found.value)
            return found.value[0]
        except Exception as error:
            found.error = error
            raise
        finally:
            with self._lock:
                del self._under_way[key]
            found.done.set()

    def clear(self) -> None:
        """Drop it all."""
        with self._lock:
            self._kept.clear()
            self._weight = 0

    def _put(self, key: K, value: V, weight: int) -> None:
        old = self._kept.pop(key, None)
        if old is not None:
            self._weight -= old[1]
        if weight > self._most:
            return
        self._kept[key] = value, weight
        self._weight += weight
        while self._weight > self._most:
            self._weight -= self._kept.popitem(last=False)[1][1]


class _Fetch(Generic[V]):
    """A fetch that others wait for."""

    __slots__ = ("done", "error", "value")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: Exception | None = None
        self.value: tuple[V, int] | None = None
