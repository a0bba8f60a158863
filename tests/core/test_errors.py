"""Errors are what they say, are the builtin that fits, and survive pickling."""

from __future__ import annotations

import copy
import errno
import io
import pickle
import time

import pytest

import underlay
from underlay import errors
from underlay.errors import UnderlayError, storage_error
from underlay.gate import ImplicitOpenRequest, Reference, ReferenceKind

_REQUEST = ImplicitOpenRequest(
    reference=Reference(kind=ReferenceKind.BACKING, name="b", format="raw"),
    resolved="/x/b",
    scheme=None,
    image="/x/a",
    image_folder="/x",
    depth=1,
)

#: An instance of each, and the builtin that it is besides.
_ALL: list[tuple[UnderlayError, type[BaseException]]] = [
    (errors.InvalidImageError("m"), ValueError),
    (errors.CorruptImageError("m", offset=7, field="l1_size", value=9), ValueError),
    (errors.UnsupportedFeatureError("m", feature="luks"), NotImplementedError),
    (errors.UnsupportedOperationError("m"), io.UnsupportedOperation),
    (errors.ImplicitOpenDeniedError("m", request=_REQUEST, reason="no"), PermissionError),
    (errors.ReadOnlyError("m"), OSError),
    (errors.OutOfRangeError("m"), ValueError),
    (errors.ImageInUseError("m", filename="f"), OSError),
    (errors.ClosedError("m"), ValueError),
    (errors.ConflictError("m"), Exception),
    (errors.PluginConflictError("m", claimants=["a", "b"]), errors.ConflictError),
    (errors.AmbiguousFormatError("m", formats=["a", "b"]), errors.ConflictError),
    (errors.StorageExistsError("m", filename="f"), FileExistsError),
    (errors.StorageChangedError("m"), errors.ConflictError),
    (errors.LimitExceededError("m", limit="metadata", value=2, allowed=1), ValueError),
    (errors.TimeLimitError("m", seconds=2.5), TimeoutError),
    (errors.OptionError("m", option="size"), ValueError),
    (errors.PluginError("m"), LookupError),
    (errors.WorkerError("m"), RuntimeError),
    (errors.StorageError("m", errno=errno.EIO, filename="f"), OSError),
    (errors.StorageNotFoundError("m", errno=errno.ENOENT, filename="f"), FileNotFoundError),
    (errors.StorageAccessError("m", errno=errno.EACCES, filename="f"), PermissionError),
]


def _through_pickle(error: UnderlayError, protocol: int = pickle.DEFAULT_PROTOCOL) -> object:
    return pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - our own bytes


def test_the_list_here_is_complete() -> None:
    raised = {kind for kind in map(errors.__dict__.get, errors.__all__) if isinstance(kind, type)}
    assert raised - {UnderlayError} == {type(error) for error, _ in _ALL}


@pytest.mark.parametrize(("error", "builtin"), _ALL, ids=lambda value: type(value).__name__)
def test_it_is_ours_and_the_builtin(error: UnderlayError, builtin: type[BaseException]) -> None:
    assert isinstance(error, UnderlayError)
    assert isinstance(error, builtin)
    assert str(error) == "m"


@pytest.mark.parametrize("error", [error for error, _ in _ALL], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_it_survives_pickling_with_its_attributes(error: UnderlayError, protocol: int) -> None:
    for twin in (_through_pickle(error, protocol), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        for name in error.details:
            assert getattr(twin, name) == getattr(error, name)


def test_errno_is_the_systems() -> None:
    assert errors.ReadOnlyError("m").errno == errno.EROFS
    assert errors.ImageInUseError("m").errno == errno.EAGAIN
    assert errors.StorageExistsError("m").errno == errno.EEXIST


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, errors.StorageNotFoundError),
        (errno.EACCES, errors.StorageAccessError),
        (errno.EPERM, errors.StorageAccessError),
        (errno.EIO, errors.StorageError),
        (errno.ENOSPC, errors.StorageError),
    ],
)
def test_a_system_error_keeps_its_number_and_says_what_was_done(
    number: int, kind: type[errors.StorageError]
) -> None:
    error = storage_error(OSError(number, "text"), doing="open", name="/the/file")
    assert type(error) is kind
    assert error.errno == number
    assert error.filename == "/the/file"
    assert "/the/file" in str(error)
    assert "open" in str(error)


def test_no_name_can_forge_a_second_line_or_move_the_cursor() -> None:
    hostile = "a\nunderlay: all is well\x1b[2J\r\udcff"
    for error in (
        underlay.InvalidImageError(f"'{hostile}' is no image"),
        storage_error(OSError(errno.EIO, "x"), doing="open", name=hostile),
    ):
        assert str(error).isprintable()
        str(error).encode()
        assert str(_through_pickle(error)) == str(error)


def test_a_whole_table_of_names_is_made_harmless_quickly() -> None:
    """An image may hold 64 MiB of them; what is escaped once is known from then on."""
    names = "\0\x1b\udcff" * (1 << 20)
    started = time.process_time()
    assert errors.printable(names) == r"\x00\x1b\xff" * (1 << 20)
    assert time.process_time() - started < 5
