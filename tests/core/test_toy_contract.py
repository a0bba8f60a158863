"""The toy format keeps the contract: its tests are tests of the core's side of it, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from underlay.testing import WritableDriverContract

from . import toy_format


@pytest.mark.usefixtures("toy")
class TestToy(WritableDriverContract):
    format_name = "toy"

    def make(self, content: bytes, folder: Path) -> Path:
        image = folder / "image.toy"
        image.write_bytes(toy_format.pack(content))
        return image


class TestCompressedToy(TestToy):
    def make(self, content: bytes, folder: Path) -> Path:
        image = folder / "image.toy"
        image.write_bytes(toy_format.pack(content, compressed=True))
        return image


class TestToyChain(TestToy):
    """Even clusters in the overlay, the rest in a backing image that is longer."""

    stands_alone = False

    def make(self, content: bytes, folder: Path) -> Path:
        top, below = bytearray(content), bytearray(content)
        for at in range(0, len(content), 8192):
            top[at : at + 4096] = bytes(len(top[at : at + 4096]))
            below[at + 4096 : at + 8192] = b"x" * len(below[at + 4096 : at + 8192])
        for at in range(4096, len(content), 8192):
            if not any(content[at : at + 4096]):
                below[at : at + 4096] = bytes(len(below[at : at + 4096]))
        (folder / "base.toy").write_bytes(toy_format.pack(bytes(below) + b"longer" * 9000))
        image = folder / "image.toy"
        image.write_bytes(toy_format.pack(bytes(top), backing="base.toy"))
        return image
