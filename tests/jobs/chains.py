"""Chains of images of every kind, the same for the same seed, made by QEMU."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import attrs

Tool = Callable[..., str]

_OPTIONS = (
    "",
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M",
    "extended_l2=on,cluster_size=64k",
    "extended_l2=on,cluster_size=16k",
    "refcount_bits=1",
)
_SIZES = (1 << 20, (1 << 20) + 512, (2 << 20) + 7 * 512, 3 << 20)
_LENGTHS = (512, 1024, 4096, 65536, 69632, 300 << 10, 1 << 20)


def format_of(path: Path) -> str:
    """The format of an image that was made here."""
    return path.suffix.removeprefix(".")


@attrs.define
class Chains:
    """Makes images in a folder."""

    folder: Path
    chance: random.Random
    qemu_img: Tool
    qemu_io: Tool

    def image(self, name: str, below: Path | None = None) -> Path:
        """An image with random data, zeroes and discards, over another one if it is qcow2."""
        path = self.folder / name
        size = self.chance.choice(_SIZES)
        if path.suffix == ".raw":
            self.qemu_img("create", "-q", "-f", "raw", path, size)
            self._fill(path, size)
            return path
        options = self.chance.choice(_OPTIONS)
        if below is None and "extended" not in options and self.chance.random() < 1 / 3:
            source = self.image(f"{name}.raw")
            chosen = ("-o", options) if options else ()
            self.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *chosen, source, path)
            return path
        upon = () if below is None else ("-b", below.name, "-F", format_of(below))
        chosen = ("-o", options) if options else ()
        self.qemu_img("create", "-q", "-f", "qcow2", *chosen, *upon, path, size)
        self._fill(path, size)
        return path

    def chain(self, depth: int) -> list[Path]:
        """Images upon each other, the top first: so many, and one that is raw or qcow2 below."""
        images = [self.image(self.chance.choice(("base.raw", "base.qcow2")))]
        for number in range(depth):
            images.insert(0, self.image(f"layer{number}.qcow2", images[0]))
        return images

    def _fill(self, path: Path, size: int) -> None:
        commands = ["-c", "quit"]
        for _ in range(self.chance.randrange(12)):
            offset = self.chance.randrange(0, size, 512)
            length = min(self.chance.choice(_LENGTHS), size - offset)
            what = self.chance.choice(("write -z", "write -P 0", "discard", "data", "data", "data"))
            if what == "data":
                what = f"write -P {self.chance.randrange(1, 255)}"
            commands[-2:-2] = ["-c", f"{what} {offset} {length}"]
        self.qemu_io("-f", format_of(path), *commands, path)

    def content(self, path: Path) -> bytes:
        """What QEMU reads."""
        out = self.folder / "content"
        self.qemu_img("convert", "-f", format_of(path), "-O", "raw", path, out)
        return out.read_bytes()

    def is_sound(self, path: Path) -> bool:
        """Whether QEMU finds nothing wrong, and no leak."""
        return path.suffix == ".raw" or "No errors were found" in self.qemu_img("check", path)
