"""``underlay measure``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Final, Unpack

import click

from underlay.capabilities import Measurement
from underlay.cli import options
from underlay.cli.format_options import FormatOptions
from underlay.cli.output import complain, echo, echo_json, say
from underlay.cli.problems import CommandError
from underlay.cli.progress import progress_options, reporting
from underlay.cli.snapshot_choice import disk_opener
from underlay.driver import OptionSpec
from underlay.errors import OptionError, UnsupportedOperationError
from underlay.jobs.measure import measure
from underlay.jobs.progress import ProgressCallback
from underlay.plugins import registry
from underlay.sync import SyncFormatAccess

__all__ = ["command"]

_ENCRYPTED: Final = {"encrypt.": "encrypted images cannot be made yet"}
#: What qemu-img takes here, and what makes no difference.
_WITHOUT_EFFECT: Final[Mapping[str, OptionSpec]] = {
    "encryption": OptionSpec("", type="bool"),
    "extent_size_hint": OptionSpec("", type="size"),
    "nocow": OptionSpec("", type="bool"),
    "size": OptionSpec("", type="size"),
}


@options.command("measure")
@options.output_option
@options.format_option("-O", "output_format", what="The format of the new image; raw by default.")
@click.option("-o", "creation", metavar="OPTIONS", multiple=True, help="Options of the new image.")
@click.option("--size", metavar="SIZE", help="Instead of a FILENAME: a disk of this size.")
@options.format_option("-f", "format_name", what="The source's format.")
@click.option("-l", "snapshot", metavar="SNAPSHOT", help="Measure an internal snapshot.")
@progress_options
@options.force_share
@options.access_options
@options.names("[FILENAME]")
def command(
    names: tuple[str, ...],
    *,
    output: str,
    output_format: str | None,
    creation: tuple[str, ...],
    size: str | None,
    format_name: str | None,
    snapshot: str | None,
    bar: bool,
    progress: str | None,
    force_share: bool,
    **access: Unpack[options.Access],
) -> int:
    """Tell how many bytes a new image will need.

    That is for what FILENAME holds, or for a new disk, and when all of it has been written.
    """
    settings = FormatOptions.read(creation)
    open_source = disk_opener(snapshot)
    bytes_ = None if size is None else options.given_size(size, what="image size")
    if len(names) > 1:
        raise CommandError("At most one filename argument is allowed.")
    about_image = (format_name, snapshot, options.by_image_options() or None)
    if not names and about_image != (None, None, None):
        raise CommandError("--image-opts, -f, and -l require a filename argument.")
    if not names and bytes_ is None:
        raise CommandError("Either --size N or one filename must be specified.")
    if names and bytes_ is not None:
        raise CommandError("--size N cannot be used together with a filename.")
    with ExitStack() as opened:
        source: SyncFormatAccess | int = bytes_ or 0
        if names:
            source = opened.enter_context(
                open_source(
                    names[0], format_name=format_name, force_share=force_share, access=access
                )
            )
        with reporting(bar=bar, progress=progress, quiet=False) as report:
            measured = _measured(source, output_format or "raw", settings, report)
    if output == "json":
        echo_json(_as_json(measured))
        return 0
    echo(f"required size: {measured.required}")
    echo(f"fully allocated size: {measured.fully_allocated}")
    if measured.bitmaps is not None:
        echo(f"bitmaps size: {measured.bitmaps}")
    return 0


def _measured(
    source: SyncFormatAccess | int,
    format_name: str,
    settings: FormatOptions,
    progress: ProgressCallback | None,
) -> Measurement:
    known = _known(format_name)
    try:
        if settings.help_wanted:
            raise CommandError("Invalid parameter 'help'")  # noqa: TRY301
        values = settings.values({**_WITHOUT_EFFECT, **known}, refused=_ENCRYPTED)
    except CommandError as failure:
        invalid = f"Invalid options for file format '{format_name}'"
        complain(*failure.lines)
        for hint in failure.hints:
            say(hint)
        raise CommandError(invalid) from failure
    given = {name: value for name, value in values.items() if name in known}
    try:
        return measure(source, format_name, options=given, progress=progress)
    except (OptionError, UnsupportedOperationError) as error:
        raise CommandError(str(error)) from error


def _known(format_name: str) -> Mapping[str, OptionSpec]:
    options.known_format(format_name, "Unknown file format")
    return registry().driver(format_name).create_options


def _as_json(measured: Measurement) -> dict[str, int]:
    """In qemu-img's order."""
    shown = {} if measured.bitmaps is None else {"bitmaps": measured.bitmaps}
    return shown | {"required": measured.required, "fully-allocated": measured.fully_allocated}
