"""``underlay bitmap``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Unpack

import click

from underlay.capabilities import Bitmap
from underlay.cli import options
from underlay.cli.output import echo, echo_json, human_size, json_text, printable
from underlay.cli.problems import CommandError, explain
from underlay.cli.progress import progress_options, reporting
from underlay.errors import UnderlayError
from underlay.jobs.bitmap import (
    DirtyRange,
    add_bitmap,
    bitmaps,
    clear_bitmap,
    dirty_ranges,
    disable_bitmap,
    enable_bitmap,
    merge_bitmap,
    remove_bitmap,
)
from underlay.jobs.opened import opened_alone
from underlay.jobs.progress import Progress, ProgressCallback
from underlay.sync import SyncFormatAccess

__all__ = ["command"]

#: Of our JSON; raised when a field changes its meaning or goes away.
_SCHEMA = 1
_ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")
_ORDER = "underlay.bitmap.order"


class _InOrder(options.Command):
    """A command that remembers the order of its flags, repeated ones included."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(self._in_full(args))
        ctx.meta[_ORDER] = [one.name for one in given if one.name in _ACTIONS]
        return super().parse_args(ctx, args)


@options.command("bitmap", cls=_InOrder)
@click.option("--add", is_flag=True, help="Add the bitmap, with nothing dirty.")
@click.option("--remove", is_flag=True, help="Remove it.")
@click.option("--clear", is_flag=True, help="Let it say that nothing is dirty.")
@click.option("--enable", is_flag=True, help="Let it record guest writes.")
@click.option("--disable", is_flag=True, help="Let it record guest writes no longer.")
@click.option(
    "--merge", metavar="SOURCE", multiple=True, help="Let it also say what bitmap SOURCE says."
)
@click.option("-b", "source_file", metavar="FILENAME", help="With --merge: the image of SOURCE.")
@options.format_option("-F", "source_format", what="The format of the -b image.")
@click.option(
    "-g", "--granularity", metavar="SIZE", help="With --add: how many bytes one bit stands for."
)
@options.format_option("-f", "format_name", what="The image's format.")
@click.option("--list", "listing", is_flag=True, help="List the image's bitmaps.")
@click.option("--dirty", is_flag=True, help="List the ranges that the bitmap calls dirty.")
@options.output_option
@progress_options
@options.access_options
@options.names("FILENAME BITMAP")
@click.pass_context
def command(
    context: click.Context,
    names: tuple[str, ...],
    *,
    merge: tuple[str, ...],
    source_file: str | None,
    source_format: str | None,
    granularity: str | None,
    format_name: str | None,
    listing: bool,
    dirty: bool,
    output: str,
    bar: bool,
    progress: str | None,
    add: bool,
    remove: bool,
    clear: bool,
    enable: bool,
    disable: bool,
    **access: Unpack[options.Access],
) -> int:
    """Change a dirty bitmap of an image, or look at it.

    Several changes in one call are made in their order. Guest data stays as it is, and nothing that
    the image names is opened. JSON has the bitmaps that there are afterwards.
    """
    del remove, clear, enable, disable
    if listing:
        return _list(options.one_name(names), format_name, output, access)
    if dirty:
        return _show_dirty(*_two_names(names), format_name, output, access)
    size = None if granularity is None else options.given_size(granularity, what="granularity")
    order: Sequence[str] = context.meta[_ORDER]
    if not order:
        raise CommandError(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
        )
    if size is not None and not add:
        raise CommandError("granularity only supported with --add")
    if source_file is not None and not merge:
        raise CommandError("Merge bitmap source file only supported with --merge")
    if source_format is not None and source_file is None:
        raise CommandError("-F only supported with -b")
    filename, name = _two_names(names)
    with ExitStack() as opened:
        disk = opened.enter_context(_open(filename, format_name, access, writable=True))
        source = None
        if source_file is not None:
            source = opened.enter_context(_open(source_file, source_format, access, writable=False))
        sources = iter(merge)
        with reporting(bar=bar, progress=progress, quiet=False) as report:
            for number, action in enumerate(order):
                part = _part(report, number, len(order))
                _carry_out(disk, name, action, sources, source, size or None, part)
        if output == "json":
            _list_as_json(filename, bitmaps(disk))
    return 0


def _open(
    filename: str, format_name: str | None, access: options.Access, *, writable: bool
) -> AbstractContextManager[SyncFormatAccess]:
    target, opening = options.named(filename, format_name, access, writable=writable)
    return opened_alone(target, writable=writable, **opening)


def _two_names(names: Sequence[str]) -> tuple[str, str]:
    if len(names) != len(("filename", "bitmap")):
        raise CommandError("Expecting filename and bitmap name")
    return names[0], names[1]


def _carry_out(
    disk: SyncFormatAccess,
    name: str,
    action: str,
    sources: Iterator[str],
    source: SyncFormatAccess | None,
    granularity: int | None,
    progress: ProgressCallback,
) -> None:
    try:
        if action == "add":
            add_bitmap(disk, name, granularity=granularity, progress=progress)
        elif action == "merge":
            merge_bitmap(disk, name, next(sources), source_image=source, progress=progress)
        elif action == "remove":
            remove_bitmap(disk, name, progress=progress)
        elif action == "clear":
            clear_bitmap(disk, name, progress=progress)
        elif action == "enable":
            enable_bitmap(disk, name)
        else:
            disable_bitmap(disk, name)
    except UnderlayError as error:
        raise CommandError(
            f"Operation {action} on bitmap {name} failed: {explain(error)}",
            hints=getattr(error, "__notes__", ()),
        ) from error


def _part(report: ProgressCallback, number: int, count: int) -> ProgressCallback:
    """What tells of one of several actions, each of which goes over the same bytes."""
    return lambda told: report(Progress(number * told.total + told.done, count * told.total))


# -- looking


def _list(filename: str, format_name: str | None, output: str, access: options.Access) -> int:
    with _open(filename, format_name, access, writable=False) as disk:
        found = bitmaps(disk)
    if output == "json":
        _list_as_json(filename, found)
    elif found:
        width = max(len("BITMAP"), *(len(printable(one.name)) for one in found))
        echo(f"{'BITMAP':<{width}}  {'GRANULARITY':<11}  FLAGS")
        for one in found:
            size = human_size(one.granularity)
            line = f"{printable(one.name):<{width}}  {size:<11}  {', '.join(_flags(one))}"
            echo(line.rstrip())
    return 0


def _list_as_json(filename: str, found: Sequence[Bitmap]) -> None:
    listed = [
        {"name": one.name, "granularity": one.granularity, "flags": _flags(one)} for one in found
    ]
    echo_json({"version": _SCHEMA, "filename": filename, "bitmaps": listed})


def _flags(bitmap: Bitmap) -> list[str]:
    """Under the names that info has for them."""
    return ["in-use"] * bitmap.in_use + ["auto"] * bitmap.auto


def _show_dirty(
    filename: str, name: str, format_name: str | None, output: str, access: options.Access
) -> int:
    with _open(filename, format_name, access, writable=False) as disk:
        ranges = dirty_ranges(disk, name)
        if output == "json":
            _print_ranges({"version": _SCHEMA, "filename": filename, "bitmap": name}, ranges)
            return 0
        for number, dirty in enumerate(ranges):
            if not number:
                echo(f"{'Offset':<16}Length")
            echo(f"{dirty.start:<#16x}{dirty.length:#x}")
    return 0


def _print_ranges(head: dict[str, object], ranges: Iterable[DirtyRange]) -> None:
    """One range a line, however many there are."""
    before = json_text(head).removesuffix("\n}") + ',\n    "ranges": ['
    for dirty in ranges:
        echo(f'{before}\n        {{"start": {dirty.start}, "length": {dirty.length}}}', end="")
        before = ","
    echo((before if before != "," else "\n    ") + "]\n}")
