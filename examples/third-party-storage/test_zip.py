"""The storage keeps underlay's contract, and reads images where they lie."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

import underlay
from underlay.storage import AnyStorage, StorageOpenOptions
from underlay.testing import StorageContract
from underlay_zip import ZipMember


class TestStored(StorageContract):
    can_write = False
    can_resize = False
    compression = zipfile.ZIP_STORED

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make(self, content: bytes) -> AnyStorage:
        path = self.folder / "archive.zip"
        with zipfile.ZipFile(path, "w", self.compression) as archive:
            archive.writestr("disk.img", content)
        return ZipMember.open(StorageOpenOptions(name=f"zip:{path}!disk.img"))


class TestDeflated(TestStored):
    compression = zipfile.ZIP_DEFLATED


def test_an_archive_that_is_damaged_is_an_error_of_underlay(tmp_path: Path) -> None:
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("disk.img", bytes(4096))
    damaged = bytearray(path.read_bytes())
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    with (
        underlay.open_image(f"zip:{path}!disk.img", format="raw") as disk,
        pytest.raises(underlay.StorageError),
    ):
        disk.read_bytes(0, 4096)


def test_it_is_read_only(tmp_path: Path) -> None:
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("disk.img", bytes(4096))
    with pytest.raises(underlay.UnderlayError):
        underlay.open_image(f"zip:{path}!disk.img", format="raw", writable=True)
