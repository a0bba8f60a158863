"""From an exception to one line on stderr and an exit status; never a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import TextIO, cast

import click

from underlay.chain import quotable
from underlay.cli.output import complain, flush, printable, say, stderr_if_closed
from underlay.cli.signals import Ended, told_to_end
from underlay.errors import (
    AmbiguousFormatError,
    ImageInUseError,
    ImplicitOpenDeniedError,
    InvalidImageError,
    LimitExceededError,
    StorageError,
    UnderlayError,
)
from underlay.gate import Allow, DirectoryGate, ImplicitOpenRequest
from underlay.interrupts import undisturbed

__all__ = [
    "FAILED",
    "CommandError",
    "exit_status",
    "explain",
    "hints_of",
    "said",
    "said_of_new",
    "seen_from_here",
]

#: The exit status of a failure that has none of its own.
FAILED = 1
#: What a shell reports of a program that the signal of this number ended.
_SIGNAL = 128
_SIGINT = _SIGNAL + 2
_SIGPIPE = _SIGNAL + 13

#: Printed as it is, below the line that says what is wrong.
_TRY = "Try 'underlay --help' for more information"


class CommandError(Exception):
    """A failure with an exit status of its own. Each line of the message is a line on stderr.

    ``hints`` are further lines, which stand there without the command's name.
    """

    def __init__(self, *lines: str, status: int = FAILED, hints: Sequence[str] = ()) -> None:
        super().__init__(*lines)
        self.lines = lines
        self.status = status
        self.hints = hints


def exit_status(argv: Sequence[str]) -> int:
    """Run a command line, and say on stderr what went wrong."""
    with stderr_if_closed():
        return _exit_status(argv)


def _exit_status(argv: Sequence[str]) -> int:
    try:
        status = _run(argv)
        flush()
    except BrokenPipeError:
        _forget(sys.stdout)
        status = _SIGPIPE
    except KeyboardInterrupt as told:
        status = _SIGNAL + told.number if isinstance(told, Ended) else _SIGINT
    except CommandError as failure:
        complain(*failure.lines)
        for hint in failure.hints:
            say(hint)
        status = failure.status
    except click.ClickException as error:
        complain(_usage(error, argv))
        say(_TRY)
        status = FAILED
    except (UnderlayError, OSError) as error:
        complain(explain(error))
        for hint in hints_of(error):
            say(hint)
        status = FAILED
    except Exception as error:  # noqa: BLE001 - a mistake of ours, or of a plug-in
        status = _mistaken(error)
    _drain(cast("TextIO | None", sys.stdout))
    _drain(sys.stderr)
    return status


def _mistaken(error: Exception) -> int:
    """Say what nobody expected, unless that is what came of an interrupt."""
    if (ended := told_to_end()) is not None:
        return _SIGNAL + ended.number
    if os.environ.get("UNDERLAY_DEBUG"):
        raise error
    complain(
        f"internal error: {type(error).__name__}: {error}; this is a mistake in underlay or in "
        f"a plug-in: UNDERLAY_DEBUG=1 shows where, please report it"
    )
    return FAILED


def _run(argv: Sequence[str]) -> int:
    with undisturbed():
        from underlay.cli.commands import underlay

    try:
        with underlay.make_context("underlay", list(argv)) as context:
            status: object = underlay.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    return status if isinstance(status, int) else 0


def _drain(stream: TextIO | None) -> None:
    """What is still buffered goes out or nowhere: a failing flush at exit would end with 120."""
    if stream is not None:
        try:
            stream.flush()
        except (OSError, ValueError):
            _forget(stream)


def _forget(stream: TextIO) -> None:
    """Whoever read it has gone: let what is still buffered go nowhere, without a word."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass  # it is no file


def explain(error: BaseException) -> str:
    """One sentence: what, where, what to do; in terms of the command line."""
    if not isinstance(error, UnderlayError) or isinstance(error, ImplicitOpenDeniedError):
        return said(error)
    start = "" if error.opened is None else f"Could not open '{printable(error.opened)}': "
    return start + said(error)


def hints_of(error: BaseException) -> tuple[str, ...]:
    """Further lines about an error, which stand below without the command's name."""
    hints: Sequence[str] = getattr(error, "__notes__", ())
    if isinstance(error, ImageInUseError) and error.lock is not None:
        name = printable(error.filename or "")
        return (*hints, f"Is another process using the image [{name}]?")
    return tuple(hints)


def said(error: BaseException) -> str:
    """The same without what was to be opened; as qemu-img says it, where scripts look for that."""
    if isinstance(error, ImplicitOpenDeniedError):
        return _denied(error.request, error.reason)
    text = _own_words(error)
    if isinstance(error, UnderlayError):
        if isinstance(error, StorageError) and error.images_above:
            full = error.filename or ""
            below = seen_from_here(full, error.opened or "")
            text = text.replace(f"'{printable(full)}'", f"'{printable(below)}'")
        return "Could not open backing file: " * error.images_above + text
    return text


def said_of_new(error: BaseException) -> str:
    """The same of what kept a new image from being made: files were opened to be created."""
    if not isinstance(error, StorageError) or error.errno is None or hints_of(error):
        return said(error)  # hints: what it was to lie upon could not be opened
    if error.errno == errno.EISDIR:
        return f"Could not create '{printable(error.filename or '')}': {os.strerror(errno.EISDIR)}"
    return said(error).replace("Could not open '", "Could not create '")


def _own_words(error: BaseException) -> str:
    if isinstance(error, ImageInUseError) and error.lock is not None:
        return f"Failed to get {error.lock} lock"
    if isinstance(error, InvalidImageError) and error.not_in is not None:
        return f"Image is not in {error.not_in} format"
    if isinstance(error, StorageError) and error.errno == errno.EISDIR:
        return f"'file' driver requires '{printable(error.filename or '')}' to be a regular file"
    text = error.message if isinstance(error, UnderlayError) else str(error)
    text = text.replace("Could not open for writing '", "Could not open '") or type(error).__name__
    text = text.replace("with format='raw'", "with -f raw")
    if isinstance(error, AmbiguousFormatError):
        return text.replace("with format=", "with -f")
    if isinstance(error, LimitExceededError):
        return text.replace(f"Limits({error.limit}=…)", f"--limit {error.limit}=N")
    return text


def seen_from_here(filename: str, top: str) -> str:
    """The name of a backing file, which was opened by its full one, told as the top image's is."""
    if os.path.isabs(top) or not os.path.isabs(filename):
        return filename
    return os.path.relpath(filename)


def _denied(request: ImplicitOpenRequest, reason: str) -> str:
    kind, name = request.reference.kind.value, quotable(request.reference.name)
    if isinstance(DirectoryGate().decide(request), Allow):
        way = "--gate directory allows files in the image's folder and below"
    elif request.resolved is not None and request.scheme is None:
        folder = os.path.dirname(os.path.realpath(request.resolved))
        way = f"--gate 'directory:{quotable(folder)}' allows files in that folder and below"
    else:
        way = "no folder contains it"
    return (
        f"'{request.image}' names the {kind} '{name}', which was not opened: {reason}; {way}, "
        f"--gate permissive allows anything"
    )


def _usage(error: click.ClickException, argv: Sequence[str]) -> str:
    """What qemu-img says of a wrong command line."""
    if isinstance(error, click.NoSuchOption):
        return f"unrecognized option '{_typed(error.option_name, argv)}'"
    if isinstance(error, click.BadOptionUsage):
        if "requires an argument" in error.message:
            return f"missing argument for option '{error.option_name}'"
        return f"unrecognized option '{_typed(error.option_name, argv)}'"  # a flag with a value
    return error.format_message().rstrip(".")


def _typed(option: str, argv: Sequence[str]) -> str:
    """An option as it stands on the command line, with its value."""
    return next((word for word in argv if word.startswith(f"{option}=")), option)
