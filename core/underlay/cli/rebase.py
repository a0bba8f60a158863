"""``underlay rebase``."""

from __future__ import annotations

from typing import Unpack

import click

from underlay.cli import options
from underlay.cli.output import echo_json
from underlay.cli.problems import CommandError, explain, hints_of, said, seen_from_here
from underlay.cli.progress import progress_options, reporting
from underlay.errors import (
    ImageInUseError,
    ImplicitOpenDeniedError,
    UnderlayError,
)
from underlay.jobs.rebase import Rebased, rebase

__all__ = ["command"]

#: Of the layout of the JSON.
_VERSION = 1


@options.command("rebase")
@options.format_option("-f", "format_name", what="The image's format.")
@click.option("-b", "backing", metavar="FILENAME", help="What it is to lie upon; '': nothing.")
@options.format_option("-F", "backing_format", what="The format of that image.")
@click.option("-u", "unsafe", is_flag=True, help="Change the name alone, and open nothing.")
@options.output_option
@options.cache_option("-t", "cache", invalid="Invalid cache option: {}")
@options.cache_option("-T", "source_cache")
@progress_options
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@options.force_share
@options.access_options
@options.names()
def command(
    names: tuple[str, ...],
    *,
    format_name: str | None,
    backing: str | None,
    backing_format: str | None,
    unsafe: bool,
    output: str,
    bar: bool,
    progress: str | None,
    quiet: bool,
    force_share: bool,
    **access: Unpack[options.Access],
) -> int:
    """Let an image lie upon another backing image, and go on showing the same bytes.

    What the two have not in common is copied into the image first. With -u the bytes may change.
    """
    name = options.one_name(names)
    if backing is None and not unsafe:
        raise click.UsageError("Must specify backing file (-b) or use unsafe mode (-u)")
    below = options.Below.IGNORED if unsafe else options.Below.READ
    target, opening = options.named(name, format_name, access, writable=True, below=below)
    with reporting(bar=bar, progress=progress, quiet=quiet) as report:
        try:
            done = rebase(
                target,
                backing,
                backing_format=backing_format,
                unsafe=unsafe,
                progress=report,
                gate=access["gate"],
                lock_backing=not force_share,
                **opening,
            )
        except ImplicitOpenDeniedError:
            raise
        except UnderlayError as error:
            if error.step == "format":
                options.known_format(backing_format, "Invalid format name:")
            raise _failure(error, name, backing or "") from error
    if output == "json":
        echo_json(_as_json(name, done))
    return 0


def _failure(error: UnderlayError, name: str, backing: str) -> CommandError:
    """What qemu-img says of it."""
    if error.step == "reference":
        return CommandError(
            f"Could not change the backing file to '{backing}': {said(error)}",
            hints=hints_of(error),
        )
    full = getattr(error, "filename", None)
    if error.step != "backing":
        if error.opened is not None:
            error.opened = name
    elif isinstance(full, str) and isinstance(error, ImageInUseError):
        error.filename = seen_from_here(full, name)
    hints = hints_of(error)
    if error.step != "backing":
        return CommandError(explain(error), hints=hints)
    text = said(error)
    if isinstance(full, str):
        text = text.replace(f"'{full}'", f"'{seen_from_here(full, name)}'")
    return CommandError(f"Could not open new backing file '{backing}': {text}", hints=hints)


def _as_json(name: str, done: Rebased) -> dict[str, object]:
    return {
        "version": _VERSION,
        "filename": name,
        "virtual-size": done.size,
        "data-bytes": done.data,
        "zero-bytes": done.zeroed,
    }
