"""The images that the user names: opened, or told by their target and format."""

from __future__ import annotations

import enum
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypedDict

import click

from underlay.blocking import open_any, open_image
from underlay.chain import FROM_IMAGE
from underlay.cli.output import say, warn
from underlay.cli.problems import CommandError
from underlay.errors import OptionError, UnderlayError, printable
from underlay.face import run_blocking
from underlay.gate import ImplicitOpenGate
from underlay.limits import Limits
from underlay.opening import open_to_commit
from underlay.plugins import registry
from underlay.recognition import Guess
from underlay.sync import SyncFormatAccess
from underlay.targets import Target, options_for

if TYPE_CHECKING:
    from underlay.cli.block_options import BlockNode

__all__ = [
    "IMAGE_OPTIONS",
    "Access",
    "Below",
    "Opening",
    "as_typed",
    "block_node",
    "by_image_options",
    "each_access",
    "is_description",
    "known_format",
    "named",
    "open_disk",
    "refuse_description",
    "warn_of_guess",
]

#: Where the click context keeps whether names are descriptions.
IMAGE_OPTIONS: Final = "underlay.image-opts"

#: And where what the user typed for each target that ``named`` was asked about.
_TYPED: Final = "underlay.typed"

#: How a description begins that needs no option.
_JSON: Final = "json:"

#: And which warnings were given.
_WARNED: Final = "underlay.warned"


class Access(TypedDict):
    """What ``access_options`` give a command, ready for ``open_any`` and the jobs."""

    gate: ImplicitOpenGate
    limits: Limits
    storage_options: dict[str, object]


class Opening(TypedDict):
    """How to open an image that the user named, ready for the jobs that take names."""

    format: str | None
    limits: Limits
    lock: bool
    storage_options: dict[str, object]
    format_options: dict[str, object]


class Below(enum.Enum):
    """What becomes of a backing image that the user describes with the one upon it."""

    IGNORED = enum.auto()
    READ = enum.auto()


def each_access(filenames: Sequence[str], access: Access, *more: Target) -> list[Access]:
    """``access`` for each image that a command line names, with the options its storage has.

    ``more`` are targets that it names besides, never as descriptions.

    Raises:
        CommandError: there is a storage option that none of them has.
    """
    if not access["storage_options"]:
        return [access] * (len(filenames) + len(more))
    nodes = [block_node(filename) for filename in filenames]
    targets = [
        filename if node is None else node.target
        for filename, node in zip(filenames, nodes, strict=True)
    ]
    try:
        told = options_for([*targets, *more], access["storage_options"])
    except OptionError as error:
        raise CommandError(f"--storage-option: {error}") from error
    return [{**access, "storage_options": options} for options in told]


def open_disk(
    filename: str,
    *,
    format_name: str | None,
    force_share: bool,
    access: Access,
    snapshot: str | None = None,
    writable: bool = False,
    by_options: bool | None = None,
) -> SyncFormatAccess:
    """Open an image, its chain included, in the format that was given or found.

    ``filename`` is the user's word: with ``--image-opts`` (or ``by_options``, where another option
    says how to read this one) it describes the image, and so does one that begins with ``json:``.
    """
    node = block_node(filename, by_options=by_options)
    _check(filename, node, format_name, shared=force_share, writable=writable)
    given: dict[str, Any] = {"gate": access["gate"], "writable": writable}
    if snapshot is not None:
        given["snapshot"] = snapshot
    with _called(filename):
        target, opening = _opening(
            filename, node, format_name, access, shared=force_share, below=Below.READ
        )
        return _opened(target, opening, given)


def named(
    filename: str,
    format_name: str | None,
    access: Access,
    *,
    force_share: bool = False,
    writable: bool = False,
    below: Below = Below.IGNORED,
    write_at: int | None = None,
) -> tuple[str, Opening]:
    """The target and how to open it, for commands whose jobs open an image themselves.

    ``write_at`` says how many images below it the one lies that the job writes: it is opened so if
    it is described, or lies below one that is.

    Raises:
        CommandError: what the user says makes no sense.
        UnderlayError: the backing image that is described cannot be opened.
    """
    node = block_node(filename)
    _check(filename, node, format_name, shared=force_share, writable=writable)
    with _called(filename):
        target, opening = _opening(
            filename, node, format_name, access, shared=force_share, below=below, write_at=write_at
        )
    typed: dict[str, str] = click.get_current_context().meta.setdefault(_TYPED, {})
    typed[target] = filename
    return target, opening


def _check(
    filename: str,
    node: BlockNode | None,
    format_name: str | None,
    *,
    shared: bool,
    writable: bool,
) -> None:
    wrong = None
    if writable and node is not None and node.read_only:
        wrong = "Block node is read-only"
    elif writable and (shared or (node is not None and node.shared)):
        wrong = "force-share=on can only be used with read-only images"
    if wrong is not None:
        raise CommandError(f"Could not open '{filename}': {wrong}")
    known_format(format_name, f"Could not open '{filename}': Unknown driver")


@contextmanager
def _called(filename: str) -> Generator[None]:
    """Let an error of opening say what the user called the image."""
    try:
        yield
    except UnderlayError as error:
        if error.opened is not None:
            error.opened = filename
        raise


def _opening(
    target: str,
    node: BlockNode | None,
    format_name: str | None,
    access: Access,
    *,
    shared: bool,
    below: Below,
    write_at: int | None = None,
) -> tuple[str, Opening]:
    opening: Opening = {
        "format": format_name,
        "limits": access["limits"],
        "lock": not shared,
        "storage_options": access["storage_options"],
        "format_options": {},
    }
    if node is None:
        return target, opening
    options = opening["format_options"] = dict(node.format_options)
    opening["format"] = format_name or node.format
    opening["lock"] = node.lock and not (shared or node.shared)
    opening["storage_options"] = {**access["storage_options"], **node.storage_options}
    if node.data_file is not FROM_IMAGE:
        options["data_file"] = node.data_file
    if node.backing is None:
        options["backing"] = None
    elif node.backing is not FROM_IMAGE and below is not Below.IGNORED:
        at = None if write_at is None else write_at - 1
        options["backing"] = _lent(node.backing, access, shared=shared, write_at=at)
    return node.target, opening


def _lent(
    node: BlockNode, access: Access, *, shared: bool, write_at: int | None
) -> SyncFormatAccess:
    """The described backing image, which is open until the command ends."""
    target, opening = _opening(
        node.target,
        node,
        node.format,
        access,
        shared=shared,
        below=Below.READ,
        write_at=write_at or None,
    )
    if write_at and node.backing is FROM_IMAGE:
        making = open_to_commit(
            target,
            written=lambda _image, _reference, depth: depth == write_at,
            writable=False,
            gate=access["gate"],
            **opening,
        )
        disk = SyncFormatAccess(run_blocking(making))
    else:
        disk = _opened(target, opening, {"gate": access["gate"], "writable": write_at == 0})
    # Whoever lends a disk closes it: after the one that lies upon it.
    click.get_current_context().call_on_close(disk.close)
    return disk


def _opened(target: str, opening: Opening, given: Mapping[str, Any]) -> SyncFormatAccess:
    how: dict[str, Any] = {**opening, **given}
    how |= how.pop("format_options")
    if how["format"] is None:
        del how["format"]
        return open_any(target, **how)
    return open_image(target, **how)


def warn_of_guess(context: click.Context, guess: Guess) -> None:
    """Say, once for each image, what is to be said of one that was taken for raw."""
    warned: set[tuple[str, bool]] = context.meta.setdefault(_WARNED, set())
    name = printable(guess.name)
    if (guess.name, False) not in warned:
        for format_name in guess.foreign:
            warn(
                f"'{name}' bears the signature of {format_name}, which no plug-in here knows; "
                f"it is taken for a raw disk, as -f raw says without this warning"
            )
    if guess.writable and (guess.name, True) not in warned:
        say(
            f"WARNING: Image format was not specified for '{name}' and probing guessed raw.\n"
            "         Automatically detecting the format is dangerous for raw images, write "
            "operations on block 0 will be restricted.\n"
            "         Specify the 'raw' format explicitly to remove the restrictions."
        )
    warned |= {(guess.name, False), (guess.name, guess.writable)}


def block_node(filename: str, *, by_options: bool | None = None) -> BlockNode | None:
    """What the user describes, with ``--image-opts`` or ``json:{…}``; None if it is but a name.

    Raises:
        CommandError: it makes no sense.
    """
    if by_options is None:
        by_options = by_image_options()
    if not (filename or by_options):
        raise CommandError("Could not open '': The 'file' block driver requires a file name")
    if not (by_options or is_description(filename)):
        return None
    from underlay.cli.block_options import BlockOptionError, from_json, from_options

    try:
        return from_options(filename) if by_options else from_json(filename)
    except BlockOptionError as error:
        raise CommandError(f"Could not open '{filename}': {error}", hints=error.hints) from error


def is_description(filename: str) -> bool:
    """Whether it describes an image without the help of an option."""
    return filename.startswith(_JSON)


def refuse_description(name: str) -> None:
    """Refuse to make a new image of what describes one.

    Raises:
        CommandError: it is a description, in words of qemu-img.
    """
    if is_description(name):
        raise CommandError("Unknown protocol 'json'")


def by_image_options() -> bool:
    """Whether ``--image-opts`` was given."""
    return bool(click.get_current_context().meta.get(IMAGE_OPTIONS))


def as_typed(context: click.Context, error: UnderlayError) -> None:
    """Let an error of opening an image say what the user called it."""
    typed: dict[str, str] = context.meta.get(_TYPED, {})
    if error.opened in typed:
        error.opened = typed[error.opened]


def known_format(format_name: str | None, words: str, *, hints: Sequence[str] = ()) -> None:
    """Refuse a format that nobody has, in these words."""
    known = registry()
    if format_name is None or format_name in known.format_names():
        return
    if not any(format_name == record.name for record in known.failures()):
        raise CommandError(f"{words} '{format_name}'", hints=hints)
