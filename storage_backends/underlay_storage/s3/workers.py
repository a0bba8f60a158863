"""Threads for requests side by side, made when the first one is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["Workers"]

T = TypeVar("T")


class Workers:
    """Up to ``most`` threads, which end when it is closed. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run it in one of the threads; after ``close`` it is dropped, and its future cancelled.

        It must not wait for the work of another one.
        """
        with self._lock:
            if self._closed:
                dropped: Future[T] = Future()
                dropped.cancel()
                return dropped
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._most, thread_name_prefix="underlay-s3")
            return self._pool.submit(work)

    def close(self) -> None:
        """What has not begun is dropped, and what has is not waited for. May be called again."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
