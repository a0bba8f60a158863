"""One image file that QEMU and we change in turn, and what it must hold by the word of both."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

import underlay
from underlay import SyncFormatAccess
from underlay_drivers.qcow2.header import Header

__all__ = ["LAYOUTS", "Ends", "backable", "pattern"]

#: Layouts that must all behave alike: what they are created with.
LAYOUTS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v2": {"compat": "v2"},
    "subclusters": {"extended_l2": True},
    "512-byte clusters": {"cluster_size": 512},
    "data file": {"data_file": "data.raw"},
    "raw data file": {"data_file": "data.raw", "data_file_raw": True},
    "data file with subclusters": {"data_file": "data.raw", "extended_l2": True},
}

#: What QEMU calls the values that ours are given as.
_THEIR_NAMES = {"True": "on", "False": "off", "v2": "0.10", "v3": "1.1"}


def backable(layouts: Mapping[str, object]) -> list[Any]:
    """Each layout with a backing image and without; a raw data file has none."""
    return [
        pytest.param(layout, backed, id=f"{layout}, backed" if backed else layout)
        for layout in layouts
        for backed in (False, True)
        if not (backed and "raw" in layout)
    ]


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes that do not compress, none of them zero."""
    return random.Random(seed).randbytes(length).replace(b"\0", b"\1")


@attrs.define
class Ends:
    """An image, the model of its disk, and both ends."""

    folder: Path
    qemu_img: Callable[..., str]
    qemu_io: Callable[..., str]
    path: Path = attrs.field(init=False)
    model: bytearray = attrs.field(factory=bytearray)
    data_file: Path | None = None

    def __attrs_post_init__(self) -> None:
        self.path = self.folder / "disk.qcow2"

    # -- coming to be

    def create(
        self, size: int = 1 << 20, *, theirs: bool = False, below: bytes = b"", **options: Any
    ) -> None:
        """Make the image, here or by QEMU; ``below`` is what its raw backing image holds."""
        self.model = bytearray(below[:size].ljust(size, b"\0"))
        if below:
            (self.folder / "base.raw").write_bytes(below)
            options |= {"backing_file": str(self.folder / "base.raw"), "backing_fmt": "raw"}
        if options.get("data_file"):
            self.data_file = self.folder / options["data_file"]
            options["data_file"] = str(self.data_file)
        if theirs:
            told = ",".join(f"{name}={_THEIR_NAMES.get(str(v), v)}" for name, v in options.items())
            given = ("-o", told) if told else ()
            self.qemu_img("create", "-q", "-f", "qcow2", *given, self.path, size)
        else:
            underlay.create(self.path, size=size, overwrite=True, **options).close()

    # -- our end

    def open(self, *, writable: bool = True, **options: Any) -> SyncFormatAccess:
        """The disk at our end, with what it names in its own folder."""
        options.setdefault("gate", underlay.DirectoryGate())
        return underlay.open_image(self.path, format="qcow2", writable=writable, **options)

    def write(self, disk: SyncFormatAccess, offset: int, data: bytes) -> None:
        """Write here, and into the model."""
        disk.write(data, offset)
        self.put(offset, data)

    def put(self, offset: int, data: bytes) -> None:
        """The disk now holds this there."""
        self.model[offset : offset + len(data)] = data

    # -- their end

    def they(self, *commands: str) -> None:
        """Let ``qemu-io`` do this."""
        options = ("-d", "unmap", *(f"-c{command}" for command in commands))
        said = self.qemu_io("-f", "qcow2", *options, self.path)
        assert "failed" not in said, said

    def they_write(self, offset: int, length: int, value: int, *flags: str) -> None:
        """Let QEMU write, and take it into the model."""
        self.they(" ".join(("write", "-q", *flags, f"-P {value}", str(offset), str(length))))
        self.put(offset, bytes([value]) * length)

    def snapshot(self, how: str, name: str) -> None:
        """``qemu-img snapshot -c|-a|-d name``."""
        self.qemu_img("snapshot", "-q", how, name, self.path)

    # -- what both say

    def agree(self) -> None:
        """Nothing is wrong or leaks, and QEMU and we read what the model holds."""
        self.qemu_img("check", "-q", "-f", "qcow2", self.path)
        # QEMU's disks end with a whole sector.
        assert self.their_bytes() == self.model[: len(self.model) // 512 * 512]
        with self.open(writable=False) as disk:
            assert disk.size == len(self.model)
            assert disk.read_bytes(0, disk.size) == self.model

    def their_bytes(self, *options: str) -> bytes:
        """The whole disk as QEMU reads it."""
        raw = self.folder / "theirs.raw"
        self.qemu_img("convert", "-O", "raw", "-f", "qcow2", *options, self.path, raw)
        return raw.read_bytes()

    def map(self) -> list[dict[str, Any]]:
        """``qemu-img map``."""
        told = self.qemu_img("map", "--output=json", "-f", "qcow2", self.path)
        return [dict(entry) for entry in json.loads(told)]

    def info(self) -> Mapping[str, Any]:
        """``qemu-img info``."""
        told: dict[str, Any] = json.loads(
            self.qemu_img("info", "--output=json", "-f", "qcow2", self.path)
        )
        return told

    def checked(self) -> Mapping[str, Any]:
        """``qemu-img check`` of an image that may have leaks but no errors."""
        try:
            told = self.qemu_img("check", "--output=json", "-f", "qcow2", self.path)
        except AssertionError as error:
            told = str(error).partition("\n")[2]
        report: dict[str, Any] = json.loads(told[: told.rindex("}") + 1])
        return report

    # -- the file

    @property
    def header(self) -> Header:
        """The header with its extensions."""
        data = self.path.read_bytes()
        return Header.unpack(data).with_extensions(data)[0]

    def word(self, offset: int) -> int:
        """A big-endian 64-bit word of the file."""
        with self.path.open("rb") as file:
            file.seek(offset)
            (value,) = struct.unpack(">Q", file.read(8))
        return int(value)

    def poke(self, offset: int, form: str, *values: int | bytes) -> None:
        """Write big-endian values into the file."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(struct.pack(">" + form, *values))

    def l2_entry(self, guest: int) -> tuple[int, int]:
        """Where the L2 entry of a guest offset lies in the file, and what it says."""
        header = self.header
        words = 2 if header.extended_l2 else 1
        shift = 2 * header.cluster_bits - (4 if words == 2 else 3)
        l2 = self.word(header.l1_table_offset + (guest >> shift) * 8) & 0x00FF_FFFF_FFFF_FE00
        index = (guest >> header.cluster_bits) % (header.cluster_size // 8 // words)
        return l2 + index * 8 * words, self.word(l2 + index * 8 * words)

    def refcount(self, host: int) -> int:
        """The count of the cluster at a host offset, of whole bytes."""
        header = self.header
        width = header.refcount_bits // 8
        block, index = divmod(host >> header.cluster_bits, header.cluster_size // width)
        at = self.word(header.refcount_table_offset + block * 8) + index * width
        return int.from_bytes(self.path.read_bytes()[at : at + width], "big")

    @property
    def blocks(self) -> int:
        """Bytes that the file takes on the host."""
        return self.path.stat().st_blocks * 512
