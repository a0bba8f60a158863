"""The driver keeps underlay's contract, and believes nothing that an image says."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import underlay
from underlay.testing import DriverContract
from underlay_tiles import HEADER, MAGIC, pack

TWO_TILES = HEADER.pack(MAGIC, 1, 512, 1024)


class TestTiles(DriverContract):
    format_name = "tiles"

    def make(self, content: bytes, folder: Path) -> Path:
        image = folder / "image.tiles"
        image.write_bytes(pack(content))
        return image


class TestSmallTiles(TestTiles):
    def make(self, content: bytes, folder: Path) -> Path:
        image = folder / "image.tiles"
        image.write_bytes(pack(content, tile=512))
        return image


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (HEADER.pack(b"\x89TILED\r\n", 1, 4096, 8192), underlay.InvalidImageError),
        (HEADER.pack(MAGIC, 2, 4096, 8192), underlay.UnsupportedFeatureError),
        (HEADER.pack(MAGIC, 1, 5000, 8192), underlay.CorruptImageError),
        (HEADER.pack(MAGIC, 1, 256, 8192), underlay.CorruptImageError),
        (HEADER.pack(MAGIC, 1, 4096, 1 << 60), underlay.LimitExceededError),
        (HEADER.pack(MAGIC, 1, 512, 1 << 45), underlay.LimitExceededError),
        # The second tile would lie behind the end of the file.
        (
            HEADER.pack(MAGIC, 1, 512, 1024) + struct.pack("<2Q", 0, 4096),
            underlay.CorruptImageError,
        ),
        # It would lie on the header.
        (TWO_TILES + struct.pack("<2Q", 0, 8), underlay.CorruptImageError),
    ],
)
def test_what_cannot_be_true_is_refused(
    tmp_path: Path, header: bytes, error: type[underlay.UnderlayError]
) -> None:
    image = tmp_path / "image.tiles"
    image.write_bytes(header + bytes(2048))
    with pytest.raises(error):
        underlay.open_image(image, format="tiles")


def test_only_tiles_with_data_are_stored() -> None:
    assert len(pack(bytes(1 << 20))) == HEADER.size + 256 * 8
