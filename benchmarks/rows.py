"""What is measured: one function a row, or a few rows that belong together."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
from benchmarks.images import Images, run
from benchmarks.measuring import Bench, Result, seconds
from benchmarks.moving import MOVING
from benchmarks.objects import OBJECTS
from benchmarks.writing import WRITING

import underlay
from underlay import jobs

__all__ = ["ROWS", "Setting"]

_BLOCK = 4096
#: The distance of QEMU's reads: another cluster each time, and another block of it.
_STRIDE = (1 << 20) + 8192
_READS = 50_000


@attrs.frozen(kw_only=True)
class Setting:
    """Where, and how often."""

    bench: Bench
    images: Images
    #: On a filesystem that can say what is in the page cache.
    disk_folder: Path


Row = Callable[[Setting], Result]


# -- reading


def _offsets() -> list[int]:
    chance = random.Random(3)  # noqa: S311
    return [chance.randrange((256 << 20) // _BLOCK) * _BLOCK for _ in range(_READS)]


def _read_all(disk: underlay.SyncFormatAccess, offsets: list[int]) -> float:
    buffer = bytearray(_BLOCK)
    read = disk.read

    def work() -> None:
        for offset in offsets:
            read(buffer, offset)

    return seconds(work) / len(offsets) * 1e6


def read_preadv(setting: Setting) -> Result:
    """Blocking reads beside a loop of bare system calls at the same places."""
    path, offsets = setting.images.scattered(), _offsets()
    with underlay.open_any(path) as disk:
        mappings = [disk.get_mapping(offset) for offset in offsets]
        places = [mapping.offset for mapping in mappings if isinstance(mapping, underlay.Data)]
        descriptor = os.open(path, os.O_RDONLY)
        buffer = bytearray(_BLOCK)
        preadv = os.preadv

        def bare() -> None:
            for place in places:
                preadv(descriptor, (buffer,), place)

        try:
            return setting.bench.compare(
                "4 KiB random reads",
                lambda: _read_all(disk, offsets),
                {"os.preadv loop": lambda: seconds(bare) / len(places) * 1e6},
                bar=2.0,
                unit="µs",
            )
        finally:
            os.close(descriptor)


def read_qemu(setting: Setting) -> Result:
    """Blocking reads beside QEMU's."""
    path = setting.images.scattered()
    options = ["-c", str(_READS), "-d", "1", "-s", str(_BLOCK), "-S", str(_STRIDE), "-f", "qcow2"]
    offsets = [number * _STRIDE % (256 << 20) for number in range(_READS)]
    with underlay.open_any(path) as disk:
        return setting.bench.compare(
            "4 KiB reads of scattered clusters",
            lambda: _read_all(disk, offsets),
            {
                "qemu-img bench -d 1": lambda: (
                    seconds(lambda: run("qemu-img", "bench", *options, path)) / _READS * 1e6
                )
            },
            bar=0.15,
            unit="µs",
        )


def read_async(setting: Setting) -> Result:
    """Awaited reads beside blocking ones, on a disk's filesystem."""
    path, offsets = setting.images.scattered(setting.disk_folder), _offsets()

    async def awaited() -> float:
        buffer = bytearray(_BLOCK)
        async with await underlay.aio.open_any(path) as disk:
            read = disk.read
            await read(buffer, 0)
            start = asyncio.get_running_loop().time()
            for offset in offsets:
                await read(buffer, offset)
            return (asyncio.get_running_loop().time() - start) / len(offsets) * 1e6

    try:
        with underlay.open_any(path) as disk:
            return setting.bench.compare(
                "4 KiB random reads, awaited",
                lambda: asyncio.run(awaited()),
                {"our blocking face": lambda: _read_all(disk, offsets)},
                bar=1.5,
                unit="µs",
            )
    finally:
        path.unlink()


# -- whole images


def _fresh(target: Path, work: Callable[[], object]) -> float:
    """The time for what makes ``target`` anew."""
    target.unlink(missing_ok=True)
    try:
        return seconds(work)
    finally:
        target.unlink(missing_ok=True)


def _convert(name: str, *options: str, bar: float, command: bool = False) -> Row:
    def row(setting: Setting) -> Result:
        source = setting.images.qcow2(name, *options)
        target = setting.images.path("out.raw")
        qemu = ("qemu-img", "convert", "-O", "raw")
        ours = (sys.executable, "-m", "underlay", "convert", "-O", "raw", source, target)
        return setting.bench.compare(
            f"{name} qcow2 to raw" + (", command" if command else ""),
            lambda: _fresh(target, lambda: run(*ours) if command else jobs.convert(source, target)),
            {
                "qemu-img convert": lambda: _fresh(target, lambda: run(*qemu, source, target)),
                "qemu-img convert -W -m 8": lambda: _fresh(
                    target, lambda: run(*qemu, "-W", "-m", "8", source, target)
                ),
            },
            bar=bar,
        )

    return row


def _encode(
    *options: str,
    bar: float,
    most: float | None = None,
    default_only: bool = False,
    command: bool = True,
) -> Row:
    """From raw to qcow2; with ``most`` its size as a part of QEMU's is held to."""

    def row(setting: Setting) -> Result:
        source = setting.images.raw()
        target = setting.images.path("out.qcow2")
        arguments = ("convert", "-O", "qcow2", *options)
        ours: tuple[str | Path, ...] = ("-m", "underlay", *arguments, source, target)
        sizes: dict[str, int] = {}

        def convert(who: str, work: Callable[[], object]) -> float:
            target.unlink(missing_ok=True)
            taken = seconds(work)
            sizes[who] = target.stat().st_size
            target.unlink()
            return taken

        def with_qemu(*more: str) -> float:
            return convert("qemu", lambda: run("qemu-img", *arguments, *more, source, target))

        def with_ours() -> None:
            if command:
                run(sys.executable, *ours)
            else:
                jobs.convert(source, target, output_format="qcow2")

        peers = {
            "qemu-img convert": with_qemu,
            "qemu-img convert -W -m 8": lambda: with_qemu("-W", "-m", "8"),
        }
        if default_only:
            del peers["qemu-img convert -W -m 8"]
        kind = " ".join(options) or "plain"
        result = setting.bench.compare(
            f"raw to qcow2, {kind}" + (", command" if command else ""),
            lambda: convert("", with_ours),
            peers,
            bar=bar,
        )
        if most is not None:
            assert sizes[""] <= sizes["qemu"] * most, sizes
        return result

    return row


def compare(setting: Setting) -> Result:
    """Two images of the same content."""
    first, second = setting.images.raw(), setting.images.qcow2("plain")

    def ours() -> None:
        with underlay.open_any(first) as one, underlay.open_any(second) as other:
            assert jobs.compare(one, other).identical

    return setting.bench.compare(
        "compare raw with qcow2",
        lambda: seconds(ours),
        {
            "qemu-img compare": lambda: seconds(
                lambda: run("qemu-img", "compare", "-f", "raw", first, second)
            )
        },
        bar=0.7,
    )


def map_tables(setting: Setting) -> Result:
    """The tables of 1 TiB."""
    path = setting.images.preallocated()
    ours = (sys.executable, "-m", "underlay", "map", "--output=json", path)
    return setting.bench.compare(
        "map 1 TiB of tables, command",
        lambda: seconds(lambda: run(*ours)),
        {"qemu-img map": lambda: seconds(lambda: run("qemu-img", "map", "--output=json", path))},
        bar=0.5,
    )


def measure_tables(setting: Setting) -> Result:
    """The same, for the sum of what is allocated."""
    path = setting.images.preallocated()
    ours = (sys.executable, "-m", "underlay", "measure", "-O", "qcow2", path)
    theirs = ("qemu-img", "measure", "-O", "qcow2", path)
    return setting.bench.compare(
        "measure 1 TiB of tables, command",
        lambda: seconds(lambda: run(*ours)),
        {"qemu-img measure": lambda: seconds(lambda: run(*theirs))},
        bar=0.5,
    )


# -- small things


_IMPORTS = (
    "import attrs, pluggy; from importlib.metadata import entry_points; "
    "list(entry_points(group='underlay'))"
)


def info(setting: Setting) -> Result:
    """The start of the command."""
    path = setting.images.small()
    ours = (sys.executable, "-m", "underlay", "info", path)
    return setting.bench.compare(
        "info, command",
        lambda: min(seconds(lambda: run(*ours)) for _ in range(3)),
        {
            "import attrs, pluggy": lambda: min(
                seconds(lambda: run(sys.executable, "-c", _IMPORTS)) for _ in range(3)
            )
        },
        bar=1.5,
    )


def open_small(setting: Setting) -> Result:
    """Opening and closing in a program that runs already."""
    path = setting.images.small()

    def ours() -> None:
        for _ in range(100):
            underlay.open_any(path).close()

    return setting.bench.compare(
        "open_any() of a small image",
        lambda: seconds(ours) / 100 * 1e3,
        {"(a millisecond)": lambda: 1.0},
        bar=1.0,
        unit="ms",
    )


_PEAK = """
import sys
from underlay import jobs
jobs.convert(sys.argv[1], sys.argv[2])
# Not getrusage(): what it tells is no less than the parent had before this program was started.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


_ENCODE_PEAK = _PEAK.replace(
    "sys.argv[2])", "sys.argv[2], output_format='qcow2', compress=True, overwrite=True)"
)


def memory_encoding(setting: Setting) -> Result:
    """The peak resident memory of a process that compresses."""
    target = setting.images.path("out.qcow2")
    source = setting.images.raw()
    return _memory(setting, "peak memory of convert -c", _ENCODE_PEAK, source, target)


def memory(setting: Setting) -> Result:
    """The peak resident memory of a process that converts."""
    target = setting.images.path("out.raw")
    source = setting.images.qcow2("zlib", "-c")
    return _memory(setting, "peak memory of convert", _PEAK, source, target)


def _memory(setting: Setting, title: str, program: str, source: Path, target: Path) -> Result:
    def peak() -> float:
        target.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", program, source, target],
            capture_output=True,
            text=True,
            check=True,
        )
        target.unlink()
        return int(done.stdout) / 1024

    return setting.bench.compare(title, peak, {"(the promise)": lambda: 160.0}, bar=1.0, unit="MiB")


_ZSTD = ("-c", "-o", "compression_type=zstd")

#: By name, in the order of the table.
ROWS: dict[str, Row] = {
    "read-preadv": read_preadv,
    "read-qemu": read_qemu,
    "read-async": read_async,
    "convert-plain": _convert("plain", bar=1.0),
    "convert-zlib": _convert("zlib", "-c", bar=0.5),
    "convert-zstd": _convert("zstd", *_ZSTD, bar=0.6),
    "command-plain": _convert("plain", bar=1.0, command=True),
    "command-zlib": _convert("zlib", "-c", bar=0.5, command=True),
    "command-zstd": _convert("zstd", *_ZSTD, bar=0.6, command=True),
    "encode-plain": _encode(bar=1.0, command=False),
    "encode-plain-command": _encode(bar=1.0),
    "encode-zlib": _encode("-c", bar=0.15, most=1.0),
    "encode-zlib-default": _encode("-c", bar=0.10, most=1.0, default_only=True),
    "encode-zstd": _encode(*_ZSTD, bar=0.45, most=1.01),
    "compare": compare,
    "map": map_tables,
    "measure": measure_tables,
    "info": info,
    "open": open_small,
    "memory": memory,
    "memory-encoding": memory_encoding,
    **WRITING,
    **MOVING,
    **OBJECTS,
}


def chosen(prefixes: list[str]) -> Iterator[tuple[str, Row]]:
    """The rows whose names begin with one of these; all if there are none."""
    for name, row in ROWS.items():
        if not prefixes or name.startswith(tuple(prefixes)):
            yield name, row
