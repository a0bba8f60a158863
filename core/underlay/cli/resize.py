"""``underlay resize``."""

from __future__ import annotations

from typing import Final, Unpack

import click

from underlay.cli import options
from underlay.cli.numbers import as_c_reads
from underlay.cli.output import echo, echo_json
from underlay.cli.problems import CommandError
from underlay.cli.progress import progress_options, reporting
from underlay.errors import OptionError
from underlay.jobs.resize import Resized, resize
from underlay.recognition import RAW
from underlay.storage import PreallocateMode
from underlay.units import parse_size

__all__ = ["command"]

_SECTOR: Final = 512
#: Of the layout of the JSON.
_VERSION: Final = 1


class _Command(options.Command):
    """The last word is the size, whatever it looks like: "-1M" is no option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not {"-h", "--help"} & set(args):
            if len(args) < 2:  # noqa: PLR2004 (a name and a size)
                raise click.UsageError("Not enough arguments", ctx)
            *args, ctx.meta[_SIZE] = args
        return super().parse_args(ctx, args)


_SIZE: Final = "underlay.size"


@options.command("resize", _Command)
@options.format_option("-f", "format_name", what="The image's format.")
@click.option("--preallocation", metavar="MODE", help="off (default), metadata, falloc or full.")
@click.option("--shrink", is_flag=True, help="Let bytes at the end go.")
@options.output_option
@progress_options
@click.option("-q", "quiet", is_flag=True, help="Print nothing but errors.")
@options.access_options
@options.names("FILENAME [+|-]SIZE")
@click.pass_context
def command(
    context: click.Context,
    names: tuple[str, ...],
    *,
    format_name: str | None,
    preallocation: str | None,
    shrink: bool,
    output: str,
    bar: bool,
    progress: str | None,
    quiet: bool,
    **access: Unpack[options.Access],
) -> int:
    """Make a disk SIZE bytes long (suffixes k, M, G, T, P and E), or that much longer or shorter.

    New bytes are zeroes. Bytes that are cut off are gone.
    """
    mode = PreallocateMode.OFF.value if preallocation is None else preallocation
    if mode not in {known.value for known in PreallocateMode}:
        raise CommandError(f"Invalid preallocation mode '{mode}'")
    if len(names) != 1:
        raise click.UsageError("Expecting image file name and size")
    sign, amount = _read(context.meta[_SIZE])
    with options.open_disk(
        names[0], format_name=format_name, force_share=False, access=access, writable=True
    ) as disk:
        size = disk.size + sign * amount if sign else amount
        if size <= 0:
            raise CommandError("New image size must be positive")
        if size < disk.size and mode != PreallocateMode.OFF.value:
            raise CommandError("Preallocation can only be used for growing images")
        if size < disk.size and not shrink:
            raise CommandError(
                "Use the --shrink option to perform a shrink operation.",
                "warning: Shrinking an image will delete all data beyond the shrunken image's "
                "end. Before performing such an operation, make sure there is no important data "
                "there.",
            )
        if size % _SECTOR and disk.format_name != RAW:
            raise CommandError("The new size must be a multiple of 512")
        with reporting(bar=bar, progress=progress, quiet=quiet) as report:
            done = resize(disk, size, shrink=shrink, preallocation=mode, progress=report)
    if output == "json":
        echo_json(_as_json(names[0], done))
    elif not quiet:
        echo("Image resized.")
    return 0


def _read(text: str) -> tuple[int, int]:
    """1 for more, -1 for less, 0 for as much; and the bytes."""
    sign = {"+": 1, "-": -1}.get(text[:1], 0)
    digits = text[1:] if sign else text
    options.warn_of_hexadecimal(digits)
    try:
        return sign, parse_size(as_c_reads(digits))
    except OptionError as error:
        if "must be from" in str(error):
            raise CommandError(f"Value '{digits}' is out of range for parameter 'size'") from None
        raise CommandError(
            "Parameter 'size' expects a non-negative number below 2^64",
            hints=(
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
                "and exabytes, respectively.",
            ),
        ) from None


def _as_json(name: str, done: Resized) -> dict[str, object]:
    return {
        "version": _VERSION,
        "filename": name,
        "old-size": done.before,
        "new-size": done.after,
    }
