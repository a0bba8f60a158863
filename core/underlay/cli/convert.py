"""``underlay convert``."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final, Unpack

import click

from underlay.capabilities import BitmapStore, CompressedWriter, offers
from underlay.cli import options
from underlay.cli.format_options import NOT_OURS, FormatOptions, show_creation_options
from underlay.cli.output import echo_json, warn
from underlay.cli.problems import CommandError, explain, hints_of, said_of_new
from underlay.cli.progress import progress_options, reporting
from underlay.cli.snapshot_choice import disk_opener
from underlay.driver import OptionSpec
from underlay.errors import (
    ImplicitOpenDeniedError,
    OutOfRangeError,
    UnderlayError,
)
from underlay.jobs.convert import convert
from underlay.jobs.salvage import Unreadable
from underlay.plugins import registry
from underlay.storage import PreallocateMode
from underlay.sync import SyncFormatAccess
from underlay.targets import named_for

__all__ = ["command"]

_SECTOR: Final = 512
_LARGEST_SPARSE_SIZE: Final = 16 << 20
_MOST_PARALLEL: Final = 16
_NO_BACKING: Final = "Could not open backing image."
#: Of the layout of the JSON.
_VERSION: Final = 1
#: The size is the sources', whatever is said.
_IGNORED: Final = {"size": OptionSpec("Virtual disk size", type="size")}


@options.command("convert")
@options.format_option("-f", "format_name", what="The format of the images to read.")
@options.format_option("-O", "output_format", what="The format of the new image (default raw).")
@click.option("-o", "creation", metavar="OPTIONS", multiple=True, help="How to create it; or help.")
@click.option("-c", "compress", is_flag=True, help="Compress it.")
@click.option(
    "--compress-level",
    "level",
    metavar="LEVEL",
    type=int,
    help="With -c: from 1, the quickest, to 9 (zlib) or 22 (zstd). By default quick and small.",
)
@click.option("-B", "backing", metavar="FILENAME", help="The image that the new one lies upon.")
@options.format_option("-F", "backing_format", what="The format of that image.")
@click.option("-n", "target_exists", is_flag=True, help="Write into an image that exists.")
@click.option("--target-is-zero", is_flag=True, help="With -n: all of it is zeroes.")
@click.option("--target-image-opts", is_flag=True, help="With -n: OUTPUT is a description.")
@click.option(
    "-S", "sparse_size", metavar="SIZE", help="Zeroes to leave out (default 4k; 0: none)."
)
@click.option("-l", "snapshot", metavar="SNAPSHOT", help="Read this internal snapshot.")
@click.option("--bitmaps", is_flag=True, help="Copy persistent dirty bitmaps too.")
@click.option("--skip-broken-bitmaps", is_flag=True, help="Of these, leave out what was not saved.")
@click.option("--salvage", is_flag=True, help="Zeroes for what cannot be read, and a warning each.")
@click.option("-m", "parallel", metavar="COUNT", help="How many threads to use, 1 to 16.")
@click.option("-r", "rate", metavar="RATE", help="How many bytes a second to write at most.")
@click.option(
    "-W", is_flag=True, expose_value=False, help="Accepted: we write in any order anyway."
)
@click.option("-C", "offload", is_flag=True, help="Let the system copy; only holes are left out.")
@options.cache_option("-t", "cache", invalid="Invalid cache option: {}", honoured=True)
@options.cache_option("-T", "source_cache", honoured=True)
@options.output_option
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
    compress: bool,
    level: int | None,
    backing: str | None,
    backing_format: str | None,
    target_exists: bool,
    target_is_zero: bool,
    target_image_opts: bool,
    sparse_size: str | None,
    snapshot: str | None,
    bitmaps: bool,
    skip_broken_bitmaps: bool,
    salvage: bool,
    parallel: str | None,
    rate: str | None,
    offload: bool,
    cache: str | None,
    source_cache: str | None,
    output: str,
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
    settings = FormatOptions.read(creation)
    if settings.help_wanted:
        return _show_options(names, output_format or "raw")
    zeroes = 4096 if sparse_size is None else _sparse_size(sparse_size)
    threads = None if parallel is None else _parallel(parallel)
    speed = None if rate is None else options.given_size(rate, what="rate limit")
    open_source = disk_opener(snapshot)
    if target_image_opts and output_format is not None:
        raise CommandError("--image-opts and --format are mutually exclusive")
    for wrong, message in (
        (skip_broken_bitmaps and not bitmaps, "Use of --skip-broken-bitmaps requires --bitmaps"),
        (offload and sparse_size is not None, "Cannot enable copy offloading when -S is used"),
        (offload and salvage, "Cannot use copy offloading in salvaging mode"),
        (offload and compress, "Cannot enable copy offloading when -c is used"),
        (
            target_image_opts and not target_exists,
            "--target-image-opts requires use of -n flag",
        ),
        (bitmaps and len(names) > 2, "Copying bitmaps only possible with single source"),  # noqa: PLR2004
        (target_exists and creation, "-o has no effect when skipping image creation"),
        (target_is_zero and not target_exists, "--target-is-zero requires use of -n flag"),
        (len(names) < 2, "Must specify image file name"),  # noqa: PLR2004 (from one to another)
        (snapshot is not None and len(names) > 2, "No support for concatenating multiple snapshot"),  # noqa: PLR2004
    ):
        if wrong:
            raise CommandError(message)
    *source_names, target_name = list(names)
    access["storage_options"] = options.in_cache_mode(source_cache, access["storage_options"])
    given = {} if target_exists else {**settings.given, **_upon(backing, backing_format)}
    below = given.get("backing_file")
    upon = () if below is None else (named_for(target_name, below),)
    told = options.each_access(source_names, access, *upon)
    with ExitStack() as disks:
        sources = [
            disks.enter_context(
                open_source(name, format_name=format_name, force_share=force_share, access=own)
            )
            for name, own in zip(source_names, told, strict=False)
        ]
        kind = output_format or "raw"
        options.known_format(kind, "Unknown file format")
        to: options.Access = {
            **access,
            "storage_options": options.in_cache_mode(cache, target_storage_options),
        }
        target, kind = _target(
            target_name, kind, to, exists=target_exists, by_options=target_image_opts
        )
        if isinstance(target, SyncFormatAccess):
            disks.enter_context(target)
        _check_target(
            kind,
            given,
            upon=bool(backing or "backing_file" in given),
            is_zero=target_is_zero,
            sources=len(sources),
        )
        if compress:
            _check_compress(kind, given)
        if bitmaps:
            _check_bitmaps(sources[0], kind, skip_broken=skip_broken_bitmaps)
        with reporting(bar=bar, progress=progress, quiet=quiet) as report:
            try:
                copied = convert(
                    sources,
                    target,
                    output_format=kind,
                    options=_values(target_name, kind, given),
                    compress=compress,
                    level=level,
                    sparse_size=zeroes,
                    target_exists=target_exists,
                    target_is_zero=target_is_zero,
                    overwrite=True,
                    over_backing=backing is not None,
                    offload=offload,
                    salvage=_warning(quiet=quiet) if salvage else None,
                    rate=speed,
                    bitmaps=bitmaps,
                    skip_broken_bitmaps=skip_broken_bitmaps,
                    parallel=threads,
                    progress=report,
                    gate=access["gate"],
                    limits=access["limits"],
                    storage_options=told[-1]["storage_options"] if upon else None,
                    target_storage_options=to["storage_options"],
                )
            except UnderlayError as error:
                raise _told(error, target_name, kind) from error
    if output == "json":
        fields: dict[str, object] = {"version": _VERSION, "sources": source_names}
        fields |= {"target": target_name, "format": kind}
        fields |= {"virtual-size": copied.size, "data-bytes": copied.data}
        echo_json(fields)
    return 0


# -- what is read


def _warning(*, quiet: bool) -> Callable[[Unreadable], None]:
    """What to do with what could not be read: one line for each sector."""
    lock = threading.Lock()

    def tell(lost: Unreadable) -> None:
        reason = os.strerror(getattr(lost.error, "errno", None) or errno.EIO)
        with lock:
            for at in range(lost.start, lost.start + lost.length, _SECTOR):
                if lost.unmapped:
                    warn(f"error while reading block status at offset {at}: {reason}")
                warn(f"error while reading offset {at}: {reason}")

    return (lambda _: None) if quiet else tell


# -- what is written


def _show_options(names: Sequence[str], output_format: str) -> int:
    options.known_format(output_format, "Unknown file format")
    return show_creation_options(output_format, for_file=len(names) > 1)


def _target(
    name: str, kind: str, access: options.Access, *, exists: bool, by_options: bool
) -> tuple[SyncFormatAccess | str, str]:
    """What to write, opened where it is described, and its format."""
    if not exists:
        options.refuse_description(name)
    if not exists or not (by_options or options.is_description(name)):
        return name, kind
    disk = options.open_disk(
        name,
        format_name=None if by_options else kind,  # -O goes before what is in "json:"
        force_share=False,
        access=access,
        writable=True,
        by_options=by_options,
    )
    return disk, disk.format_name


def _upon(backing: str | None, backing_format: str | None) -> dict[str, str]:
    named = {"backing_file": backing, "backing_fmt": backing_format}
    return {option: text for option, text in named.items() if text is not None}


def _check_target(
    kind: str, given: dict[str, str], *, upon: bool, is_zero: bool, sources: int
) -> None:
    """Refuse what cannot be created, in qemu-img's words."""
    if not upon:
        return
    if sources > 1:
        raise CommandError(
            "Having a backing file for the target makes no sense when concatenating multiple "
            "input images"
        )
    if is_zero:
        raise CommandError(
            "Cannot use --target-is-zero when the destination image has a backing file"
        )
    if "backing_file" not in given:
        return
    if "backing_file" not in registry().driver(kind).create_options:
        raise CommandError(f"Backing file not supported for file format '{kind}'")
    if "backing_fmt" not in given:
        raise CommandError("Use of backing file requires explicit backing format")


def _check_compress(kind: str, given: dict[str, str]) -> None:
    if not offers(registry().driver(kind), CompressedWriter):
        raise CommandError("Compression not supported for this file format")
    if given.get("preallocation", "off") != "off":
        raise CommandError("Compression and preallocation not supported at the same time")


def _check_bitmaps(source: SyncFormatAccess, kind: str, *, skip_broken: bool) -> None:
    if not offers(registry().driver(kind), BitmapStore):
        raise CommandError(f"Format driver '{kind}' does not support bitmaps")
    store: Any = source.capability(BitmapStore)
    if store is None:
        raise CommandError("Source lacks bitmap support")
    for bitmap in store.bitmaps():
        if not bitmap.in_use:
            continue
        if not skip_broken:
            raise CommandError(
                f"Cannot copy inconsistent bitmap '{bitmap.name}'",
                hints=(
                    "Try --skip-broken-bitmaps, or use 'underlay bitmap --remove' to delete it",
                ),
            )
        warn(f"Skipping inconsistent bitmap '{bitmap.name}'")


def _values(target: str, kind: str, given: dict[str, str]) -> dict[str, object]:
    known = registry().driver(kind).create_options
    settings = FormatOptions(given)
    values = settings.values({**known, **_IGNORED}, refused=NOT_OURS)
    values.pop("size", None)
    mode = given.get("preallocation", PreallocateMode.OFF.value)
    if mode not in {known.value for known in PreallocateMode}:
        raise CommandError(
            f"{target}: error while converting {kind}: "
            f"Parameter 'preallocation' does not accept value '{mode}'"
        )
    options.known_format(
        given.get("backing_fmt"),
        f"{target}: error while converting {kind}: Parameter 'backing-fmt' does not accept value",
    )
    if "backing_fmt" in values and "backing_file" not in values:
        raise CommandError(
            f"{target}: error while converting {kind}: "
            "Backing format cannot be used without backing file"
        )
    return values


def _told(error: UnderlayError, target: str, kind: str) -> Exception:
    """The error as qemu-img would tell it, if it was met before anything was copied."""
    if isinstance(error, OutOfRangeError):
        return CommandError("output file is smaller than input file")
    if error.step != "create" or isinstance(error, ImplicitOpenDeniedError):
        return error
    hints = hints_of(error)
    if _NO_BACKING in hints:
        return CommandError(
            f"Could not open '{target}': Could not open backing file: {explain(error)}"
        )
    why = said_of_new(error)
    return CommandError(f"{target}: error while converting {kind}: {why}", hints=hints)


# -- numbers


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
