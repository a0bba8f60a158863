"""The built-in drivers keep the contract that everybody's have to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from underlay.testing import WritableDriverContract

Tool = Callable[..., str]


class TestRaw(WritableDriverContract):
    format_name = "raw"
    has_signature = False

    def make(self, content: bytes, folder: Path) -> Path:
        image = folder / "image.raw"
        image.write_bytes(content)
        return image

    def read_by_others(self, image: Path) -> bytes:
        return image.read_bytes()


class TestPartition(WritableDriverContract):
    """A part of a raw image, which has other bytes before and behind it."""

    format_name = "raw"
    has_signature = False
    can_resize = False
    open_options: ClassVar[Mapping[str, object]] = {"offset": 12_345, "size": 400_003}

    def make(self, content: bytes, folder: Path) -> Path:
        image = folder / "image.raw"
        image.write_bytes(b"b" * 12_345 + content + b"a" * 6789)
        return image

    def read_by_others(self, image: Path) -> bytes:
        whole = image.read_bytes()
        assert whole[:12_345] == b"b" * 12_345
        assert whole[-6789:] == b"a" * 6789
        return whole[12_345:-6789]


class Qcow2(WritableDriverContract):
    """Images that the real qemu-img made, and finds nothing wrong with after we wrote to them."""

    format_name = "qcow2"
    size_unit = 512
    options: ClassVar[str] = "compat=1.1"
    flags: ClassVar[tuple[str, ...]] = ()

    @pytest.fixture(autouse=True)
    def _with_qemu_img(self, qemu_img: Tool) -> None:
        self.qemu_img = qemu_img

    def make(self, content: bytes, folder: Path) -> Path:
        plain, image = folder / "plain", folder / "image.qcow2"
        plain.write_bytes(content)
        more = ("-o", self.options, *self.flags)
        self.qemu_img("convert", "-f", "raw", "-O", "qcow2", *more, plain, image)
        plain.unlink()
        return image

    def read_by_others(self, image: Path) -> bytes:
        self.qemu_img("check", "-q", "-f", "qcow2", image)  # no errors, and no leaks
        plain = image.with_suffix(".plain")
        self.qemu_img("convert", "-f", "qcow2", "-O", "raw", image, plain)
        try:
            return plain.read_bytes()
        finally:
            plain.unlink()


class TestQcow2(Qcow2):
    pass


class TestOldQcow2(Qcow2):
    options = "compat=0.10,cluster_size=512"


class TestCompressedQcow2(Qcow2):
    flags: ClassVar[tuple[str, ...]] = ("-c",)


class TestZstdQcow2(Qcow2):
    options = "compression_type=zstd,cluster_size=16k"
    flags: ClassVar[tuple[str, ...]] = ("-c",)


class TestSubclusters(Qcow2):
    options = "extended_l2=on"


class TestDataFile(Qcow2):
    stands_alone = False
    places_are_fixed = True

    def make(self, content: bytes, folder: Path) -> Path:
        self.options = f"data_file={folder / 'data'}"  # type: ignore[misc]
        return super().make(content, folder)


class TestChain(Qcow2):
    """Half of the disk in a backing image, which is shorter."""

    stands_alone = False

    def make(self, content: bytes, folder: Path) -> Path:
        half = len(content) // 2 // 512 * 512
        base = super().make(content[:half], folder)
        base.rename(folder / "base.qcow2")
        plain, image = folder / "plain", folder / "image.qcow2"
        plain.write_bytes(content)
        backing = ("-B", folder / "base.qcow2", "-F", "qcow2")
        self.qemu_img("convert", "-f", "raw", "-O", "qcow2", *backing, plain, image)
        plain.unlink()
        return image
