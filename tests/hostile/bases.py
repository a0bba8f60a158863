"""The undamaged images, each made by the real ``qemu-img`` and ``qemu-io`` once a session.

They are small, so that each use of each recipe can have a copy. All have the same guest bytes, as
far as their features let them: a cluster is "text" where nothing but its own place says what it
holds, so that bytes of another place can never pass for it.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import attrs

from .editing import Image

__all__ = ["IMAGE", "LAYOUTS", "Base", "Bases", "Layout", "text"]

#: What the image's file is called, wherever a use of it needs one.
IMAGE = "image.qcow2"
_KIB = 1 << 10
_MIB = 1 << 20


def text(offset: int, length: int) -> bytes:
    """What stands at a guest offset: words that compress about as text does."""
    chance = random.Random(offset)
    words = " ".join(f"{chance.randrange(1 << 16):x}" for _ in range(length // 2))
    return words.encode()[:length]


@attrs.frozen(kw_only=True)
class Layout:
    """How a base is made."""

    #: For ``qemu-img create -o``.
    options: str = ""
    #: The virtual disk, in bytes.
    size: int = 4 * _MIB
    #: Commands of qemu-io with an offset and a length; those that write data write text.
    writes: tuple[tuple[str, int, int], ...] = ()
    #: Further commands, each the arguments of qemu-img; "@" stands for the image.
    then: tuple[tuple[str, ...], ...] = ()
    #: Written after ``then``.
    later: tuple[tuple[str, int, int], ...] = ()
    #: A raw backing file that holds text in its first MiB.
    backed: bool = False


#: Guest clusters of 64 KiB: 0, 1 hold text, 2 is zero without a place, 3 is compressed text, 4 is
#: nowhere, 5 is zero and has a place, 32 holds text; the rest is nowhere. On the host: the header,
#: the refcount table at 0x10000, the refcount block at 0x20000, the L1 table at 0x30000, the only
#: L2 table at 0x40000, and the clusters 0 and 1 at 0x50000 and 0x60000.
_PLAIN = (
    ("write", 0, 128 * _KIB),
    ("write -z", 128 * _KIB, 64 * _KIB),
    ("write -c", 192 * _KIB, 64 * _KIB),
    ("write", 320 * _KIB, 64 * _KIB),
    ("write -z", 320 * _KIB, 64 * _KIB),
    ("write", 2 * _MIB, 64 * _KIB),
)
#: The same without what an image with a data file, or of version 2, cannot have.
_DATA_ONLY = tuple(write for write in _PLAIN if write[0] == "write")
_UNCOMPRESSED = tuple(write for write in _PLAIN if write[0] != "write -c")

LAYOUTS: dict[str, Layout] = {
    "plain": Layout(writes=_PLAIN),
    "v2": Layout(options="compat=0.10", writes=(*_DATA_ONLY, ("write -c", 192 * _KIB, 64 * _KIB))),
    # 64 entries an L2 table: each covers 32 KiB, the L1 table (32 entries) less than a cluster.
    "small-clusters": Layout(
        options="cluster_size=512",
        size=_MIB,
        writes=(
            ("write", 0, 40 * _KIB),
            ("write -z", 64 * _KIB, 8 * _KIB),
            ("write", 200 * _KIB, 3 * _KIB),
            ("write -c", 512 * _KIB, 512),
        ),
    ),
    # Clusters of 4 KiB: two L2 tables, of 2 MiB each. That of the second half comes first in the
    # file, so that damage to the first can be the file's end.
    "two-tables": Layout(
        options="cluster_size=4k",
        writes=(("write", 2 * _MIB, 64 * _KIB), ("write", 0, 64 * _KIB)),
    ),
    # Over a raw image with text in its first MiB; clusters 0 and 1 are this image's own.
    "backing": Layout(
        backed=True,
        writes=(
            ("write", 0, 128 * _KIB),
            ("write -z", 128 * _KIB, 64 * _KIB),
            ("write -c", 192 * _KIB, 64 * _KIB),
            ("write", 2 * _MIB, 64 * _KIB),
        ),
    ),
    # As small as can be: many of them make a long chain.
    "tiny-overlay": Layout(options="cluster_size=512", size=64 * _KIB, backed=True),
    "data-file": Layout(options="data_file=data.raw", writes=_UNCOMPRESSED),
    "data-file-raw": Layout(options="data_file=data.raw,data_file_raw=on", writes=_UNCOMPRESSED),
    # Subclusters of 2 KiB. Cluster 0: text in the first 8 KiB, zeroes from 16 to 20 KiB. Cluster 1:
    # text. Cluster 3: compressed.
    "extended-l2": Layout(
        options="extended_l2=on",
        writes=(
            ("write", 0, 8 * _KIB),
            ("write -z", 16 * _KIB, 4 * _KIB),
            ("write", 64 * _KIB, 64 * _KIB),
            ("write -c", 192 * _KIB, 64 * _KIB),
            ("write", 2 * _MIB, 64 * _KIB),
        ),
    ),
    # Compressed: the guest clusters 0 to 3 and 32; 1 lies right behind 0 in the file, and so on.
    "zlib": Layout(
        writes=(*(("write -c", at * 64 * _KIB, 64 * _KIB) for at in (0, 1, 2, 3, 32)),),
    ),
    "zstd": Layout(
        options="compression_type=zstd",
        writes=(*(("write -c", at * 64 * _KIB, 64 * _KIB) for at in (0, 1, 2, 3, 32)),),
    ),
    # "first" has clusters 0 and 1 in common with the disk, which has 2 for itself.
    "snapshots": Layout(
        writes=(("write", 0, 128 * _KIB),),
        then=(
            ("snapshot", "-c", "first", "@"),
            ("resize", "-q", "-f", "qcow2", "@", "6M"),
            ("snapshot", "-c", "second", "@"),
        ),
        later=(("write", 128 * _KIB, 64 * _KIB),),
    ),
    # "dirty" has something recorded, "fine" (granularity 512) too, "off" records nothing.
    "bitmaps": Layout(
        then=(
            ("bitmap", "--add", "@", "dirty"),
            ("bitmap", "--add", "-g", "512", "@", "fine"),
            ("bitmap", "--add", "--disable", "@", "off"),
        ),
        later=(("write", 0, 128 * _KIB), ("write", _MIB, 64 * _KIB)),
    ),
    "refcount-1": Layout(options="refcount_bits=1", writes=_UNCOMPRESSED),
    "refcount-64": Layout(options="refcount_bits=64", writes=_PLAIN),
    "dirty": Layout(options="lazy_refcounts=on", writes=_PLAIN),
}


@attrs.frozen(kw_only=True)
class Base:
    """An undamaged image."""

    name: str
    data: bytes
    #: The other files that belong to it, by their names, which the image holds.
    beside: Mapping[str, bytes] = attrs.field(factory=dict[str, bytes])
    #: Every guest byte, by QEMU's word.
    content: bytes

    def image(self) -> Image:
        """A copy to be damaged."""
        return Image(self.data)

    def put(self, folder: Path, data: bytes | bytearray | None = None) -> Path:
        """Write the image (or ``data`` in its place) and what belongs to it into a folder."""
        for name, content in self.beside.items():
            (folder / name).write_bytes(content)
        path = folder / IMAGE
        path.write_bytes(self.data if data is None else data)
        return path


def _run(folder: Path, tool: str, *arguments: str) -> str:
    path = shutil.which(tool)
    if path is None:
        raise FileNotFoundError(f"{tool} is not installed (Debian: apt-get install qemu-utils)")
    done = subprocess.run(
        [path, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode or "failed" in done.stdout:
        raise AssertionError(f"{tool} {arguments}: {done.stdout}{done.stderr}")
    return done.stdout


def _write(folder: Path, writes: tuple[tuple[str, int, int], ...]) -> None:
    commands: list[str] = []
    for number, (command, offset, length) in enumerate(writes):
        if command == "write -z":
            commands.append(f"-c{command} {offset} {length}")
        else:
            (folder / f"text-{number}").write_bytes(text(offset, length))
            commands.append(f"-c{command} -s text-{number} {offset} {length}")
    if commands:
        _run(folder, "qemu-io", "-f", "qcow2", *commands, IMAGE)
    for number in range(len(writes)):
        (folder / f"text-{number}").unlink(missing_ok=True)


def make(name: str, layout: Layout, folder: Path) -> Base:
    """Make a base in an empty folder."""
    create = ["create", "-q", "-f", "qcow2"]
    if layout.options:
        create += ["-o", layout.options]
    if layout.backed:
        (folder / "base.raw").write_bytes(text(-1, _MIB))
        create += ["-b", "base.raw", "-F", "raw"]
    _run(folder, "qemu-img", *create, IMAGE, str(layout.size))
    _write(folder, layout.writes)
    for command in layout.then:
        _run(folder, "qemu-img", *(IMAGE if word == "@" else word for word in command))
    _write(folder, layout.later)
    _run(folder, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", IMAGE, "content")
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Base(name=name, data=found.pop(IMAGE), content=found.pop("content"), beside=found)


class Bases:
    """The bases by name; each is made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Base] = {}

    def __getitem__(self, name: str) -> Base:
        if name not in self._made:
            folder = self._folder / name
            folder.mkdir(parents=True)
            self._made[name] = make(name, LAYOUTS[name], folder)
            shutil.rmtree(folder)
        return self._made[name]
