"""What is measured of writing: one function a row."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.images import run
from benchmarks.measuring import Result, seconds

import underlay
from underlay.capabilities import Checkable

if TYPE_CHECKING:
    from benchmarks.rows import Row, Setting

__all__ = ["WRITING"]

_BLOCK = 4096
_CLUSTER = 64 << 10
_MIB = 1 << 20
#: Of the disk that is written to again and again.
_SIZE = 256 * _MIB
_REWRITES = 50_000
_FIRST_WRITES = 8192
#: Both sides flush after so many writes.
_FLUSH_EVERY = 1024
#: Bytes of each awaited write.
_AWAITED = 8 * _MIB


def _offsets() -> list[int]:
    chance = random.Random(4)  # noqa: S311
    return [chance.randrange(_SIZE // _BLOCK) * _BLOCK for _ in range(_REWRITES)]


def _filled(setting: Setting) -> Path:
    """A disk of which every cluster holds data."""
    path = setting.images.folder / "filled.qcow2"
    if not path.exists():
        new = path.with_suffix(".new")
        run("qemu-img", "create", "-q", "-f", "qcow2", new, str(_SIZE))
        run("qemu-io", "-f", "qcow2", "-c", f"write -q -P 1 0 {_SIZE}", new)
        new.rename(path)
    return path


def _rewrite(disk: underlay.SyncFormatAccess, offsets: list[int]) -> float:
    """Microseconds for each write."""
    data, write = bytes([7]) * _BLOCK, disk.write

    def work() -> None:
        for offset in offsets:
            write(data, offset)

    return seconds(work) / len(offsets) * 1e6


def rewrite_pwrite(setting: Setting) -> Result:
    """Rewrites beside a loop of bare system calls at the same places."""
    path, offsets = _filled(setting), _offsets()
    with underlay.open_any(path, writable=True) as disk:
        disk.write(bytes(_BLOCK), 0)
        mappings = [disk.get_mapping(offset) for offset in offsets]
        places = [mapping.offset for mapping in mappings if isinstance(mapping, underlay.Data)]
        descriptor = os.open(path, os.O_RDWR)
        data, pwrite = bytes([7]) * _BLOCK, os.pwrite

        def bare() -> None:
            for place in places:
                pwrite(descriptor, data, place)

        try:
            return setting.bench.compare(
                "4 KiB random rewrites",
                lambda: _rewrite(disk, offsets),
                {"os.pwrite loop": lambda: seconds(bare) / len(places) * 1e6},
                bar=2.2,
                unit="µs",
            )
        finally:
            os.close(descriptor)


def _qemu_bench(path: Path, count: int, step: int, *options: str) -> float:
    """Microseconds for each write of ``qemu-img bench``."""
    arguments = ("-w", "-d", "1", "-c", str(count), "-s", str(_BLOCK), "-S", str(step))
    command = ("qemu-img", "bench", "-f", "qcow2", *arguments, *options)
    return seconds(lambda: run(*command, path)) / count * 1e6


def rewrite_qemu(setting: Setting) -> Result:
    """Rewrites beside QEMU's, at the same places."""
    path = _filled(setting)
    step = _MIB + 2 * _BLOCK
    offsets = [number * step % _SIZE for number in range(_REWRITES)]

    def ours() -> float:
        with underlay.open_any(path, writable=True) as disk:
            return _rewrite(disk, offsets)

    return setting.bench.compare(
        "4 KiB rewrites",
        ours,
        {"qemu-img bench -w -d 1": lambda: _qemu_bench(path, _REWRITES, step)},
        bar=0.15,
        unit="µs",
    )


def _anew(path: Path, size: int, measure: Callable[[], float]) -> float:
    """What is measured on a new, empty image."""
    path.unlink(missing_ok=True)
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
    try:
        return measure()
    finally:
        path.unlink()


def first_writes(setting: Setting) -> Result:
    """Writes each of which allocates a cluster, beside QEMU's."""
    path = setting.images.folder / "new.qcow2"
    size = _FIRST_WRITES * _CLUSTER

    def ours() -> float:
        data = bytes([7]) * _BLOCK
        with underlay.open_any(path, writable=True) as disk:

            def work() -> None:
                for number in range(_FIRST_WRITES):
                    disk.write(data, number * _CLUSTER)
                    if number % _FLUSH_EVERY == _FLUSH_EVERY - 1:
                        disk.flush()
                        disk.sync()

            return seconds(work) / _FIRST_WRITES * 1e6

    flush = f"--flush-interval={_FLUSH_EVERY}"
    return setting.bench.compare(
        "4 KiB first writes into new clusters",
        lambda: _anew(path, size, ours),
        {
            "qemu-img bench -w -d 1": lambda: _anew(
                path, size, lambda: _qemu_bench(path, _FIRST_WRITES, _CLUSTER, flush)
            )
        },
        bar=0.25,
        unit="µs",
    )


def _bare(setting: Setting, data: bytes) -> float:
    """Seconds for writing ``data`` again and again into a new bare file."""
    file = setting.images.folder / "new.raw"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def work() -> None:
        for offset in range(0, setting.images.size, len(data)):
            os.pwrite(descriptor, data, offset)

    try:
        return seconds(work)
    finally:
        os.close(descriptor)
        file.unlink()


def sequential(setting: Setting) -> Result:
    """Writes in a row into new clusters, beside the same bytes put into a bare file."""
    size = setting.images.size
    image = setting.images.folder / "new.qcow2"
    data = random.Random(5).randbytes(_MIB)  # noqa: S311

    def ours() -> float:
        with underlay.open_any(image, writable=True) as disk:

            def work() -> None:
                for offset in range(0, size, _MIB):
                    disk.write(data, offset)

            return seconds(work)

    return setting.bench.compare(
        "1 MiB writes in a row",
        lambda: _anew(image, size, ours),
        {"os.pwrite loop": lambda: _bare(setting, data)},
        bar=1 / 0.9,
    )


def sequential_async(setting: Setting) -> Result:
    """The same through the awaited face, where each write is some worker's."""
    size = setting.images.size
    image = setting.images.folder / "new.qcow2"
    data = random.Random(5).randbytes(_AWAITED)  # noqa: S311

    async def awaited() -> float:
        async with await underlay.aio.open_any(image, writable=True) as disk:
            start = asyncio.get_running_loop().time()
            for offset in range(0, size, len(data)):
                await disk.write(data, offset)
            return asyncio.get_running_loop().time() - start

    return setting.bench.compare(
        f"{_AWAITED // _MIB} MiB writes in a row, awaited",
        lambda: _anew(image, size, lambda: asyncio.run(awaited())),
        {"os.pwrite loop": lambda: _bare(setting, data)},
        bar=1 / 0.9,
    )


def check(setting: Setting) -> Result:
    """The tables of 1 TiB."""
    path = setting.images.preallocated()

    def ours() -> None:
        with underlay.open_any(path) as disk:
            found = disk.capability(Checkable).check()
            assert not found.corruptions
            assert not found.leaks

    return setting.bench.compare(
        "check 1 TiB of tables", lambda: seconds(ours), _qemu_check(path), bar=0.3
    )


def check_command(setting: Setting) -> Result:
    """The same as a command, Python's start included."""
    path = setting.images.preallocated()
    command = (sys.executable, "-m", "underlay", "check", "-q", path)
    return setting.bench.compare(
        "underlay check of 1 TiB of tables",
        lambda: seconds(lambda: run(*command)),
        _qemu_check(path),
        bar=0.3,
    )


def _qemu_check(path: Path) -> dict[str, Callable[[], float]]:
    return {"qemu-img check": lambda: seconds(lambda: run("qemu-img", "check", "-q", path))}


#: By name, in the order of the table.
WRITING: dict[str, Row] = {
    "rewrite-pwrite": rewrite_pwrite,
    "rewrite-qemu": rewrite_qemu,
    "first-writes": first_writes,
    "sequential": sequential,
    "sequential-async": sequential_async,
    "check": check,
    "command-check": check_command,
}
