"""A bounded cache of tables whose hits take no lock."""

from __future__ import annotations

import threading
from collections.abc import Callable

from underlay_drivers.qcow2.tables import Table

__all__ = ["TableCache"]


class TableCache:
    """Tables by number, in two generations.

    What is used stands in the young generation; when that is full it becomes the old one, and what
    stood there untouched meanwhile is forgotten. So a hit changes nothing: it is one ``dict.get``,
    which needs no lock. What is pinned (changed, and not on disk yet) is never forgotten.
    Thread-safe.
    """

    __slots__ = ("_capacity", "_epoch", "_lock", "_old", "_pinned", "_young", "hit")

    def __init__(self, *, size: int, table_bytes: int) -> None:
        """At most ``size`` bytes of tables, but one table in each generation."""
        self._capacity = max(1, size // (2 * table_bytes))
        self._lock = threading.Lock()
        self._epoch = 0
        self._young: dict[int, Table] = {}
        self._old: dict[int, Table] = {}
        self._pinned: dict[int, Table] = {}
        #: For the hot path: the table if it is young, else None. Never replaced.
        self.hit: Callable[[int], Table | None] = self._young.get

    @property
    def epoch(self) -> int:
        """Changes when tables may have changed on disk; take it before reading one to put here."""
        return self._epoch

    def get(self, number: int) -> Table | None:
        """The table, made young again, or None."""
        table = self._young.get(number)
        if table is None:
            with self._lock:
                table = self._present(number)
                if table is not None:
                    self._admit(number, table)
        return table

    def put(self, number: int, table: Table, epoch: int) -> Table:
        """Keep a table that was read from disk; the one to be used, which somebody else may have.

        It is not kept if the disk may have changed since ``epoch``.
        """
        with self._lock:
            present = self._present(number)
            if present is not None:
                return present
            if epoch == self._epoch:
                self._admit(number, table)
            return table

    def pin(self, number: int, table: Table) -> None:
        """Keep a table until it is unpinned, in place of any other of that number."""
        with self._lock:
            self._pinned[number] = table
            self._old.pop(number, None)
            self._admit(number, table)

    def unpin(self, number: int) -> None:
        """It is on disk: keep it as any other, and nothing that was read before."""
        with self._lock:
            self._epoch += 1
            self._pinned.pop(number, None)

    def forget(self, number: int) -> None:
        """Drop a table, pinned or not, and what is being read right now."""
        with self._lock:
            self._epoch += 1
            for generation in (self._pinned, self._young, self._old):
                generation.pop(number, None)

    def clear(self) -> None:
        """Forget everything, and what is being read right now."""
        with self._lock:
            self._epoch += 1
            self._young.clear()
            self._old.clear()
            self._pinned.clear()

    def __len__(self) -> int:
        """Tables held, one that stands in several places counted once."""
        with self._lock:
            return len(self._young.keys() | self._old.keys() | self._pinned.keys())

    def _present(self, number: int) -> Table | None:
        for generation in (self._young, self._old, self._pinned):
            if number in generation:
                return generation[number]
        return None

    def _admit(self, number: int, table: Table) -> None:
        if len(self._young) >= self._capacity and number not in self._young:
            # In place: `hit` stays bound to the same dictionary.
            self._old.clear()
            self._old.update(self._young)
            self._young.clear()
        self._young[number] = table
