"""``underlay compare``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Unpack

import click

from underlay.cli import options
from underlay.cli.output import echo
from underlay.cli.problems import CommandError, explain, hints_of
from underlay.cli.progress import progress_options, reporting
from underlay.errors import UnderlayError
from underlay.jobs.compare import compare
from underlay.sync import SyncFormatAccess

__all__ = ["command"]

_DIFFERENT = 1
_NOT_OPENED = 2
#: By the step of the job that failed; what else goes wrong is a failed read.
_FAILED = {"map": 3}
_NOT_READ = 4


@options.command("compare")
@options.format_option("-f", "format_name", what="The first image's format.")
@options.format_option("-F", "other_format", what="The second image's format.")
@click.option("-s", "strict", is_flag=True, help="Sizes and what is allocated must be equal too.")
@options.cache_option("-T", "source_cache", status=_NOT_OPENED)
@progress_options
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@options.force_share
@options.access_options
@options.names("FILENAME FILENAME")
def command(
    names: tuple[str, ...],
    *,
    format_name: str | None,
    other_format: str | None,
    strict: bool,
    bar: bool,
    progress: str | None,
    quiet: bool,
    force_share: bool,
    **access: Unpack[options.Access],
) -> int:
    """Say whether two disks hold the same bytes.

    Of disks of two sizes, what the longer one has more must be zeroes. Exit status: 0 the same, 1
    different, 2 an image could not be opened, 3 not mapped, 4 not read.
    """
    if len(names) != 2:  # noqa: PLR2004 (it compares two)
        raise click.UsageError("Expecting two image file names")
    with ExitStack() as disks:

        def opened(name: str, as_format: str | None) -> SyncFormatAccess:
            try:
                return disks.enter_context(
                    options.open_disk(
                        name, format_name=as_format, force_share=force_share, access=access
                    )
                )
            except UnderlayError as error:
                raise CommandError(
                    explain(error), status=_NOT_OPENED, hints=hints_of(error)
                ) from error
            except CommandError as failure:
                failure.status = _NOT_OPENED
                raise

        first = opened(names[0], format_name)
        second = opened(names[1], other_format)
        with reporting(bar=bar, progress=progress, quiet=quiet) as report:
            try:
                result = compare(first, second, strict=strict, progress=report)
            except UnderlayError as error:
                status = _FAILED.get(error.step or "", _NOT_READ)
                raise CommandError(explain(error), status=status) from error
    if not quiet:
        for line in result.lines:
            echo(line)
    return 0 if result.identical else _DIFFERENT
