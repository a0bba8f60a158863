"""``underlay bench``."""

from __future__ import annotations

from typing import Final, Unpack

import click

from underlay.cli import options
from underlay.cli.output import echo, echo_json
from underlay.cli.problems import CommandError
from underlay.cli.progress import progress_options, reporting
from underlay.errors import OutOfRangeError
from underlay.jobs.bench import bench

__all__ = ["command"]

_LARGEST: Final = (1 << 31) - 1
_AIO: Final = ("threads", "native", "io_uring")
#: Of the layout of the JSON.
_VERSION: Final = 1


def _number(what: str, most: int = _LARGEST) -> options.Reader:
    def read(_context: object, _parameter: object, value: str | None) -> int | None:
        if value is None:
            return None
        number = options.whole_number(value)
        if number is None or not 0 <= number <= most:
            raise CommandError(f"Invalid {what} specified")
        return number

    return read


def _size(what: str, most: int = _LARGEST) -> options.Reader:
    def read(_context: object, _parameter: object, value: str | None) -> int | None:
        return None if value is None else options.given_size(value, what=what, most=most)

    return read


def _aio(_context: object, _parameter: object, value: str | None) -> str | None:
    if value is not None and value not in _AIO:
        raise CommandError(f"Invalid aio option: {value}")
    return value


@options.command("bench")
@click.option("-c", "count", metavar="N", callback=_number("request count"), help="How many.")
@click.option(
    "-d", "depth", metavar="N", callback=_number("queue depth"), help="Under way at once."
)
@options.format_option("-f", "format_name", what="The image's format.")
@click.option(
    "--flush-interval",
    metavar="N",
    callback=_number("flush interval"),
    help="With -w: flush after each N requests.",
)
@click.option("-i", "aio", metavar="AIO", callback=_aio, help="Checked as qemu-img does.")
@click.option("-n", "native", is_flag=True, help="The same as -i native.")
@click.option("--no-drain", is_flag=True, help="Wait for nothing before a flush.")
@click.option(
    "-o",
    "offset",
    metavar="OFFSET",
    callback=_size("offset", (1 << 63) - 1),
    help="Where the first request begins.",
)
@click.option(
    "--pattern",
    metavar="BYTE",
    callback=_number("pattern byte", 255),
    help="What -w writes (default 0).",
)
@click.option("-q", "quiet", is_flag=True, help="Accepted as qemu-img does; has no effect.")
@click.option(
    "-s", "buffer_size", metavar="SIZE", callback=_size("buffer size"), help="Bytes of a request."
)
@click.option(
    "-S",
    "step",
    metavar="SIZE",
    callback=_size("step_size"),
    help="From one request to the next (default: the bytes of a request).",
)
@options.cache_option("-t", "cache", invalid="Invalid cache mode", honoured=True)
@click.option("-w", "write", is_flag=True, help="Write instead of reading: the data is lost.")
@options.output_option
@progress_options
@options.force_share
@options.access_options
@options.names()
def command(
    names: tuple[str, ...],
    *,
    count: int | None,
    depth: int | None,
    format_name: str | None,
    flush_interval: int | None,
    aio: str | None,
    native: bool,
    no_drain: bool,
    offset: int | None,
    pattern: int | None,
    quiet: bool,
    buffer_size: int | None,
    step: int | None,
    cache: str | None,
    write: bool,
    output: str,
    bar: bool,
    progress: str | None,
    force_share: bool,
    **access: Unpack[options.Access],
) -> int:
    """Send requests one after the other to a disk, and say how long they took."""
    name = options.one_name(names)
    count = 75_000 if count is None else count
    depth = 64 if depth is None else depth
    size = 4096 if buffer_size is None else buffer_size
    if depth < 1:
        raise CommandError("Invalid queue depth specified")
    if flush_interval and not write:
        raise CommandError("--flush-interval is only available in write tests")
    if flush_interval and flush_interval < depth:
        raise CommandError("Flush interval can't be smaller than depth")
    access["storage_options"] = options.in_cache_mode(cache, access["storage_options"])
    if "direct" not in access["storage_options"] and (native or aio == "native"):
        raise CommandError(
            f"Could not open '{name}': aio=native was specified, but it requires cache.direct=on, "
            "which was not specified."
        )
    with options.open_disk(
        name, format_name=format_name, force_share=force_share, access=access, writable=write
    ) as disk:
        if output == "human":
            echo(
                f"Sending {count} {'write' if write else 'read'} requests, {size} bytes each, "
                f"{depth} in parallel (starting at offset {offset or 0}, step size {step or size})"
            )
            if flush_interval:
                echo(f"Sending flush every {flush_interval} requests")
        with reporting(bar=bar, progress=progress, quiet=quiet) as report:
            try:
                done = bench(
                    disk,
                    count=count,
                    depth=depth,
                    buffer_size=size,
                    offset=offset or 0,
                    step=step or None,
                    write=write,
                    pattern=pattern or 0,
                    flush_interval=flush_interval or None,
                    drain=not no_drain,
                    progress=report,
                )
            except OutOfRangeError:
                raise CommandError("Failed request: Input/output error") from None
    if output == "human":
        echo(f"Run completed in {done.seconds:.3f} seconds.")
        return 0
    fields: dict[str, object] = {"version": _VERSION, "filename": name}
    fields |= {"operation": "write" if write else "read", "requests": count, "buffer-size": size}
    fields |= {"depth": depth, "offset": offset or 0, "step-size": step or size}
    fields |= {"flushes": done.flushes, "nanoseconds": round(done.seconds * 1e9)}
    echo_json(fields)
    return 0
