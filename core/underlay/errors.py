"""Every error that underlay raises, sorted by the *state* that a caller can act on.

::

    UnderlayError
     +-- InvalidImageError (ValueError)            these bytes are no valid image of the format
     |    +-- CorruptImageError                    metadata contradicts itself: offset, field, value
     +-- UnsupportedFeatureError (NotImplementedError)   the image needs a feature by this name
     +-- UnsupportedOperationError (io.UnsupportedOperation)   this driver or storage cannot do it
     +-- ImplicitOpenDeniedError (PermissionError) a gate refused an object that an image names
     +-- ReadOnlyError (OSError, EROFS)            opened read-only, or guarded against this write
     +-- OutOfRangeError (ValueError)              outside the disk or the storage
     +-- ImageInUseError (OSError, EAGAIN)         somebody else holds the image's lock
     +-- ClosedError (ValueError)                  closed, or used in a forked child
     +-- ConflictError
     |    +-- PluginConflictError                  two distributions claim one name
     |    +-- AmbiguousFormatError                 two formats match one image
     |    +-- StorageExistsError (FileExistsError) the target of a create is there already
     |    +-- StorageChangedError                  the object changed under an open handle
     +-- LimitExceededError (ValueError)           the image asks for more than ``Limits`` allows
     +-- TimeLimitError (TimeoutError)             the work took longer than ``TimeLimit`` allows
     +-- OptionError (ValueError)                  an option that is unknown or has a bad value
     +-- PluginError (LookupError)                 no such format or scheme, or it failed to load
     +-- WorkerError (RuntimeError)                another process was to do work, and did not
     +-- StorageError (OSError)                    the system failed a request
          +-- StorageNotFoundError (FileNotFoundError)
          +-- StorageAccessError (PermissionError)

The base class is never raised itself. Every error pickles, with its attributes.
"""

from __future__ import annotations

import errno as _errno
import io
import os
from typing import TYPE_CHECKING, ClassVar

from underlay.escaping import Escapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from underlay.gate import ImplicitOpenRequest

__all__ = [
    "AmbiguousFormatError",
    "ClosedError",
    "ConflictError",
    "CorruptImageError",
    "ImageInUseError",
    "ImplicitOpenDeniedError",
    "InvalidImageError",
    "LimitExceededError",
    "OptionError",
    "OutOfRangeError",
    "PluginConflictError",
    "PluginError",
    "ReadOnlyError",
    "StorageAccessError",
    "StorageChangedError",
    "StorageError",
    "StorageExistsError",
    "StorageNotFoundError",
    "TimeLimitError",
    "UnderlayError",
    "UnsupportedFeatureError",
    "UnsupportedOperationError",
    "WorkerError",
    "printable",
    "storage_error",
]


def _rebuild(cls: type[UnderlayError], message: str, details: dict[str, object]) -> UnderlayError:
    error = cls.__new__(cls, message)
    Exception.__init__(error, message)
    for name, value in details.items():
        setattr(error, name, value)
    return error


class UnderlayError(Exception):
    """Base of all errors of underlay; never raised itself.

    ``str(error)`` is one line: what went wrong, where, and what to do next.
    """

    #: The attributes that travel with the error, besides its message.
    details: ClassVar[tuple[str, ...]] = ()
    #: Which step of a job failed, where the job tells: ``"map"``, ``"read"`` or ``"create"``.
    step: str | None = None
    #: What a caller wanted to open, where that failed.
    opened: str | None = None
    #: How many images of that chain lie above the one that the message is about.
    images_above: int = 0
    #: Whose object the message is about, where an image named it; a part of ``str(error)``.
    whose: str | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """``str(error)`` without ``whose``."""
        # OSError would format itself from errno; our message is whole already. What it quotes may
        # come from an image: it must not move a terminal's cursor, or forge a second line.
        return printable(str(self.args[0])) if self.args else type(self).__name__

    def __str__(self) -> str:
        return self.message if self.whose is None else f"{self.message} ({printable(self.whose)})"

    def __reduce__(self) -> tuple[object, ...]:
        names = (*self.details, "step", "opened", "images_above", "whose")
        details = {name: getattr(self, name, None) for name in names}
        return _rebuild, (type(self), self.message, details)


class InvalidImageError(UnderlayError, ValueError):
    """The bytes are no valid image of the format they were opened as.

    ``not_in`` is that format where they do not even begin like one.
    """

    details: ClassVar[tuple[str, ...]] = ("not_in",)

    def __init__(self, message: str, *, not_in: str | None = None) -> None:
        super().__init__(message)
        self.not_in = not_in


class CorruptImageError(InvalidImageError):
    """An image's metadata contradicts itself or points nowhere.

    ``offset`` is the host byte offset of the damage where known, ``field`` the specification's name
    of the field, ``value`` what was found there.
    """

    details: ClassVar[tuple[str, ...]] = ("offset", "field", "value")

    def __init__(
        self,
        message: str,
        *,
        offset: int | None = None,
        field: str | None = None,
        value: int | None = None,
    ) -> None:
        super().__init__(message)
        self.offset = offset
        self.field = field
        self.value = value


class UnsupportedFeatureError(UnderlayError, NotImplementedError):
    """The image needs a feature that underlay does not have; ``feature`` is its name."""

    details: ClassVar[tuple[str, ...]] = ("feature",)

    def __init__(self, message: str, *, feature: str) -> None:
        super().__init__(message)
        self.feature = feature


class UnsupportedOperationError(UnderlayError, io.UnsupportedOperation):
    """This driver or storage cannot do what was asked. The core's fallbacks listen for this one."""


class ImplicitOpenDeniedError(UnderlayError, PermissionError):
    """A gate refused an object that an image names by itself; ``request`` says which."""

    details: ClassVar[tuple[str, ...]] = ("request", "reason")

    def __init__(self, message: str, *, request: ImplicitOpenRequest, reason: str) -> None:
        super().__init__(message)
        self.request = request
        self.reason = reason


class ReadOnlyError(UnderlayError, OSError):
    """A write to something that was opened read-only, or that is guarded against this write."""

    details: ClassVar[tuple[str, ...]] = ("errno",)

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = _errno.EROFS


class OutOfRangeError(UnderlayError, ValueError):
    """A request lies outside the disk or the storage; nothing was done."""


class ImageInUseError(UnderlayError, OSError):
    """Somebody else (a running virtual machine, another program) holds the image's lock.

    ``lock`` names the lock that was refused as QEMU does: ``'shared "write"'``.
    """

    details: ClassVar[tuple[str, ...]] = ("errno", "filename", "lock")

    def __init__(
        self, message: str, *, filename: str | None = None, lock: str | None = None
    ) -> None:
        super().__init__(message)
        self.errno = _errno.EAGAIN
        self.filename = filename
        self.lock = lock


class ClosedError(UnderlayError, ValueError):
    """The disk or storage was closed, or is used in a forked child, where it must not be."""


class ConflictError(UnderlayError):
    """Two things claim what only one can have."""


class PluginConflictError(ConflictError):
    """Two distributions claim one format name or URL scheme; ``claimants`` names them."""

    details: ClassVar[tuple[str, ...]] = ("claimants",)

    def __init__(self, message: str, *, claimants: Sequence[str]) -> None:
        super().__init__(message)
        self.claimants = tuple(claimants)


class AmbiguousFormatError(ConflictError):
    """More than one format's signature matches; ``formats`` names them."""

    details: ClassVar[tuple[str, ...]] = ("formats",)

    def __init__(self, message: str, *, formats: Sequence[str]) -> None:
        super().__init__(message)
        self.formats = tuple(formats)


class StorageExistsError(ConflictError, FileExistsError):
    """The target of a create exists, and overwriting it was not asked for."""

    details: ClassVar[tuple[str, ...]] = ("errno", "filename")

    def __init__(self, message: str, *, filename: str | None = None) -> None:
        super().__init__(message)
        self.errno = _errno.EEXIST
        self.filename = filename


class StorageChangedError(ConflictError):
    """The object changed under an open handle; nothing read from it can be mixed with the old."""


class LimitExceededError(UnderlayError, ValueError):
    """The image asks for more than ``Limits`` allows.

    ``limit`` is the attribute of ``Limits``, ``value`` what the image asks for, ``allowed`` the
    limit.
    """

    details: ClassVar[tuple[str, ...]] = ("limit", "value", "allowed")

    def __init__(self, message: str, *, limit: str, value: int, allowed: int) -> None:
        super().__init__(message)
        self.limit = limit
        self.value = value
        self.allowed = allowed


class TimeLimitError(UnderlayError, TimeoutError):
    """The work took longer than the ``seconds`` of a ``TimeLimit``, and was stopped."""

    details: ClassVar[tuple[str, ...]] = ("seconds",)

    def __init__(self, message: str, *, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class OptionError(UnderlayError, ValueError):
    """An option is unknown or has a value that it cannot have; ``option`` is its name."""

    details: ClassVar[tuple[str, ...]] = ("option",)

    def __init__(self, message: str, *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class PluginError(UnderlayError, LookupError):
    """No plug-in offers this format or scheme, or the one that does failed to load."""


class WorkerError(UnderlayError, RuntimeError):
    """A process that was to do a part of the work died, or could not even begin.

    What the work itself may raise comes from another process as it would from a thread.
    """


class StorageError(UnderlayError, OSError):
    """The system or the server failed a request; ``errno`` and ``filename`` as for OSError."""

    details: ClassVar[tuple[str, ...]] = ("errno", "filename")

    def __init__(
        self, message: str, *, errno: int | None = None, filename: str | None = None
    ) -> None:
        super().__init__(message)
        self.errno = errno
        self.filename = filename


class StorageNotFoundError(StorageError, FileNotFoundError):
    """There is no such object."""


class StorageAccessError(StorageError, PermissionError):
    """The system does not let this process open the object so."""


def printable(text: str) -> str:
    """Text on one line and without control characters: those are escaped, as broken bytes are."""
    return text if text.isprintable() else text.translate(_ESCAPES)


def _escaped(char: str) -> str:
    if char.isprintable():
        return char
    if "\udc80" <= char <= "\udcff":  # how Python holds a byte that is no UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


_ESCAPES = Escapes(_escaped)


def storage_error(error: OSError, *, doing: str, name: str) -> StorageError:
    """The ``StorageError`` that says what ``error`` says, and what was being done to which object.

    ``doing`` completes "could not …": "open", "read 4096 bytes at 512".
    """
    kind: type[StorageError] = StorageError
    if isinstance(error, FileNotFoundError):
        kind = StorageNotFoundError
    elif isinstance(error, PermissionError):
        kind = StorageAccessError
    reason = os.strerror(error.errno) if error.errno else str(error)
    return kind(f"Could not {doing} '{name}': {reason}", errno=error.errno, filename=name)
