"""The images that the lines of the table work on: small, made by QEMU, once a session."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import attrs

__all__ = ["POOL", "Recipe", "copy_sparse", "make_pool", "needed"]

Tool = Callable[..., str]


@attrs.frozen
class Recipe:
    """How an image is made: commands of qemu-img, of qemu-io (``io``), or bytes to overwrite."""

    steps: tuple[str, ...]
    #: Images that it is made from, or names.
    needs: tuple[str, ...] = ()
    #: Offsets, and bytes that are put there at last.
    patches: tuple[tuple[int, bytes], ...] = ()


def _recipe(*steps: str, needs: str = "", patches: tuple[tuple[int, bytes], ...] = ()) -> Recipe:
    return Recipe(steps, tuple(needs.split()), patches)


_BLOCK = 4096

_FILL = "io {name} -c 'write -P 7 64k 100k' -c 'write -P 8 2M 64k' -c 'write -z 3M 64k'"

#: By name; a recipe stands behind those that it needs.
POOL: dict[str, Recipe] = {
    "plain.qcow2": _recipe("create -f qcow2 {name} 4M", _FILL),
    "other.qcow2": _recipe("create -f qcow2 {name} 4M", _FILL, "io {name} -c 'write -P 9 1M 1k'"),
    "longer.qcow2": _recipe("create -f qcow2 {name} 6M", _FILL),
    "empty.qcow2": _recipe("create -f qcow2 {name} 4M"),
    "nothing.qcow2": _recipe("create -f qcow2 {name} 0"),
    "old.qcow2": _recipe("create -f qcow2 -o compat=0.10 {name} 4M", _FILL),
    "small.qcow2": _recipe(
        "create -f qcow2 -o cluster_size=512,refcount_bits=1 {name} 1M",
        "io {name} -c 'write -P 3 1k 5k'",
    ),
    "extended.qcow2": _recipe(
        "create -f qcow2 -o extended_l2=on,cluster_size=128k {name} 4M",
        "io {name} -c 'write -P 5 4k 8k' -c 'write -z 64k 8k' -c 'write -P 6 1M 256k'",
    ),
    "full.qcow2": _recipe("create -f qcow2 -o preallocation=metadata {name} 4M"),
    "lazy.qcow2": _recipe("create -f qcow2 -o lazy_refcounts=on {name} 4M", _FILL),
    "plain.raw": _recipe("create -f raw {name} 4M", _FILL),
    "odd.raw": _recipe(
        "create -f raw {name} 1M",
        "io {name} -c 'write -P 1 0 4k'",
        patches=((1 << 20, bytes(range(100))),),
    ),
    "zeroes.raw": _recipe("create -f raw {name} 4M"),
    "nothing.raw": _recipe("create -f raw {name} 0"),
    "full.raw": _recipe("create -f raw {name} 64k", "io {name} -c 'write -P 1 0 64k'"),
    "compressed.qcow2": _recipe("convert -c -O qcow2 plain.qcow2 {name}", needs="plain.qcow2"),
    "zstd.qcow2": _recipe(
        "convert -c -o compression_type=zstd -O qcow2 plain.qcow2 {name}", needs="plain.qcow2"
    ),
    "base.raw": _recipe("create -f raw {name} 2M", "io {name} -c 'write -P 1 0 512k'"),
    "middle.qcow2": _recipe(
        "create -f qcow2 -b base.raw -F raw {name} 3M",
        "io {name} -c 'write -P 2 256k 64k' -c 'write -z 1M 64k'",
        needs="base.raw",
    ),
    "top.qcow2": _recipe(
        "create -f qcow2 -b middle.qcow2 -F qcow2 {name} 4M",
        "io {name} -c 'write -P 3 0 64k'",
        needs="middle.qcow2",
    ),
    "orphan.qcow2": _recipe("create -u -f qcow2 -b gone.raw -F raw {name} 1M"),
    "snaps.qcow2": _recipe(
        "create -f qcow2 {name} 4M",
        "io {name} -c 'write -P 1 0 128k'",
        "snapshot -c first {name}",
        "io {name} -c 'write -P 2 64k 128k'",
        "snapshot -c second {name}",
        "snapshot -c 1 {name}",
        "snapshot -c 'a name' {name}",
        "io {name} -c 'write -P 3 1M 64k'",
    ),
    "outside.raw": _recipe("create -f raw {name} 2M"),
    "outside.qcow2": _recipe(
        "create -f qcow2 -o data_file=outside.raw,data_file_raw=on {name} 2M",
        "io {name} -c 'write -P 4 64k 64k'",
        needs="outside.raw",
    ),
    "bitmaps.qcow2": _recipe(
        "create -f qcow2 {name} 4M",
        "bitmap --add {name} b0",
        "bitmap --add -g 128k {name} b1",
        "bitmap --disable {name} b1",
        "io {name} -c 'write -P 1 1M 128k'",
    ),
    # The bitmap b0 says that it is in use.
    "unsaved.qcow2": _recipe(
        "create -f qcow2 {name} 4M",
        "bitmap --add {name} b0",
        "bitmap --add {name} b1",
        "io {name} -c 'write -P 1 1M 128k'",
        patches=((0xF000C, b"\0\0\0\3"),),
    ),
    # A cluster that nothing uses, and one whose reference count is too low.
    "leaky.qcow2": _recipe("create -f qcow2 {name} 4M", _FILL, patches=((0x20014, b"\0\1"),)),
    "broken.qcow2": _recipe("create -f qcow2 {name} 4M", _FILL, patches=((0x2000A, b"\0\0"),)),
    "-dash.raw": _recipe("create -f raw -- {name} 1M"),
    "com,ma.qcow2": _recipe("create -f qcow2 {name} 1M"),
    "sp ace.qcow2": _recipe("create -f qcow2 {name} 1M"),
}


def needed(text: str) -> list[str]:
    """The images that occur in a line, and those that they need."""
    names = {name for name in POOL if name in text}
    for name in reversed(POOL):
        if name in names:
            names.update(POOL[name].needs)
    return [name for name in POOL if name in names]


def make_pool(folder: Path, qemu_img: Tool, qemu_io: Tool) -> None:
    """Make them all in a folder, which is the current one."""
    for name, recipe in POOL.items():
        for step in recipe.steps:
            command, *words = shlex.split(step)
            words = [word.format(name=f"./{name}") for word in words]
            if command == "io":
                format_name = Path(name).suffix.removeprefix(".")
                qemu_io("-f", format_name, *words)
            else:
                qemu_img(command, *words)
        with open(folder / name, "r+b") as file:
            for offset, data in recipe.patches:
                file.seek(offset)
                file.write(data)
    for name in POOL:
        _settle(folder / name)


def _settle(path: Path) -> None:
    """Write a file anew, with holes where it has zeroes.

    What a filesystem tells of space that was reserved and not written changes with the time.
    """
    data = path.read_bytes()
    path.unlink()
    with open(path, "xb") as file:
        for at in range(0, len(data), _BLOCK):
            block = data[at : at + _BLOCK]
            if block.count(0) < len(block):
                file.seek(at)
                file.write(block)
        file.truncate(len(data))
        os.fsync(file.fileno())


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file with its holes."""
    with open(source, "rb") as old, open(target, "xb") as new:
        size = os.fstat(old.fileno()).st_size
        os.truncate(new.fileno(), size)
        at = 0
        while at < size:
            try:
                start = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                break
            end = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            while start < end:
                start += os.copy_file_range(old.fileno(), new.fileno(), end - start, start, start)
            at = end
