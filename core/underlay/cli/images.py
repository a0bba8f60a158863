"""The images that the user names: opened, or told by their target and format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypedDict

import click

from underlay.blocking import open_any, open_image
from underlay.chain import FROM_IMAGE
from underlay.cli.output import say, warn
from underlay.cli.problems import CommandError
from underlay.errors import UnderlayError, printable
from underlay.gate import ImplicitOpenGate
from underlay.limits import Limits
from underlay.plugins import registry
from underlay.probing import ProbeView
from underlay.recognition import RAW
from underlay.signatures import foreign_formats
from underlay.sync import SyncFormatAccess

if TYPE_CHECKING:
    from underlay.cli.block_options import BlockNode

__all__ = [
    "IMAGE_OPTIONS",
    "Access",
    "as_typed",
    "block_node",
    "by_image_options",
    "known_format",
    "named",
    "open_disk",
    "target_node",
    "warn_of_guess",
]

#: Where the click context keeps whether names are descriptions.
IMAGE_OPTIONS: Final = "underlay.image-opts"

#: And where the one that ``named`` was asked about: its target, and what was typed.
_DESCRIBED: Final = "underlay.described"

#: How many bytes of each end of a disk signatures are looked for in.
_ENDS: Final = 512


class Access(TypedDict):
    """What ``access_options`` give a command, ready for ``open_any`` and the jobs."""

    gate: ImplicitOpenGate
    limits: Limits
    storage_options: dict[str, object]


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
    if node is not None and format_name is None:
        format_name = node.format
    if force_share and writable:
        raise CommandError(
            f"Could not open '{filename}': force-share=on can only be used with read-only images"
        )
    known_format(format_name, f"Could not open '{filename}': Unknown driver")
    given: dict[str, Any] = {**access, "lock": not force_share, "writable": writable}
    if snapshot is not None:
        given["snapshot"] = snapshot
    try:
        disk = _opened(filename, format_name, given, node)
    except UnderlayError as error:
        if error.opened is not None:
            error.opened = filename
        raise
    if format_name is None and disk.format_name == RAW:
        _warn_of_signature(filename, disk)
    if writable:
        warn_of_guess(filename, disk.format_name, given=format_name)
    return disk


def _warn_of_signature(filename: str, disk: SyncFormatAccess) -> None:
    """Say that what is taken for a raw disk may be an image, of a format that nobody here knows."""
    size = disk.size
    window = min(size, _ENDS)
    try:
        head = bytes(disk.read_bytes(0, window))
        tail = bytes(disk.read_bytes(size - window, window))
    except UnderlayError:
        return  # whoever needs these bytes will say so
    for name in foreign_formats(ProbeView(head, tail, size)):
        warn(
            f"'{printable(filename)}' bears the signature of {name}, which no plug-in here knows; "
            f"it is taken for a raw disk, as -f raw says without this warning"
        )


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
    target: str, format_name: str | None, given: dict[str, Any], node: BlockNode | None
) -> SyncFormatAccess:
    if node is not None:
        target = node.target
        given["lock"] = given["lock"] and node.lock
        given["storage_options"] = {**given["storage_options"], **node.storage_options}
        given |= node.format_options
        if node.data_file is not FROM_IMAGE:
            given["data_file"] = node.data_file
        if isinstance(node.backing, type(node)):
            below = node.backing
            common = {name: given[name] for name in ("gate", "limits", "lock", "storage_options")}
            lent = _opened(below.target, below.format, common, below)
            # Whoever lends a disk closes it: after the one that lies upon it.
            click.get_current_context().call_on_close(lent.close)
            given["backing"] = lent
        elif node.backing is None:
            given["backing"] = None
    if format_name is None:
        return open_any(target, **given)
    return open_image(target, format=format_name, **given)


def block_node(filename: str) -> BlockNode | None:
    """What the user describes with ``--image-opts`` or ``json:{…}``; None if it is but a name.

    Raises:
        CommandError: it makes no sense.
    """
    by_options = click.get_current_context().meta.get(IMAGE_OPTIONS, False)
    return _described(filename, by_options=by_options)


def by_image_options() -> bool:
    """Whether ``--image-opts`` was given."""
    return bool(click.get_current_context().meta.get(IMAGE_OPTIONS))


def target_node(filename: str, *, by_options: bool) -> BlockNode | None:
    """The same, where ``--target-image-opts`` says how to read it."""
    return _described(filename, by_options=by_options)


def _described(filename: str, *, by_options: bool) -> BlockNode | None:
    if not filename:
        raise CommandError("Could not open '': The 'file' block driver requires a file name")
    if not by_options and not filename.startswith("json:"):
        return None
    from underlay.cli.block_options import BlockOptionError, from_json, from_options

    try:
        return from_options(filename) if by_options else from_json(filename)
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
    click.get_current_context().meta[_DESCRIBED] = (node.target, filename)
    return node.target, format_name or node.format


def as_typed(context: click.Context, error: UnderlayError) -> None:
    """Let an error of opening an image say what the user called it."""
    target, typed = context.meta.get(_DESCRIBED, (None, None))
    if error.opened is not None and error.opened == target:
        error.opened = typed


def known_format(format_name: str | None, words: str, *, hints: Sequence[str] = ()) -> None:
    """Refuse a format that nobody has, in these words."""
    known = registry()
    if format_name is None or format_name in known.format_names():
        return
    if not any(format_name == record.name for record in known.failures()):
        raise CommandError(f"{words} '{format_name}'", hints=hints)
