"""Options that several subcommands share, and how their values are read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict, TypeVar

import attrs
import click

from underlay.blocking import open_any, open_image
from underlay.chain import FROM_IMAGE
from underlay.cli.block_options import JSON, BlockNode, BlockOptionError, from_json, from_options
from underlay.cli.help import CONTEXT, help_option
from underlay.cli.output import say, warn
from underlay.cli.problems import CommandError
from underlay.errors import OptionError, UnderlayError, printable
from underlay.gate import (
    DenyImplicitOpenGate,
    DirectoryGate,
    ImplicitOpenGate,
    PermissiveImplicitOpenGate,
)
from underlay.limits import DEFAULT_LIMITS, Limits
from underlay.plugins import registry
from underlay.recognition import RAW
from underlay.sync import SyncFormatAccess
from underlay.units import parse_size

__all__ = [
    "CACHE_MODES",
    "Access",
    "Command",
    "Reader",
    "access_options",
    "block_node",
    "by_image_options",
    "cache_option",
    "command",
    "force_share",
    "format_option",
    "given_size",
    "image_opts",
    "known_format",
    "named",
    "names",
    "object_option",
    "one_name",
    "open_disk",
    "output_option",
    "own_access_options",
    "pair",
    "target_node",
    "target_storage_option",
    "warn_of_guess",
    "warn_of_hexadecimal",
    "whole_number",
]

#: Reads the value of an option, or refuses it.
Reader: TypeAlias = "Callable[[Any, Any, Any], Any]"

F = TypeVar("F", bound=Callable[..., object])


#: Options that qemu-img does not have. They cannot be shortened: a new one breaks no script.
_OURS = frozenset(
    {
        "--compress-level",
        "--dirty",
        "--dry-run",
        "--findings",
        "--gate",
        "--limit",
        "--list",
        "--picture",
        "--progress",
        "--storage-option",
        "--target-storage-option",
    }
)


class Command(click.Command):
    """A subcommand that reads its command line as getopt does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._in_full(args))

    def invoke(self, ctx: click.Context) -> object:
        if ctx.meta.get(_IMAGE_OPTIONS) and ctx.params.get("format_name") is not None:
            raise CommandError("--image-opts and --format are mutually exclusive")
        return super().invoke(ctx)

    def _in_full(self, args: Sequence[str]) -> list[str]:
        """The arguments with long options that were shortened written out."""
        takes_value = {
            spelling: not option.is_flag
            for option in self.params
            if isinstance(option, click.Option)
            for spelling in option.opts
        }
        found: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--":
                return [*found, word, *words]
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                name = _spelled_out(name, takes_value)
                found.append(name + equals + value)
                if equals or not takes_value.get(name):
                    continue
            else:
                found.append(word)
                if not word.startswith("-") or not _needs_more(word, takes_value):
                    continue
            found.extend(value for value in (next(words, None),) if value is not None)
        return found


def _spelled_out(name: str, known: Collection[str]) -> str:
    if name in known:
        return name
    meant = [
        other
        for other in known
        if other.startswith(name) and len(name) > len("--") and other not in _OURS
    ]
    return meant[0] if len(meant) == 1 else name


def _needs_more(word: str, takes_value: Mapping[str, bool]) -> bool:
    """Whether the last of the letters behind a dash takes the next word as its value."""
    for at, letter in enumerate(word[1:], 2):
        if takes_value.get(f"-{letter}", False):
            return at == len(word)
    return False


def command(
    name: str, cls: type[Command] = Command
) -> Callable[[Callable[..., int]], click.Command]:
    """A subcommand of this name."""

    def decorate(function: Callable[..., int]) -> click.Command:
        made = click.command(name, cls, add_help_option=False, context_settings=CONTEXT)(function)
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
    """``--gate``, ``--limit``, ``--storage-option``, and ``--object`` and ``--image-opts``.

    The last two need nothing of the command: ``open_disk`` and ``named`` know of them.
    """
    for option in (image_opts, object_option, _storage_option, _limit, _gate):
        function = option(function)
    return function


def own_access_options(function: F) -> F:
    """``--gate``, ``--limit`` and ``--storage-option`` alone."""
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
    writable: bool = False,
) -> SyncFormatAccess:
    """Open an image, its chain included, in the format that was given or found.

    ``filename`` is the user's word: with ``--image-opts`` it describes the image, and so does one
    that begins with ``json:``.
    """
    node = block_node(filename)
    if node is None:
        node = BlockNode(target=filename)
    if format_name is not None:
        node = attrs.evolve(node, format=format_name)
    if force_share and writable:
        raise CommandError(
            f"Could not open '{filename}': force-share=on can only be used with read-only images"
        )
    known_format(node.format, f"Could not open '{filename}': Unknown driver")
    try:
        disk = _opened(
            node, access=access, lock=not force_share, snapshot=snapshot, writable=writable
        )
    except UnderlayError as error:
        if error.opened is not None:
            error.opened = filename
        raise
    if writable:
        warn_of_guess(filename, disk.format_name, given=node.format)
    return disk


def warn_of_guess(filename: str, format_name: str, *, given: str | None) -> None:
    """Say what qemu-img says where an image is about to be changed that only looks like raw."""
    if given is None and format_name == RAW:
        say(
            f"WARNING: Image format was not specified for '{printable(filename)}' and probing "
            "guessed raw.\n"
            "         Automatically detecting the format is dangerous for raw images, write "
            "operations on block 0 will be restricted.\n"
            "         Specify the 'raw' format explicitly to remove the restrictions."
        )


def _opened(
    node: BlockNode, *, access: Access, lock: bool, snapshot: str | None, writable: bool
) -> SyncFormatAccess:
    given: dict[str, Any] = {**access, "lock": lock and node.lock, "writable": writable}
    given["storage_options"] = {**access["storage_options"], **node.storage_options}
    given |= node.format_options
    if snapshot is not None:
        given["snapshot"] = snapshot
    if node.data_file is not FROM_IMAGE:
        given["data_file"] = node.data_file
    if node.backing is None:
        given["backing"] = None
    elif node.backing is not FROM_IMAGE:
        below = _opened(node.backing, access=access, lock=lock, snapshot=None, writable=False)
        # Whoever lends a disk closes it: after the one that lies upon it.
        click.get_current_context().call_on_close(below.close)
        given["backing"] = below
    if node.format is None:
        return open_any(node.target, **given)
    return open_image(node.target, format=node.format, **given)


def block_node(filename: str) -> BlockNode | None:
    """What the user describes with ``--image-opts`` or ``json:{…}``; None if it is but a name.

    Raises:
        CommandError: it makes no sense.
    """
    by_options = click.get_current_context().meta.get(_IMAGE_OPTIONS, False)
    return _described(filename, by_options=by_options)


def by_image_options() -> bool:
    """Whether ``--image-opts`` was given."""
    return bool(click.get_current_context().meta.get(_IMAGE_OPTIONS))


def target_node(filename: str, *, by_options: bool) -> BlockNode | None:
    """The same, where ``--target-image-opts`` says how to read it."""
    return _described(filename, by_options=by_options)


def _described(filename: str, *, by_options: bool) -> BlockNode | None:
    if not filename:
        raise CommandError("Could not open '': The 'file' block driver requires a file name")
    try:
        if by_options:
            return from_options(filename)
        return from_json(filename) if filename.startswith(JSON) else None
    except BlockOptionError as error:
        raise CommandError(f"Could not open '{filename}': {error}", hints=error.hints) from error


def named(filename: str, format_name: str | None) -> tuple[str, str | None]:
    """The target and the format, for commands whose jobs open an image by these.

    Raises:
        CommandError: the user says more of the image than that.
    """
    node = block_node(filename)
    if node is None:
        known_format(format_name, f"Could not open '{filename}': Unknown driver")
        return filename, format_name
    if not node.plain:
        raise CommandError(
            f"Could not open '{filename}': this command takes a driver and a file name, "
            "and no other option"
        )
    return node.target, format_name or node.format


def known_format(format_name: str | None, words: str, *, hints: Sequence[str] = ()) -> None:
    """Refuse a format that nobody has, in these words."""
    known = registry()
    if format_name is None or format_name in known.format_names():
        return
    if not any(format_name == record.name for record in known.failures()):
        raise CommandError(f"{words} '{format_name}'", hints=hints)


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


#: Where the click context keeps whether names are descriptions.
_IMAGE_OPTIONS = "underlay.image-opts"


def _read_image_opts(context: click.Context, _parameter: object, value: bool) -> None:
    context.meta[_IMAGE_OPTIONS] = value


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

CACHE_MODES = ("directsync", "none", "off", "unsafe", "writeback", "writethrough")


def cache_option(
    flag: str, name: str, *, what: str = "source cache", status: int = 1
) -> Callable[[F], F]:
    """A cache mode: checked, for the sake of scripts, and without effect."""

    def read(_context: object, _parameter: object, value: str | None) -> None:
        if value is not None and value not in CACHE_MODES:
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
        warn_of_hexadecimal(text)
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


def warn_of_hexadecimal(text: str) -> None:
    """Say what qemu-img says of a hexadecimal number with a suffix."""
    if _HEXADECIMAL.fullmatch(text):
        warn(f"Using a multiplier suffix on hex numbers is deprecated: {text}")


_HEXADECIMAL = re.compile(r"\s*[+]?0x[0-9a-f]+[kmgtp]", re.ASCII | re.IGNORECASE)


def whole_number(text: str) -> int | None:
    """A number as C's ``strtoul`` reads it, hexadecimal and octal too; None if it is none."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, hexadecimal, octal, decimal = match.groups()
    number = int(hexadecimal or octal or decimal, 16 if hexadecimal else 8 if octal else 10)
    return -number if sign == "-" else number


_NUMBER = re.compile(r"\s*([+-]?)(?:0x([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))", re.ASCII)


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
