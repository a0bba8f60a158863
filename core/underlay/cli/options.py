"""Options that several subcommands share, and how their values are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypedDict, TypeVar

import attrs
import click

from underlay.blocking import open_any, open_image
from underlay.cli.help import CONTEXT, help_option
from underlay.cli.problems import CommandError
from underlay.errors import OptionError
from underlay.gate import (
    DenyImplicitOpenGate,
    DirectoryGate,
    ImplicitOpenGate,
    PermissiveImplicitOpenGate,
)
from underlay.limits import DEFAULT_LIMITS, Limits
from underlay.sync import SyncFormatAccess
from underlay.units import parse_size

__all__ = [
    "Access",
    "access_options",
    "cache_option",
    "command",
    "force_share",
    "format_option",
    "given_size",
    "names",
    "one_name",
    "open_disk",
    "output_option",
    "pair",
    "target_storage_option",
]

F = TypeVar("F", bound=Callable[..., object])


def command(name: str) -> Callable[[Callable[..., int]], click.Command]:
    """A subcommand of this name."""

    def decorate(function: Callable[..., int]) -> click.Command:
        made = click.command(name, add_help_option=False, context_settings=CONTEXT)(function)
        made.params.append(help_option)
        return made

    return decorate


# -- how images are opened


class Access(TypedDict):
    """What ``access_options`` give a command, ready for ``open_any`` and the jobs."""

    gate: ImplicitOpenGate
    limits: Limits
    storage_options: dict[str, object]


def access_options(function: F) -> F:
    """``--gate``, ``--limit`` and ``--storage-option``."""
    for option in (_storage_option, _limit, _gate):
        function = option(function)
    return function


def open_disk(
    filename: str,
    *,
    format_name: str | None,
    force_share: bool,
    access: Access,
    snapshot: str | None = None,
) -> SyncFormatAccess:
    """Open an image to be read, its chain included, in the format that was given or found."""
    if format_name is not None:
        return open_image(
            filename, format=format_name, snapshot=snapshot, lock=not force_share, **access
        )
    if snapshot is not None:
        return open_any(filename, lock=not force_share, snapshot=snapshot, **access)
    return open_any(filename, lock=not force_share, **access)


def _read_gate(_context: object, _parameter: object, value: str | None) -> ImplicitOpenGate:
    where = "--gate"
    if value is None:
        where, value = "UNDERLAY_GATE", os.environ.get("UNDERLAY_GATE") or "deny"
    kind, colon, folders = value.partition(":")
    roots = folders.split(":") if colon else []
    if kind == "directory" and all(roots):
        return DirectoryGate(*roots)
    if value == "deny":
        return DenyImplicitOpenGate()
    if value == "permissive":
        return PermissiveImplicitOpenGate()
    raise CommandError(
        f"{where}: unknown gate '{value}'; say deny, directory[:DIR...] or permissive"
    )


def _read_limits(_context: object, _parameter: object, given: Sequence[str]) -> Limits:
    known = [field.name for field in attrs.fields(Limits)]
    limits = DEFAULT_LIMITS
    for text in given:
        name, value = pair("--limit", text)
        if name not in known:
            raise CommandError(f"--limit: unknown limit '{name}'; known: {', '.join(known)}")
        limits = attrs.evolve(limits, **{name: parse_size(value, option=name)})
    return limits


def _read_pairs(
    _context: object, parameter: click.Parameter, given: Sequence[str]
) -> dict[str, object]:
    return dict(pair(parameter.opts[0], text) for text in given)


def pair(option: str, text: str) -> tuple[str, str]:
    """The name and the value of ``NAME=VALUE``.

    Raises:
        CommandError: it is none.
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise CommandError(f"{option}: '{text}' is no NAME=VALUE")
    return name, value


_gate = click.option(
    "--gate",
    metavar="GATE",
    callback=_read_gate,
    help="What may be opened because an image names it: deny (nothing, the default), directory "
    "(files in the image's folder and below), directory:DIR[:DIR...] (files in these), permissive "
    "(anything). Beats the variable UNDERLAY_GATE.",
)
_limit = click.option(
    "--limit",
    "limits",
    metavar="NAME=N",
    multiple=True,
    callback=_read_limits,
    help="How much an image may ask for: chain_depth, virtual_size, metadata or decoded_unit.",
)
_storage_option = click.option(
    "--storage-option",
    "storage_options",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_read_pairs,
    help="An option of the storage that images are on, as direct=on.",
)

#: For commands that write an image.
target_storage_option = click.option(
    "--target-storage-option",
    "target_storage_options",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_read_pairs,
    help="An option of the storage that the new image is on.",
)

force_share = click.option(
    "-U", "--force-share", is_flag=True, help="Open an image that is in use; take no lock."
)


def format_option(*flags: str, what: str) -> Callable[[F], F]:
    """An option that names a format."""
    return click.option(*flags, metavar="FMT", help=what)


#: The largest size, and the largest offset.
_LARGEST = (1 << 63) - 1

_CACHE_MODES = ("directsync", "none", "off", "unsafe", "writeback", "writethrough")


def cache_option(
    flag: str, name: str, *, what: str = "source cache", status: int = 1
) -> Callable[[F], F]:
    """A cache mode: checked, for the sake of scripts, and without effect."""

    def read(_context: object, _parameter: object, value: str | None) -> None:
        if value is not None and value not in _CACHE_MODES:
            raise CommandError(f"Invalid {what} option: {value}", status=status)

    return click.option(
        flag,
        name,
        metavar="CACHE",
        callback=read,
        expose_value=False,
        help="Accepted as qemu-img does; has no effect.",
    )


# -- names, sizes, output


def names(metavar: str = "FILENAME") -> Callable[[F], F]:
    """The names on the command line; each command counts them itself, for qemu-img's words."""
    return click.argument("names", nargs=-1, metavar=metavar)


def one_name(given: Sequence[str]) -> str:
    """The one file name that a command wants."""
    if len(given) != 1:
        raise click.UsageError("Expecting one image file name")
    return given[0]


def given_size(text: str, *, what: str, least: int = 0, most: int = _LARGEST) -> int:
    """Bytes, or another number with a suffix, from the command line.

    Raises:
        CommandError: it is none, or out of its range; in qemu-img's words.
    """
    try:
        number = parse_size(_strict(text))
    except OptionError as error:
        if "must be from" not in str(error):
            raise CommandError(
                f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for",
                "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.",
            ) from None
        number = _LARGEST + 1
    if not least <= number <= most:
        raise CommandError(f"Invalid {what} specified. Must be between {least} and {most}.")
    return number


def _strict(text: str) -> str:
    """What C's ``strtoull`` makes of it: a plus sign is allowed, something behind it is not."""
    return text.lstrip().removeprefix("+") if text == text.rstrip() else ""


def _read_output(_context: object, _parameter: object, value: str) -> str:
    if value not in {"human", "json"}:
        raise CommandError("--output must be used with human or json as argument.")
    return value


output_option = click.option(
    "--output",
    metavar="human|json",
    default="human",
    callback=_read_output,
    help="For people (the default), or for programs.",
)
