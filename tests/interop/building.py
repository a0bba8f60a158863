"""Makes the images of the matrix, with QEMU's own tools."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from .recipes import (
    DISK,
    Crash,
    Extension,
    Io,
    Op,
    Patch,
    Recipe,
    Step,
    Tool,
    Truncate,
    WiderHeader,
)

__all__ = ["BuiltImage", "Done", "Kitchen", "qemu", "start"]

#: Seconds; an oracle that takes longer is no oracle.
TIMEOUT = 60


@attrs.frozen
class Done:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str


def start(program: str, *arguments: object, cwd: Path | None = None) -> Callable[[], Done]:
    """Start one of QEMU's tools; call what comes back to wait for its end, whatever that is."""
    process = subprocess.Popen(
        [program, *map(str, arguments)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def finish() -> Done:
        with process:
            try:
                stdout, stderr = process.communicate(timeout=TIMEOUT)
            except BaseException:
                process.kill()
                raise
        return Done(process.returncode, stdout, stderr)

    return finish


def qemu(program: str, *arguments: object, cwd: Path | None = None) -> Done:
    """Run one of QEMU's tools, whatever comes of it."""
    return start(program, *arguments, cwd=cwd)()


def _must(done: Done, *, status: int = 0) -> str:
    """The output of a command that must do what it was asked to."""
    # qemu-io tells of a failed write in words, and not always by its exit status.
    if done.status != status or "failed" in done.stdout + done.stderr:
        raise AssertionError(f"exit {done.status}\n{done.stdout}{done.stderr}")
    return done.stdout


@attrs.frozen(kw_only=True)
class BuiltImage:
    """An image on disk, and what QEMU says that it holds. Not to be changed."""

    recipe: Recipe
    path: Path
    #: Of every file that belongs to it, as built. A change of any byte changes these: nobody can
    #: set the last of them, the time of change, back.
    stamps: dict[Path, tuple[int, int, int]]
    _told: dict[str, Any] = attrs.field(factory=dict[str, Any], init=False)

    @property
    def folder(self) -> Path:
        """Where it lies, with its backing files."""
        return self.path.parent

    @property
    def exact_size(self) -> int:
        """The header's size in bytes, which need be no multiple of a sector."""
        with self.path.open("rb") as file:
            return int(struct.unpack_from(">Q", file.read(32), 24)[0])

    @property
    def told(self) -> dict[str, Any]:
        """What ``qemu-img info`` says of it."""
        if not self._told:
            self._told.update(json.loads(self.tell("info", "--output=json", self.path.name)))
        return self._told

    def check(self) -> dict[str, Any]:
        """What ``qemu-img check`` counts; it must find the image as its recipe says."""
        done = qemu("qemu-img", "check", "--output=json", self.path.name, cwd=self.folder)
        if done.status not in self.recipe.check:
            raise AssertionError(f"{self.recipe.name}: exit {done.status}\n{done.stdout}")
        counts: dict[str, Any] = json.loads(done.stdout)
        return counts

    def raw(self) -> Path:
        """The guest's bytes as ``qemu-img convert`` writes them."""
        return self._converted("raw")

    def snapshot_raw(self, key: str) -> Path:
        """The guest's bytes after going back to an internal snapshot (its ID or name)."""
        # ``convert -l`` would do, but for the size: it shows the present one, not the snapshot's.
        changes: list[tuple[str, ...]] = [("snapshot", "-q", "-a", key, DISK)]
        for bitmap in self.told["format-specific"]["data"].get("bitmaps", ()):
            changes.insert(0, ("bitmap", "--remove", DISK, bitmap["name"]))
        return self._converted(f"snapshot-{key.encode().hex()}", *changes)

    def tell(self, *arguments: str) -> str:
        """The output of a ``qemu-img`` that succeeds, run in the image's folder.

        There, and nowhere else: QEMU takes a data file's relative name from where it runs.
        """
        return _must(qemu("qemu-img", *arguments, cwd=self.folder))

    def _converted(self, kind: str, *changes: tuple[str, ...]) -> Path:
        """The raw file made of the image, or of a copy that some ``qemu-img`` commands changed."""
        target = self.folder / f"disk.{kind}.twin"
        if target.exists():
            return target
        size = self.exact_size
        source = self.path
        if changes or self.recipe.has_odd_size:
            source = self.folder / f"copy.{self.path.name}"
            shutil.copyfile(self.path, source)
            # QEMU drops the last, incomplete sector: let it read a whole one, and cut that.
            _patch(source, Patch(24, ">Q", size + -size % 512))
        for change in changes:
            self.tell(*(source.name if part == DISK else part for part in change))
        self.tell("convert", "-f", "qcow2", "-O", "raw", source.name, target.name)
        if source != self.path:
            source.unlink()
        if self.recipe.has_odd_size:
            with target.open("r+b") as file:
                file.truncate(size)
        return target

    def touched(self) -> list[str]:
        """Which of its files are no longer as they were built."""
        return [path.name for path, stamp in self.stamps.items() if _stamp(path) != stamp]


def _settle(path: Path) -> None:
    """Have a file written out: only then its holes and its space on the host stay what they are."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@attrs.define
class Kitchen:
    """Builds each recipe once, in a folder of its own below ``root``."""

    root: Path
    _built: dict[str, BuiltImage] = attrs.field(factory=dict[str, BuiltImage], init=False)

    def __attrs_post_init__(self) -> None:
        """Lay out what qemu-io's ``write -s`` reads."""
        # A prime length: what is written from these differs from cluster to cluster.
        length = 65_521
        for seed in range(8):
            chooser = random.Random(seed)
            (self.root / f"noise-{seed}").write_bytes(chooser.randbytes(length))
            words = [b"%05d" % chooser.randrange(100) for _ in range(64)]
            line = b" ".join(chooser.choice(words) for _ in range(length // 6 + 1))
            (self.root / f"text-{seed}").write_bytes(line[:length])

    def image(self, recipe: Recipe) -> BuiltImage:
        """The image of a recipe, made now if it is not there yet."""
        if recipe.name not in self._built:
            folder = self.root / recipe.name
            folder.mkdir()
            self._built[recipe.name] = self.build(recipe, folder)
        return self._built[recipe.name]

    @staticmethod
    def build(recipe: Recipe, folder: Path) -> BuiltImage:
        """Make an image in an empty folder next to ``noise-*`` and ``text-*``."""
        path = folder / _make(recipe, folder, name="disk")
        files = sorted(file for file in folder.iterdir() if file.is_file())
        for file in files:
            _settle(file)
        return BuiltImage(
            recipe=recipe,
            path=path,
            stamps={file: _stamp(file) for file in files},
        )


def _make(recipe: Recipe, folder: Path, *, name: str) -> str:
    """Make one image and what it needs; returns its file's name."""
    file = f"{name}.{recipe.format}"
    for other in recipe.beside:
        _make(other, folder, name=other.name)
    backing: tuple[str, ...] = ()
    if recipe.backing is not None:
        below = _make(recipe.backing, folder, name=recipe.backing.name)
        backing = ("-b", below, "-F", recipe.backing.format)
    options = [part for option in recipe.options for part in ("-o", option)]
    if recipe.copied is not None:
        source = _make(recipe.copied.source, folder, name=recipe.copied.source.name)
        arguments = (*recipe.copied.arguments, *options, source, file)
        kinds = ("-f", recipe.copied.source.format, "-O", recipe.format)
        _must(qemu("qemu-img", "convert", *kinds, *arguments, cwd=folder))
    else:
        arguments = ("-q", "-f", recipe.format, *options, *backing, file, str(recipe.size))
        _must(qemu("qemu-img", "create", *arguments, cwd=folder))
    for step in recipe.steps:
        _carry_out(step, recipe.format, file, folder)
    return file


def _carry_out(step: Step, kind: str, file: str, folder: Path) -> None:
    match step:
        case Io(ops):
            _must(_io(ops, kind, file, folder))
        case Crash(ops, flush):
            after = ("-c", "flush") if flush else ()
            _must(_io(ops, kind, file, folder, *after, "-c", "abort"), status=-6)
        case Tool(arguments):
            filled = (file if argument == DISK else argument for argument in arguments)
            _must(qemu("qemu-img", *filled, cwd=folder))
        case Patch():
            _patch(folder / file, step)
        case Extension(number, data):
            _rewrite_header(folder / file, extension=(number, data))
        case WiderHeader(fields):
            _rewrite_header(folder / file, fields=fields)
        case Truncate(size):
            with (folder / file).open("r+b") as stream:
                stream.truncate(size)


def _io(ops: tuple[Op, ...], kind: str, file: str, folder: Path, *more: str) -> Done:
    commands = [part for op in ops for part in ("-c", str(op))]
    return qemu(
        "qemu-io", "-t", "unsafe", "-d", "unmap", "-f", kind, *commands, *more, file, cwd=folder
    )


def _patch(path: Path, patch: Patch) -> None:
    with path.open("r+b") as file:
        value = patch.value
        if patch.merge:
            file.seek(patch.offset)
            value |= struct.unpack(patch.format, file.read(struct.calcsize(patch.format)))[0]
        file.seek(patch.offset)
        file.write(struct.pack(patch.format, value))


def _rewrite_header(
    path: Path, *, extension: tuple[int, bytes] | None = None, fields: bytes = b""
) -> None:
    """Lay the header's first cluster out anew, with one more extension or with further fields."""
    with path.open("r+b") as file:
        head = bytearray(file.read(4096))
        version = struct.unpack_from(">I", head, 4)[0]
        length = 72 if version == 2 else struct.unpack_from(">I", head, 100)[0]
        backing_offset, backing_size, bits = struct.unpack_from(">QII", head, 8)
        backing = bytes(head[backing_offset : backing_offset + backing_size])
        end = length
        while (header := struct.unpack_from(">II", head, end))[0] != 0:
            end += 8 + header[1] + -header[1] % 8
        area = bytes(head[length:end])
        if extension is not None:
            number, data = extension
            area += struct.pack(">II", number, len(data)) + data + bytes(-len(data) % 8)
        area += bytes(8)
        fixed = head[:length] + fields
        if fields:
            struct.pack_into(">I", fixed, 100, len(fixed))
        if backing_offset:
            struct.pack_into(">Q", fixed, 8, len(fixed) + len(area))
        new = bytes(fixed) + area + backing
        if len(new) > 1 << bits:
            raise AssertionError("the header no longer fits into its cluster")
        file.seek(0)
        file.write(new.ljust(min(len(head), 1 << bits), b"\0"))
