"""What a writer has written, or replaced, and the disk does not need: which of it may be removed.

An object that no root has ever named can go at once. One that a root has named can go when the
grace period is over, for those who read that root. Between the two are objects that a root may have
named whose writing failed in a way that leaves it open whether it is there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable

from underlay_storage.s3.blocks.layout import Name

__all__ = ["Leftovers"]


class Leftovers:
    """The names of such objects. Its user holds a lock."""

    def __init__(self, *, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``grace`` in seconds, of a clock that goes on evenly."""
        self._grace = grace
        self._clock = clock
        self._unnamed: list[Name] = []
        self._maybe_named: list[Name] = []
        #: When each was replaced.
        self._replaced: deque[tuple[float, Name]] = deque()
        #: Whether a root may be there that this writer does not know to be there.
        self.in_doubt = False

    def never_named(self, *names: Name) -> None:
        """These are in no root for sure."""
        self._unnamed += names

    def maybe_named(self, name: Name) -> None:
        """The next root is to name this one."""
        self._maybe_named.append(name)

    def unwanted(self, name: Name) -> None:
        """What was to be in the next root is not wanted any more."""
        (self._maybe_named if self.in_doubt else self._unnamed).append(name)

    def publishing(self) -> None:
        """A root is about to be written: from now on, what is unwanted may be in it."""
        self.in_doubt = True

    def published(self, named: Collection[Name], replaced: Iterable[Name]) -> None:
        """It is there. It names ``named`` for the first time, and ``replaced`` no longer."""
        self.in_doubt = False
        now = self._clock()
        self._replaced.extend((now, name) for name in replaced)
        self._replaced.extend((now, name) for name in self._maybe_named if name not in named)
        self._maybe_named.clear()

    def take(self, *, at_least: int) -> list[Name]:
        """What may be removed now; nothing where that is less than ``at_least``."""
        due = self._clock() - self._grace
        while self._replaced and self._replaced[0][0] <= due:
            self._unnamed.append(self._replaced.popleft()[1])
        if len(self._unnamed) < at_least:
            return []
        names, self._unnamed = self._unnamed, []
        return names
