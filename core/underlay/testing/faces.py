"""Running one test on both faces."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from underlay.face import run_blocking

__all__ = ["FACES", "both_faces", "drive"]

S = TypeVar("S")
T = TypeVar("T")

FACES = ("blocking", "async")


def drive(face: str, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the ``"blocking"`` or the ``"async"`` face."""
    if face == "blocking":
        return run_blocking(coroutine)
    import asyncio

    return asyncio.run(coroutine)


def both_faces(test: Callable[[S], Coroutine[Any, Any, None]]) -> Callable[[S, str], None]:
    """Make a test of a coroutine method; ``Parametrized`` runs it once on each face."""

    def run(self: S, face: str) -> None:
        drive(face, test(self))

    # Not functools.wraps: pytest would take the coroutine's signature for the test's.
    run.__name__ = test.__name__
    run.__qualname__ = test.__qualname__
    run.__doc__ = test.__doc__
    return run


class _Metafunc(Protocol):
    """What is used of pytest's object of that name; this package does not import pytest."""

    fixturenames: list[str]

    def parametrize(self, argnames: str, argvalues: tuple[str, ...], /) -> None: ...


class Parametrized:
    """A test class whose tests that ask for ``face`` run on both."""

    def pytest_generate_tests(self, metafunc: _Metafunc) -> None:
        """Called by pytest."""
        if "face" in metafunc.fixturenames:
            metafunc.parametrize("face", FACES)
