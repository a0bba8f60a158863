"""Writing for people and for programs: lines, JSON, sizes, and names from images made harmless."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from math import frexp
from typing import Final, TextIO, cast

from underlay.errors import StorageError, printable, storage_error
from underlay.escaping import Escapes

__all__ = [
    "complain",
    "echo",
    "echo_json",
    "flush",
    "human_size",
    "is_terminal",
    "json_text",
    "printable",
    "say",
    "stderr_if_closed",
    "tell_meanwhile",
    "warn",
]


#: A value in the description of an image, as ``file.session_token=…`` or ``"session_token": "…"``.
_SECRET: Final = re.compile(r'(\b\w*(?:secret|password|token)\w*(?:=|": ?"))[^,"]+')


def echo(text: str, *, end: str = "\n") -> None:
    """Write to stdout, whatever characters it can show.

    Raises:
        StorageError: it cannot be written to.
    """
    with _writing():
        _write(sys.stdout, text + end)


def echo_json(value: object) -> None:
    """Write JSON as ``json_text`` lays it out, piece by piece; raises as ``echo`` does."""
    with _writing():
        for piece in _json(value, 0):
            _write(sys.stdout, piece)
        _write(sys.stdout, "\n")


def is_terminal() -> bool:
    """Whether stdout is one; raises as ``echo`` does."""
    with _writing():
        return sys.stdout.isatty()


def flush() -> None:
    """Bring out what was written; raises as ``echo`` does."""
    with _writing():
        sys.stdout.flush()


@contextmanager
def _writing() -> Generator[None]:
    if cast("TextIO | None", sys.stdout) is None:
        raise StorageError("Could not write the output: standard output is closed")
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise storage_error(error, doing="write to", name="standard output") from error


def complain(*lines: str) -> None:
    """Write each line to stderr, after the command's name; no secret that a user typed is in it."""
    for line in lines:
        shown = printable(_SECRET.sub(r"\1***", line))
        say(f"underlay: {shown}")


def say(line: str) -> None:
    """Write a line to stderr as it is: what qemu-img prints there without its name.

    Where it cannot be written, the exit status still tells.
    """
    with suppress(OSError):
        _write(sys.stderr, f"{line}\n")


def tell_meanwhile(text: str) -> None:
    """Write to stderr how far a job is. Where that cannot be written, the job goes on.

    Raises:
        BrokenPipeError: whoever read it went away.
    """
    try:
        _write(sys.stderr, text)
        sys.stderr.flush()
    except BrokenPipeError:
        raise
    except OSError:
        pass


@contextmanager
def stderr_if_closed() -> Generator[None]:
    """Give a process that was started without stderr one that nobody reads."""
    if cast("TextIO | None", sys.stderr) is not None:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        yield


def warn(text: str) -> None:
    """Say something on stderr that is no failure."""
    complain(f"warning: {text}")


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


def human_size(size: int) -> str:
    """Bytes with three digits and a binary unit, as qemu-img rounds them: "1.5 GiB"."""
    # The next unit begins at 1,000 of the one before, so that three digits suffice.
    exponent = frexp(size / (1000 / 1024))[1]
    unit = max(exponent - 1, 0) // 10
    return f"{size / (1 << unit * 10):.3g} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[unit]}B"


def json_text(value: object, indent: int = 0) -> str:
    """JSON laid out as qemu-img lays it out: four spaces a level, ASCII only."""
    return "".join(_json(value, indent))


def _json(value: object, indent: int) -> Iterator[str]:
    inner, outer = "\n" + "    " * (indent + 1), "\n" + "    " * indent
    if isinstance(value, str):
        yield f'"{value.translate(_JSON)}"'
    elif isinstance(value, Mapping):
        yield "{"
        comma = ""
        for name, item in cast("Mapping[str, object]", value).items():
            yield f"{comma}{inner}{json_text(name)}: "
            yield from _json(item, indent + 1)
            comma = ","
        yield outer + "}"
    elif isinstance(value, Sequence):
        yield "["
        comma = ""
        for item in cast("Sequence[object]", value):
            yield comma + inner
            yield from _json(item, indent + 1)
            comma = ","
        yield outer + "]"
    elif value is None:
        yield "null"
    elif isinstance(value, bool):
        yield "true" if value else "false"
    else:
        yield str(value)


_JSON_ESCAPES = {
    '"': '\\"',
    "\\": "\\\\",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
}


def _json_char(char: str) -> str:
    if " " <= char <= "~":
        return _JSON_ESCAPES.get(char, char)
    if char in _JSON_ESCAPES:
        return _JSON_ESCAPES[char]
    if "\ud800" <= char <= "\udfff":  # no character: a byte that is no UTF-8
        return "\\uFFFD"
    units = char.encode("utf-16-be")
    return "".join(f"\\u{units[at] << 8 | units[at + 1]:04X}" for at in range(0, len(units), 2))


_JSON = Escapes(_json_char)
