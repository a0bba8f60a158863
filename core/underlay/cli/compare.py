"""``underlay compare``."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Unpack

import click

from underlay.cli import options
from underlay.cli.output import echo, echo_json, flush
from underlay.cli.problems import FAILED, CommandError, explain, hints_of
from underlay.cli.progress import progress_options, reporting
from underlay.errors import UnderlayError
from underlay.jobs.compare import ComparisonResult, compare
from underlay.sync import SyncFormatAccess

__all__ = ["command"]

_DIFFERENT = 1
_NOT_OPENED = 2
#: By the step of the job that failed; what else goes wrong is a failed read.
_FAILED = {"map": 3}
_NOT_READ = 4


#: Of the layout of the JSON.
_VERSION = 1


class _Command(options.Command):
    """Whatever keeps it from comparing, or from saying what came of it, ends with status 2.

    Options that are none end with 1, as with qemu-img; everything else that does means: different.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _nothing_opened():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        with _nothing_opened():
            status = super().invoke(ctx)
            flush()
            return status


@contextmanager
def _nothing_opened() -> Generator[None]:
    try:
        yield
    except CommandError as failure:
        if failure.status == FAILED:
            failure.status = _NOT_OPENED
        raise
    except UnderlayError as error:
        raise CommandError(explain(error), status=_NOT_OPENED, hints=hints_of(error)) from error


@options.command("compare", _Command)
@options.format_option("-f", "format_name", what="The first image's format.")
@options.format_option("-F", "other_format", what="The second image's format.")
@click.option("-s", "strict", is_flag=True, help="Sizes and what is allocated must be equal too.")
@options.cache_option("-T", "source_cache", honoured=True)
@options.output_option
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
    source_cache: str | None,
    output: str,
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
    if other_format is not None and options.by_image_options():
        raise CommandError("--image-opts and --format are mutually exclusive")
    access["storage_options"] = options.in_cache_mode(source_cache, access["storage_options"])
    with ExitStack() as disks:

        def opened(name: str, as_format: str | None, access: options.Access) -> SyncFormatAccess:
            try:
                return disks.enter_context(
                    options.open_disk(
                        name, format_name=as_format, force_share=force_share, access=access
                    )
                )
            except UnderlayError as error:
                raise CommandError(explain(error), hints=hints_of(error)) from error

        to_first, to_second = options.each_access(names, access)
        first = opened(names[0], format_name, to_first)
        second = opened(names[1], other_format, to_second)
        with reporting(bar=bar, progress=progress, quiet=quiet) as report:
            try:
                result = compare(first, second, strict=strict, progress=report)
            except UnderlayError as error:
                status = _FAILED.get(error.step or "", _NOT_READ)
                raise CommandError(explain(error), status=status) from error
    if output == "json":
        echo_json(_as_json(names, result, strict=strict))
    elif not quiet:
        for line in result.lines:
            echo(line)
    return 0 if result.identical else _DIFFERENT


def _as_json(names: Sequence[str], result: ComparisonResult, *, strict: bool) -> dict[str, object]:
    fields: dict[str, object] = {"version": _VERSION, "filenames": list(names), "strict": strict}
    fields |= {"identical": result.identical, "size-differs": result.size_differs}
    if result.difference is not None:
        fields["difference"] = result.difference.value
    if result.offset is not None:
        fields["offset"] = result.offset
    return fields
