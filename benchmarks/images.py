"""The images to work on, made by QEMU when they are first needed."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

_MIB = 1 << 20
_CLUSTER = 64 << 10


class Images:
    """Makes images in a folder, each once."""

    def __init__(self, folder: Path, *, size: int) -> None:
        self.folder = folder
        self.size = size
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where an image of this size is, or will be."""
        return self.folder / f"{self.size // _MIB}M-{name}"

    def raw(self) -> Path:
        """Two thirds text, a sixth noise that does not compress, a sixth holes, in long runs."""
        path = self.path("mixed.raw")
        if not path.exists():
            chance = random.Random(1)  # noqa: S311 - the same data every time
            text = _text(chance, 8 * _MIB)
            with _new(path).open("wb") as file:
                file.truncate(self.size)
                at = 0
                while at < self.size:
                    length = min(chance.choice((1, 2, 4, 8)) * _MIB, self.size - at)
                    kind = chance.random()
                    file.seek(at)
                    if kind < 1 / 6:
                        file.write(chance.randbytes(length))
                    elif kind < 5 / 6:
                        file.write(text[chance.randrange(_MIB) :][:length])
                    at += length
            _done(path)
        return path

    def qcow2(self, name: str, *options: str) -> Path:
        """The same as qcow2."""
        path = self.path(f"{name}.qcow2")
        if not path.exists():
            run(
                "qemu-img",
                "convert",
                "-W",
                "-m",
                "8",
                "-O",
                "qcow2",
                *options,
                self.raw(),
                _new(path),
            )
            _done(path)
        return path

    def scattered(self, folder: Path | None = None) -> Path:
        """256 MiB of data in clusters whose order on the host is not the guest's."""
        path = (folder or self.folder) / "scattered.qcow2"
        if not path.exists():
            clusters = list(range(256 * _MIB // _CLUSTER))
            random.Random(2).shuffle(clusters)  # noqa: S311
            new = _new(path)
            run("qemu-img", "create", "-q", "-f", "qcow2", new, "256M")
            writes = "".join(
                f"write -q -P {number % 255 + 1} {number * _CLUSTER} {_CLUSTER}\n"
                for number in clusters
            )
            run("qemu-io", "-f", "qcow2", new, stdin=writes + "quit\n")
            _done(path)
        return path

    def preallocated(self) -> Path:
        """1 TiB of which all tables are there, and no data."""
        path = self.folder / "1T-tables.qcow2"
        if not path.exists():
            options = ("-f", "qcow2", "-o", "preallocation=metadata")
            run("qemu-img", "create", "-q", *options, _new(path), "1T")
            _done(path)
        return path

    def small(self) -> Path:
        """16 MiB with one cluster of data."""
        path = self.folder / "small.qcow2"
        if not path.exists():
            run("qemu-img", "create", "-q", "-f", "qcow2", _new(path), "16M")
            run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", _new(path))
            _done(path)
        return path


def run(*command: str | Path, stdin: str | None = None) -> None:
    """Run a program, and fail if it does."""
    subprocess.run(
        list(map(str, command)), input=stdin, text=True, check=True, stdout=subprocess.DEVNULL
    )


def _text(chance: random.Random, length: int) -> bytes:
    words = [
        bytes(chance.choices(b"etaoinshrdlucmfw", k=chance.randint(2, 10))) for _ in range(3000)
    ]
    return b" ".join(chance.choices(words, k=length // 3))[:length]


def _new(path: Path) -> Path:
    """The name under which an image is made, so that half of one is never taken for whole."""
    return path.with_name(path.name + ".new")


def _done(path: Path) -> None:
    _new(path).rename(path)
