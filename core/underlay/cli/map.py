"""``underlay map``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from typing import Unpack

import click

from underlay.cli import options
from underlay.cli.output import echo
from underlay.cli.problems import CommandError
from underlay.cli.progress import progress_options, reporting
from underlay.errors import printable, storage_error
from underlay.jobs.map import MapEntry, map_image
from underlay.jobs.picture import Picture, picture

__all__ = ["command"]

#: How many lines to write at a time.
_BATCH = 256


@options.command("map")
@options.format_option("-f", "--format", "format_name", what="The image's format.")
@options.output_option
@click.option("-s", "--start-offset", metavar="OFFSET", help="Begin there.")
@click.option("-l", "--max-length", metavar="LENGTH", help="Go on for no more than that.")
@click.option(
    "--picture",
    "drawing",
    metavar="FILE.svg|FILE.html|-",
    help="Draw it instead, into a file or, with -, in the terminal.",
)
@progress_options
@options.force_share
@options.access_options
@options.names()
def command(
    names: tuple[str, ...],
    *,
    format_name: str | None,
    output: str,
    start_offset: str | None,
    max_length: str | None,
    drawing: str | None,
    bar: bool,
    progress: str | None,
    force_share: bool,
    **access: Unpack[options.Access],
) -> int:
    """List where the bytes of a disk are, through its whole chain.

    For people only what is allocated is listed; JSON and pictures have all of the disk. A list
    tells by itself how far it is, so progress is shown of a picture only.
    """
    if drawing is not None:
        _check_drawing(drawing, output)
    start = 0 if start_offset is None else options.given_size(start_offset, what="start offset")
    length = None if max_length is None else options.given_size(max_length, what="max length")
    name = options.one_name(names)
    with options.open_disk(
        name, format_name=format_name, force_share=force_share, access=access
    ) as disk:
        if drawing is not None:
            with reporting(bar=bar, progress=progress, quiet=False) as report:
                found = picture(disk, start=start, length=length, progress=report)
            _draw(found, drawing)
            return 0
        entries = map_image(disk, start=start, length=length)
        if output == "json":
            _print_json(entries, start)
        else:
            _print_table(entries)
    return 0


#: Names of files that can be drawn end with one of these.
_SVG = (".svg",)
_HTML = (".html", ".htm")
_TERMINAL = "-"


def _check_drawing(name: str, output: str) -> None:
    if output == "json":
        raise CommandError("--picture and --output=json are mutually exclusive")
    if name != _TERMINAL and not name.lower().endswith(_SVG + _HTML):
        raise CommandError(
            f"--picture: '{printable(name)}' is neither FILE.svg nor FILE.html, nor - for the "
            "terminal"
        )


def _draw(found: Picture, name: str) -> None:
    if name == _TERMINAL:
        from underlay.cli.picture_text import picture_text

        echo(picture_text(found), end="")
        return
    drawn = [one.name for one in found.layers] + [one.name for one in found.files]
    if any(_is_same(name, other) for other in drawn):
        raise CommandError(f"--picture: '{printable(name)}' is what is to be drawn")
    text = found.svg() if name.lower().endswith(_SVG) else found.html()
    existed = os.path.lexists(name)
    try:
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        if not existed and os.path.lexists(name):
            os.unlink(name)
        raise storage_error(error, doing="write the picture", name=name) from error


def _is_same(name: str, other: str) -> bool:
    try:
        return os.path.samefile(name, other)
    except (OSError, ValueError):
        return False


def _print_table(entries: Iterable[MapEntry]) -> None:
    echo(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for entry in entries:
        if entry.data and entry.offset is None:
            raise CommandError("File contains external, encrypted or compressed clusters.")
        if entry.data and not entry.zero:
            name = printable(entry.filename or "")
            numbers = (entry.start, entry.length, entry.offset or 0)
            echo("".join(f"{_hex(number):<16}" for number in numbers) + name)


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


def _print_json(entries: Iterable[MapEntry], start: int) -> None:
    """A run a line, written while more are looked for."""
    before = "["
    lines = (_json_line(entry) for entry in entries)
    while batch := list(islice(lines, _BATCH)):
        echo(before + ",\n".join(batch), end="")
        before = ",\n"
    if before == "[":
        # An empty range is one empty run, as qemu-img has it.
        empty = MapEntry(start, 0, 0, present=False, zero=False, data=False)
        echo(before + _json_line(empty), end="")
    echo("]")


_WORDS = {True: "true", False: "false"}


def _json_line(entry: MapEntry) -> str:
    offset = "" if entry.offset is None else f', "offset": {entry.offset}'
    return (
        f'{{ "start": {entry.start}, "length": {entry.length}, "depth": {entry.depth}, '
        f'"present": {_WORDS[entry.present]}, "zero": {_WORDS[entry.zero]}, '
        f'"data": {_WORDS[entry.data]}{offset}}}'
    )
