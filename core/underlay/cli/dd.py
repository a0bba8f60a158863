"""``underlay dd``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import click

from underlay.cli import options
from underlay.cli.output import complain, echo_json
from underlay.cli.problems import CommandError, hints_of, said_of_new
from underlay.cli.progress import progress_options, reporting
from underlay.errors import ConflictError, UnderlayError
from underlay.jobs.dd import DdResult, dd
from underlay.plugins import registry

__all__ = ["command"]

#: Of the layout of the JSON.
_VERSION = 1

_OPERANDS = ("bs", "count", "if", "of", "skip")
_LARGEST_BLOCK = (1 << 31) - 1


@options.command("dd")
@options.format_option("-f", "format_name", what="The format of the image to read.")
@click.option("-O", "output_format", metavar="FMT", default="raw", help="The new image's (raw).")
@options.output_option
@progress_options
@options.force_share
@options.access_options
@options.target_storage_option
@click.argument("operands", nargs=-1, metavar="if=FILENAME of=FILENAME [bs=N] [count=N] [skip=N]")
def command(
    operands: tuple[str, ...],
    *,
    format_name: str | None,
    output_format: str,
    output: str,
    bar: bool,
    progress: str | None,
    force_share: bool,
    target_storage_options: dict[str, object],
    **access: Unpack[options.Access],
) -> int:
    """Copy the blocks of a disk from number SKIP up to number COUNT into a new image.

    Blocks have 512 bytes unless bs says otherwise. COUNT is counted from the start of the disk, as
    qemu-img does it, and not from SKIP.
    """
    given = _operands(operands)
    block_size = 512
    if "bs" in given:
        block_size = options.given_size(given["bs"], what="bs", least=1, most=_LARGEST_BLOCK)
    count = options.given_size(given["count"], what="count") if "count" in given else None
    skip = options.given_size(given["skip"], what="skip") if "skip" in given else 0
    if "if" not in given or "of" not in given:
        raise CommandError("Must specify both input and output files")
    if output_format not in registry().format_names():
        raise CommandError("Unknown file format")
    with options.open_disk(
        given["if"], format_name=format_name, force_share=force_share, access=access
    ) as disk:
        options.refuse_description(given["of"])
        try:
            with reporting(bar=bar, progress=progress, quiet=False) as report:
                done = dd(
                    disk,
                    given["of"],
                    block_size=block_size,
                    count=count,
                    skip=skip,
                    output_format=output_format,
                    overwrite=True,
                    progress=report,
                    limits=access["limits"],
                    target_storage_options=target_storage_options,
                )
        except UnderlayError as error:
            if error.step != "create" and not isinstance(error, ConflictError):
                raise
            why = said_of_new(error)
            raise CommandError(
                f"{given['of']}: error while creating output image: {why}", hints=hints_of(error)
            ) from error
    if done.past_end:
        complain(f"{given['if']}: cannot skip to specified offset")
    if output == "json":
        echo_json(_as_json(given, output_format, done))
    return 0


def _as_json(given: Mapping[str, str], output_format: str, done: DdResult) -> dict[str, object]:
    return {
        "version": _VERSION,
        "source": given["if"],
        "target": given["of"],
        "format": output_format,
        "start": done.start,
        "length": done.length,
    }


def _operands(operands: tuple[str, ...]) -> dict[str, str]:
    given: dict[str, str] = {}
    for operand in operands:
        name, equals, value = operand.partition("=")
        if name not in _OPERANDS or not equals:
            raise CommandError(f"unrecognized operand {name}")
        given[name] = value
    return given
