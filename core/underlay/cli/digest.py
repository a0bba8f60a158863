"""``underlay digest``."""

from __future__ import annotations

import json
from typing import Unpack

import click

from underlay.cli import options
from underlay.cli.output import echo, printable
from underlay.cli.problems import CommandError
from underlay.cli.progress import progress_options, reporting
from underlay.jobs.digest import digest

__all__ = ["command"]

_JSON_VERSION = 1


@options.command("digest")
@options.format_option("-f", "format_name", what="The images' format, instead of finding it out.")
@click.option("-a", "--algorithm", default="sha256", help="A hash function (default sha256).")
@click.option("-l", "snapshot", metavar="SNAPSHOT", help="Read this internal snapshot.")
@options.output_option
@progress_options
@options.force_share
@options.access_options
@options.names("FILENAME...")
def command(
    names: tuple[str, ...],
    *,
    format_name: str | None,
    algorithm: str,
    snapshot: str | None,
    output: str,
    bar: bool,
    progress: str | None,
    force_share: bool,
    **access: Unpack[options.Access],
) -> int:
    """Hash the bytes of disks: the same, however they are stored, for the same bytes.

    One line for each: the hash, two spaces, and the name.
    """
    if not names:
        raise CommandError("Expecting image file name")
    found: list[dict[str, object]] = []
    for name, own_access in zip(names, options.each_access(names, access), strict=True):
        with (
            options.open_disk(
                name,
                format_name=format_name,
                force_share=force_share,
                access=own_access,
                snapshot=snapshot,
            ) as disk,
            reporting(bar=bar, progress=progress, quiet=False) as report,
        ):
            result = digest(disk, algorithm=algorithm, progress=report)
        if output == "human":
            echo(f"{result}  {printable(name)}")
        found.append({"filename": name, "digest": str(result), "virtual-size": result.size})
    if output == "json":
        echo(json.dumps({"version": _JSON_VERSION, "images": found}, indent=4))
    return 0
