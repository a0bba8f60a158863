"""Options that several subcommands share, and how their values are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import attrs
import click

from underlay.cli.getopt import Command, command
from underlay.cli.images import (
    IMAGE_OPTIONS,
    Access,
    Below,
    Opening,
    block_node,
    by_image_options,
    each_access,
    is_description,
    known_format,
    named,
    open_disk,
    refuse_description,
)
from underlay.cli.numbers import given_size, warn_of_hexadecimal, whole_number
from underlay.cli.problems import CommandError
from underlay.gate import (
    DenyImplicitOpenGate,
    DirectoryGate,
    ImplicitOpenGate,
    PermissiveImplicitOpenGate,
)
from underlay.limits import DEFAULT_LIMITS, Limits
from underlay.units import parse_size

__all__ = [
    "Access",
    "Below",
    "Command",
    "Opening",
    "Reader",
    "access_options",
    "block_node",
    "by_image_options",
    "cache_option",
    "command",
    "each_access",
    "force_share",
    "format_option",
    "given_size",
    "image_opts",
    "in_cache_mode",
    "is_description",
    "known_format",
    "named",
    "names",
    "object_option",
    "one_name",
    "open_disk",
    "output_option",
    "own_access_options",
    "pair",
    "refuse_description",
    "storage_option",
    "target_storage_option",
    "warn_of_hexadecimal",
    "whole_number",
]

#: Reads the value of an option, or refuses it.
Reader: TypeAlias = "Callable[[Any, Any, Any], Any]"

F = TypeVar("F", bound=Callable[..., object])


def access_options(function: F) -> F:
    """``--gate``, ``--limit``, ``--storage-option``, and ``--object`` and ``--image-opts``.

    The last two need nothing of the command: ``open_disk`` and ``named`` know of them.
    """
    for option in (image_opts, object_option, storage_option, _limit, _gate):
        function = option(function)
    return function


def own_access_options(function: F) -> F:
    """``--gate``, ``--limit`` and ``--storage-option`` alone."""
    for option in (storage_option, _limit, _gate):
        function = option(function)
    return function


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


_LIMITS = [field.name for field in attrs.fields(Limits)]


def _read_limits(_context: object, _parameter: object, given: Sequence[str]) -> Limits:
    limits = DEFAULT_LIMITS
    for text in given:
        name, value = pair("--limit", text)
        if name not in _LIMITS:
            raise CommandError(f"--limit: unknown limit '{name}'; known: {', '.join(_LIMITS)}")
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


def _read_image_opts(context: click.Context, _parameter: object, value: bool) -> None:
    context.meta[IMAGE_OPTIONS] = value


def _read_objects(_context: object, _parameter: object, given: Sequence[str]) -> None:
    if given:
        from underlay.cli.objects import check_objects

        check_objects(given)


image_opts = click.option(
    "--image-opts",
    is_flag=True,
    expose_value=False,
    callback=_read_image_opts,
    help="Names are descriptions: driver=FMT,file.filename=NAME.",
)
object_option = click.option(
    "--object",
    metavar="OBJECT",
    multiple=True,
    expose_value=False,
    callback=_read_objects,
    help="Checked as qemu-img does; has no effect.",
)
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
    help=f"How much an image may ask for: {', '.join(_LIMITS)}. Takes suffixes: 10G.",
)
storage_option = click.option(
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


_CACHE_MODES = ("directsync", "none", "off", "unsafe", "writeback", "writethrough")
#: Those that go past the page cache.
_DIRECT_MODES = ("directsync", "none", "off")


def cache_option(
    flag: str,
    name: str,
    *,
    invalid: str = "Invalid source cache option: {}",
    honoured: bool = False,
) -> Callable[[F], F]:
    """A cache mode: checked, for the sake of scripts.

    Without effect, unless it is ``honoured``: then the command takes it, for ``in_cache_mode``.
    """

    def read(_context: object, _parameter: object, value: str | None) -> str | None:
        if value is not None and value not in _CACHE_MODES:
            raise CommandError(invalid.format(value))
        return value

    direct = "none and directsync go past the page cache, others have no effect."
    return click.option(
        flag,
        name,
        metavar="CACHE",
        callback=read,
        expose_value=honoured,
        help=direct if honoured else "Accepted as qemu-img does; has no effect.",
    )


def in_cache_mode(mode: str | None, storage_options: dict[str, object]) -> dict[str, object]:
    """Options of a storage, with what a cache mode asks for besides."""
    return {"direct": "on", **storage_options} if mode in _DIRECT_MODES else storage_options


# -- names, sizes, output


def names(metavar: str = "FILENAME") -> Callable[[F], F]:
    """The names on the command line; each command counts them itself, for qemu-img's words."""
    return click.argument("names", nargs=-1, metavar=metavar)


def one_name(given: Sequence[str]) -> str:
    """The one file name that a command wants."""
    if len(given) != 1:
        raise click.UsageError("Expecting one image file name")
    return given[0]


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
