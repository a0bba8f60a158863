"""A driver's capability in a program's hands: each of its calls counts as one in flight.

So a disk that is closed meanwhile waits for it, and one that is closed already says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from underlay.face import run_blocking
from underlay.lifecycle import Lifecycle

__all__ = ["BlockingCapability", "CountedCapability"]


class CountedCapability:
    """A capability on the asynchronous face: what waits is awaited, the rest is called."""

    __slots__ = ("_life", "_target")

    def __init__(self, target: object, life: Lifecycle) -> None:
        self._target = target
        self._life = life

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return found
        method: Callable[..., Any] = found
        if inspect.iscoroutinefunction(method):

            async def awaited(*args: Any, **kwargs: Any) -> Any:
                with self._life.call():
                    return await method(*_plain(args), **kwargs)

            return awaited

        def called(*args: Any, **kwargs: Any) -> Any:
            with self._life.call():
                return method(*_plain(args), **kwargs)

        return called


class BlockingCapability(CountedCapability):
    """A capability on the blocking face: its methods block, and return their results."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if not inspect.iscoroutinefunction(found):
            return found
        method: Callable[..., Any] = found

        def blocking(*args: Any, **kwargs: Any) -> Any:
            return run_blocking(method(*args, **kwargs))

        return blocking


def _plain(args: tuple[Any, ...]) -> list[Any]:
    """Another disk's capability goes to the driver as what it is there."""
    return [a._target if isinstance(a, CountedCapability) else a for a in args]  # noqa: SLF001
