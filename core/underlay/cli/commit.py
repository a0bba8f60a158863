"""``underlay commit``."""

from __future__ import annotations

from typing import Unpack

import click

from underlay.cli import options
from underlay.cli.output import echo, echo_json
from underlay.cli.problems import CommandError
from underlay.cli.progress import progress_options, reporting
from underlay.errors import OptionError, UnderlayError
from underlay.jobs.commit import Committed, commit, find_base

__all__ = ["command"]

#: Of the layout of the JSON.
_VERSION = 1


@options.command("commit")
@options.format_option("-f", "format_name", what="The image's format.")
@click.option("-b", "base", metavar="FILENAME", help="Commit to this image of the chain.")
@click.option("-d", "keep", is_flag=True, help="Do not empty the image afterwards.")
@click.option("-r", "rate", metavar="RATE", help="How many bytes a second to write at most.")
@options.output_option
@options.cache_option("-t", "cache", invalid="Invalid cache option: {}")
@progress_options
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@options.access_options
@options.names()
def command(
    names: tuple[str, ...],
    *,
    format_name: str | None,
    base: str | None,
    keep: bool,
    rate: str | None,
    output: str,
    bar: bool,
    progress: str | None,
    quiet: bool,
    **access: Unpack[options.Access],
) -> int:
    """Write what an image has into its backing image, and then empty it.

    With -b, into one further down; then, as with -d, the image stays as it is.
    """
    speed = None if rate is None else options.given_size(rate, what="rate limit")
    name = options.one_name(names)
    with reporting(bar=bar, progress=progress, quiet=quiet) as report:
        try:
            target, opening = options.named(
                name,
                format_name,
                access,
                writable=True,
                below=options.Below.READ,
                write_at=_depth(name, base, format_name, access),
            )
            done = commit(
                target,
                base=base,
                keep=keep,
                rate=speed,
                progress=report,
                gate=access["gate"],
                **opening,
            )
        except OptionError as error:
            if error.option != "base":
                raise
            raise CommandError(f"Did not find '{base}' in the backing chain of '{name}'") from error
        except UnderlayError as error:
            if error.opened is not None:
                error.opened = name
            raise
    if output == "json":
        echo_json(_as_json(name, done))
    elif not quiet:
        echo("Image committed.")
    return 0


def _depth(name: str, base: str | None, format_name: str | None, access: options.Access) -> int:
    """How many images below it the one lies that is to be written, where they are described."""
    if base is None or options.block_node(name) is None:
        return 1  # what is not described, the job finds itself
    with options.open_disk(name, format_name=format_name, force_share=True, access=access) as disk:
        return find_base(disk, base)


def _as_json(name: str, done: Committed) -> dict[str, object]:
    return {
        "version": _VERSION,
        "filename": name,
        "old-size": done.size_before,
        "new-size": done.size,
        "data-bytes": done.data,
        "emptied": done.emptied,
    }
