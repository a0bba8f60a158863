"""``underlay create``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import click

from underlay.cli import options
from underlay.cli.output import echo, printable
from underlay.cli.problems import CommandError
from underlay.errors import OptionError, StorageError
from underlay.face import run_blocking
from underlay.opening import create_image
from underlay.sync import SyncFormatAccess

__all__ = ["command"]


@options.command("create")
@options.format_option("-f", "format_name", what="The format of the new image (default raw).")
@click.option("-b", "backing", metavar="FILENAME", help="The image that it lies upon.")
@options.format_option("-F", "backing_format", what="The format of that image.")
@click.option("-u", "unchecked", is_flag=True, help="Do not look at the backing image.")
@click.option("-o", "creation", metavar="OPTIONS", multiple=True, help="How to create it; or help.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@options.access_options
@options.target_storage_option
@options.names("FILENAME [SIZE]")
def command(
    names: tuple[str, ...],
    *,
    format_name: str | None,
    backing: str | None,
    backing_format: str | None,
    unchecked: bool,
    creation: tuple[str, ...],
    quiet: bool,
    target_storage_options: dict[str, object],
    **access: Unpack[options.Access],
) -> int:
    """Make a new image of SIZE bytes (suffixes k, M, G, T, P and E), or as large as the one below.

    What lies under that name is replaced.
    """
    format_name = format_name or "raw"
    settings = options.creation_options(creation)
    if settings is None:
        return options.show_creation_options(format_name)
    if not names:
        raise click.UsageError("Expecting image file name")
    name, *sizes = names
    if len(sizes) > 1:
        raise click.UsageError(f"Unexpected argument: {sizes[1]}")
    size = settings.pop("size", None)
    if sizes:
        size = options.given_size(sizes[0], what="image size")
    if backing is not None:
        settings["backing_file"] = backing
    if backing_format is not None:
        settings["backing_fmt"] = backing_format

    def announce(facts: Mapping[str, object]) -> None:
        if not quiet:
            told = " ".join(f"{option}={_shown(value)}" for option, value in facts.items())
            echo(f"Formatting '{printable(name)}', fmt={format_name} {told}")

    try:
        disk = run_blocking(
            create_image(
                name,
                format=format_name,
                size=size,
                overwrite=True,
                gate=access["gate"],
                limits=access["limits"],
                lock=True,
                storage_options=target_storage_options,
                options=settings,
                open_backing=not unchecked,
                announce=announce,
            )
        )
    except (OptionError, StorageError) as error:
        raise CommandError(f"{name}: {error}") from error
    SyncFormatAccess(disk).close()
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return printable(str(value))
