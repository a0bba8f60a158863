"""``underlay amend``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Unpack

import click

from underlay.capabilities import Describable, ImageDescription
from underlay.cli import options
from underlay.cli.format_options import FormatOptions, show_options
from underlay.cli.output import echo_json
from underlay.cli.problems import CommandError
from underlay.cli.progress import progress_options, reporting
from underlay.driver import OptionSpec
from underlay.errors import OptionError, UnsupportedOperationError
from underlay.jobs.amend import amend, amend_options, opened_to_amend
from underlay.plugins import registry
from underlay.sync import SyncFormatAccess

__all__ = ["command"]

_SECTOR: Final = 512
#: Of the layout of the JSON.
_VERSION: Final = 1
_ENCRYPTED: Final = {"encrypt.": "encrypted images cannot be opened yet"}


@options.command("amend")
@options.format_option("-f", "format_name", what="The image's format.")
@click.option("-o", "changes", metavar="OPTIONS", multiple=True, help="What to change; or help.")
@options.cache_option("-t", "cache", invalid="Invalid cache option: {}")
@options.output_option
@progress_options
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--force", is_flag=True, help="Accepted as qemu-img does; has no effect.")
@options.access_options
@options.names()
def command(
    names: tuple[str, ...],
    *,
    format_name: str | None,
    changes: tuple[str, ...],
    output: str,
    bar: bool,
    progress: str | None,
    quiet: bool,
    force: bool,
    **access: Unpack[options.Access],
) -> int:
    """Change options of an image that were chosen when it was created.

    Guest data stays as it is. A crash at any point leaves a sound image.
    """
    del force
    if not changes:
        raise click.UsageError("Must specify options (-o)")
    settings = FormatOptions.read(changes)
    if settings.help_wanted and format_name is not None:
        return _show(format_name)
    if len(names) != 1:
        raise CommandError("Expecting one image file name")
    below = options.Below.READ if "size" in settings.given else options.Below.IGNORED
    target, opening = options.named(names[0], format_name, access, writable=True, below=below)
    gate = access["gate"]
    with opened_to_amend(target, settings.given, gate=gate, **opening) as disk:
        if settings.help_wanted:
            return _show(disk.format_name)
        values = settings.values(
            _known(disk.format_name),
            refused=_ENCRYPTED,
            at_creation={*registry().driver(disk.format_name).create_options, "encryption"},
        )
        if not values.get("size", 1):
            del values["size"]  # to qemu-img, nothing: to be made empty would be a surprise
        _refuse(disk, values)
        with reporting(bar=bar, progress=progress, quiet=quiet, steps=True) as report:
            try:
                amend(disk, values, progress=report)
            except OptionError as error:
                raise CommandError(str(error)) from error
        fields: dict[str, object] = {"version": _VERSION, "filename": names[0]}
        fields |= {"format": disk.format_name, "changed": sorted(values)}
    if output == "json":
        echo_json(fields)
    return 0


def _refuse(disk: SyncFormatAccess, values: Mapping[str, object]) -> None:
    """Refuse what qemu-img refuses: other commands say what becomes of the guest's data."""
    describable = disk.capability(Describable)
    told = ImageDescription() if describable is None else describable.describe()
    names = values.get("backing_file"), values.get("backing_fmt")
    if names not in {(None, None), (told.backing_name, told.backing_format)}:
        raise CommandError(
            "Cannot amend the backing file", hints=("You can use 'qemu-img rebase' instead.",)
        )
    size = values.get("size")
    if isinstance(size, int) and size % _SECTOR:
        raise CommandError("The new size must be a multiple of 512")


def _known(format_name: str) -> Mapping[str, OptionSpec]:
    try:
        return amend_options(format_name)
    except UnsupportedOperationError as error:
        raise CommandError(str(error)) from error


def _show(format_name: str) -> int:
    options.known_format(format_name, "Unknown file format")
    return show_options(f"Amend options for '{format_name}':", _known(format_name))
