"""One request: tried until it works or its deadline is over; what went wrong becomes our errors."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from underlay.errors import (
    StorageAccessError,
    StorageChangedError,
    StorageError,
    StorageNotFoundError,
    UnderlayError,
    UnsupportedOperationError,
)
from underlay_storage.s3.location import Location
from underlay_storage.s3.problems import Kind, Problem, problem_of
from underlay_storage.s3.retrying import Retrying, TransientError, UnreachedError

__all__ = ["Requester", "UploadLostError"]

T = TypeVar("T")


class UploadLostError(Exception):
    """The server does not know an upload in parts (any more), and made no object of it."""


class Requester:
    """Makes requests to one server. Thread-safe."""

    def __init__(self, location: Location, *, deadline: float) -> None:
        """``deadline``: seconds for a request, all tries included."""
        self.location = location
        self._retrying = Retrying(deadline=deadline)
        #: Whether anybody has ever listened there, as far as is known.
        self._reached = False

    def request(self, attempt: Callable[[], T], *, doing: str, key: str) -> T:
        """What ``attempt`` gives, tried until the deadline; its failures become typed errors.

        ``doing`` completes "could not …", before the object's name.
        """

        def once() -> T:
            try:
                result = attempt()
            except (UnderlayError, TransientError, UploadLostError):
                raise
            except Exception as error:  # noqa: BLE001 - obstore raises what it likes
                raise self.typed(problem_of(error), doing=doing, key=key) from None
            except BaseException as error:
                if type(error).__name__ != "PanicException":  # of Rust: a fault of obstore's
                    raise
                unknown = Problem(Kind.OTHER, "obstore does not know what to do with this")
                raise self.typed(unknown, doing=doing, key=key) from None
            self._reached = True
            return result

        return self._retrying.run(once, doing=f"{doing} '{self.location.at(key)}'")

    def typed(self, problem: Problem, *, doing: str, key: str) -> Exception:
        """What to raise for a problem, within an attempt."""
        if problem.kind is Kind.UNREACHED and not self._reached:
            return UnreachedError(str(problem))
        self._reached = True
        if problem.kind in {Kind.TRANSIENT, Kind.UNREACHED}:
            return TransientError(str(problem))
        if problem.kind is Kind.LOST:
            return UploadLostError()
        if problem.kind is Kind.CONDITION:
            return self.changed(key)
        name = str(self.location.at(key))
        said = f"Could not {doing} '{name}': {problem}"
        if problem.kind is Kind.MISSING:
            return StorageNotFoundError(said, errno=errno.ENOENT, filename=name)
        if problem.kind is Kind.DENIED:
            return StorageAccessError(said, errno=errno.EACCES, filename=name)
        if problem.kind is Kind.UNSUPPORTED:
            return UnsupportedOperationError(said)
        return StorageError(said, errno=errno.EIO, filename=name)

    def changed(self, key: str) -> StorageChangedError:
        """The object is not the one that was opened."""
        return StorageChangedError(
            f"'{self.location.at(key)}' was changed by somebody while it was open: open it again"
        )
