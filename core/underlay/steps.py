"""How far the work of a driver or a storage has come.

All that takes long has an argument ``progress``, a ``StepsCallback``. It is called with the steps
that are done, which never fall, and with how many there are, which may rise when more is found to
do. What a step is, each work says: a table, a byte. Steps that turn out to need no work count as
done. The two are equal in one call only, the last one, when all is done and shown.

The callback may raise, to cancel the work: until that last call the image then stays what it was,
unless the work says otherwise. A ``TimeLimit`` raises in the same places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from underlay.time_limit import check_time

__all__ = ["Steps", "StepsCallback"]

#: Called with the steps that are done, and with all that there are.
StepsCallback: TypeAlias = Callable[[int, int], None]

#: A callback hears of about as many parts of a work, however many steps that has.
_PARTS_BITS = 10


class Steps:
    """Counts the steps of one work, and tells of them."""

    __slots__ = ("_next", "_tell", "done", "total")

    def __init__(self, tell: StepsCallback | None, total: int = 0) -> None:
        self._tell = tell
        self._next = 0
        self.done = 0
        self.total = 0
        self.expect(total)

    def expect(self, count: int) -> None:
        """So many more steps are to be done."""
        self.total += count
        if count:
            self._say()

    def did(self, count: int = 1) -> None:
        """So many more steps are done; with what was expected, none are left."""
        self.done = min(self.done + count, self.total)
        if self.done < self.total:
            check_time()
        if self.done >= self._next:
            self._say()

    def reach(self, done: int) -> None:
        """So many steps are done in all."""
        if done > self.done:
            self.did(done - self.done)

    def part(self, count: int) -> StepsCallback | None:
        """For a work that counts steps of its own, and is ``count`` of these."""
        if self._tell is None:
            return None
        start = self.done

        def tell(done: int, total: int) -> None:
            self._next = 0  # it is for that work to say how often it tells
            self.reach(start + count * done // max(total, 1))

        return tell

    def more(self, count: int) -> StepsCallback | None:
        """As ``part``, of steps that are expected as soon as that work shows to take some time.

        Until then they are not: a work that tells of its end alone is no step.
        """
        if self._tell is None:
            return None
        inner: StepsCallback | None = None

        def tell(done: int, total: int) -> None:
            nonlocal inner
            if inner is None and 0 < done < total:
                inner = self.part(count)
                self.expect(count)
            if inner is not None:
                inner(done, total)

        return tell

    def phase(self, count: int) -> Steps:
        """The steps of such a work, where it is one's own; to be ended with it."""
        return Steps(self.part(count))

    def end(self) -> None:
        """All is done."""
        self.done = self.total
        if self._tell is not None:
            self._tell(self.total, self.total)

    def _say(self) -> None:
        self._next = self.done + max(self.total >> _PARTS_BITS, 1)
        if self._tell is not None and self.done < self.total:
            self._tell(self.done, self.total)
