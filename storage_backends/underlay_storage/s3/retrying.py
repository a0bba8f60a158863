"""Trying again: growing waits of random length, all within one deadline."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

import attrs

from underlay.errors import StorageError

__all__ = ["Retrying", "TransientError", "UnreachedError"]

T = TypeVar("T")

_FIRST_WAIT: Final = 0.1
_LONGEST_WAIT: Final = 5.0
#: The part of the deadline in which attempts begin; the last one has the rest to end in.
_BEGIN: Final = 0.75
#: The same where nobody has ever listened: the address may be wrong, and a user waits to hear it.
_BEGIN_UNREACHED: Final = 0.125
#: A single fault is recovered from however long it took to show.
_TRIES_AT_LEAST: Final = 2


class TransientError(Exception):
    """A request failed in a way that the next one may not; ``str()`` is the reason."""


class UnreachedError(TransientError):
    """There was no connection, and there has been none before."""


@attrs.frozen(kw_only=True)
class Retrying:
    """How long a request is tried for.

    The waits double, and half of each is random, so that many clients do not come back at once.
    """

    #: Seconds, all attempts and waits included.
    deadline: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    #: From 0 to 1.
    chance: Callable[[], float] = random.random

    def run(self, attempt: Callable[[], T], *, doing: str) -> T:
        """What ``attempt`` gives, once it does not raise ``TransientError``.

        Raises:
            StorageError: it still raised that when the time was over; ``doing`` completes "could
                not …".
        """
        begun = self.clock()
        longest = _FIRST_WAIT
        tries = 0
        while True:
            tries += 1
            try:
                return attempt()
            except TransientError as error:
                wait = longest * (1 + self.chance()) / 2
                spent = self.clock() - begun
                patience = _BEGIN_UNREACHED if isinstance(error, UnreachedError) else _BEGIN
                if tries >= _TRIES_AT_LEAST and spent + wait > patience * self.deadline:
                    raise StorageError(
                        f"Could not {doing}: {error} (tried {tries} times in {spent:.0f} s)",
                        errno=errno.ETIMEDOUT,
                    ) from None
            self.sleep(wait)
            longest = min(2 * longest, _LONGEST_WAIT)
