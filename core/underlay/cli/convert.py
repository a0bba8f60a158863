"""``underlay convert``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Unpack

import click

from underlay.cli import options
from underlay.cli.format_options import FormatOptions, show_options
from underlay.cli.problems import CommandError
from underlay.cli.progress import progress_options, reporting
from underlay.jobs.convert import convert
from underlay.plugins import registry

__all__ = ["command"]

_SECTOR = 512
_LARGEST_SPARSE_SIZE = 16 << 20
_MOST_PARALLEL = 16


@options.command("convert")
@options.format_option("-f", "format_name", what="The format of the images to read.")
@options.format_option("-O", "output_format", what="The format of the new image (default raw).")
@click.option("-o", "creation", metavar="OPTIONS", multiple=True, help="How to create it; or help.")
@click.option("-n", "target_exists", is_flag=True, help="Write into an image that exists.")
@click.option("--target-is-zero", is_flag=True, help="With -n: all of it is zeroes.")
@click.option(
    "-S", "sparse_size", metavar="SIZE", help="Zeroes to leave out (default 4k; 0: none)."
)
@click.option("-l", "snapshot", metavar="SNAPSHOT", help="Read this internal snapshot.")
@click.option("-m", "parallel", metavar="COUNT", help="How many threads to use, 1 to 16.")
@click.option(
    "-W", is_flag=True, expose_value=False, help="Accepted: we write in any order anyway."
)
@click.option("-C", is_flag=True, expose_value=False, help="Accepted: we offload where we can.")
@options.cache_option("-t", "cache", what="cache")
@options.cache_option("-T", "source_cache")
@progress_options
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@options.force_share
@options.access_options
@options.target_storage_option
@options.names("FILENAME... OUTPUT")
def command(
    names: tuple[str, ...],
    *,
    format_name: str | None,
    output_format: str | None,
    creation: tuple[str, ...],
    target_exists: bool,
    target_is_zero: bool,
    sparse_size: str | None,
    snapshot: str | None,
    parallel: str | None,
    bar: bool,
    progress: str | None,
    quiet: bool,
    force_share: bool,
    target_storage_options: dict[str, object],
    **access: Unpack[options.Access],
) -> int:
    """Copy a disk, or several one after the other, into a new image: the last FILENAME.

    What lies under that name is replaced. A copy that fails leaves no new image behind.
    """
    output_format = output_format or "raw"
    settings = FormatOptions.read(creation)
    if settings.help_wanted:
        known = registry().driver(output_format).create_options
        return show_options(f"Supported {output_format} options:", known)
    zeroes = 4096 if sparse_size is None else _sparse_size(sparse_size)
    threads = None if parallel is None else _parallel(parallel)
    if target_is_zero and not target_exists:
        raise CommandError("--target-is-zero requires use of -n flag")
    if len(names) < 2:  # noqa: PLR2004 (from one to another)
        raise CommandError("Must specify image file name")
    with ExitStack() as disks:
        sources = [
            disks.enter_context(
                options.open_disk(
                    name,
                    format_name=format_name,
                    force_share=force_share,
                    access=access,
                    snapshot=None if snapshot is None else _snapshot(snapshot),
                )
            )
            for name in names[:-1]
        ]
        with reporting(bar=bar, progress=progress, quiet=quiet) as report:
            convert(
                sources,
                names[-1],
                output_format=output_format,
                options=settings.given,
                sparse_size=zeroes,
                target_exists=target_exists,
                overwrite=True,
                parallel=threads,
                progress=report,
                gate=access["gate"],
                limits=access["limits"],
                target_storage_options=target_storage_options,
            )
    return 0


def _sparse_size(text: str) -> int:
    size = options.given_size(text, what="buffer size for sparse output")
    if size % _SECTOR or size > _LARGEST_SPARSE_SIZE:
        raise CommandError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of "
            f"{_SECTOR} up to {_LARGEST_SPARSE_SIZE}. Select 0 to disable sparse detection (fully "
            "allocates output)."
        )
    return size


def _parallel(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_PARALLEL:
        raise CommandError(
            "Invalid number of coroutines. Allowed number of coroutines is between 1 and "
            f"{_MOST_PARALLEL}"
        )
    return int(text)


def _snapshot(text: str) -> str:
    """The ID or name in ``-l``, which may stand behind ``snapshot.id=`` or ``snapshot.name=``."""
    for prefix in ("snapshot.id=", "snapshot.name="):
        if text.startswith(prefix):
            return text.removeprefix(prefix)
    return text
