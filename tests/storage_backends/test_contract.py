"""The storage contract, kept by every storage that underlay brings along, and by both rungs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import pytest

from underlay.errors import UnsupportedOperationError
from underlay.storage import AnyStorage, StorageCreateOptions, StorageOpenOptions
from underlay.testing import AlignedStorage, AwaitableMemoryStorage, StorageContract
from underlay_storage.file import FileStorage
from underlay_storage.memory import MemoryStorage
from underlay_storage.null import NullStorage


class TestFile(StorageContract):
    options: ClassVar[dict[str, object]] = {}

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.made = 0

    def make(self, content: bytes) -> AnyStorage:
        self.made += 1
        path = self.folder / f"{self.made}.raw"
        path.write_bytes(content)
        return self._open(str(path), writable=True)

    def reopen(self, storage: AnyStorage) -> AnyStorage:
        return self._open(storage.name(), writable=False)

    def stored(self, storage: AnyStorage) -> bytes:
        return Path(storage.name()).read_bytes()

    def _open(self, name: str, *, writable: bool) -> FileStorage:
        return FileStorage.open(
            StorageOpenOptions(name=name, writable=writable, lock=False, options=self.options)
        )


class TestDirectFile(TestFile):
    options: ClassVar[dict[str, object]] = {"direct": True}

    @pytest.fixture(autouse=True)
    def _needs_direct(self, _files: None) -> None:
        (self.folder / "x").write_bytes(b"x")
        try:
            self._open(str(self.folder / "x"), writable=False).close()
        except UnsupportedOperationError:
            pytest.skip("this filesystem has no direct I/O")


class TestCreatedFile(TestFile):
    """Files that this storage made, on the way that images are created."""

    def make(self, content: bytes) -> AnyStorage:
        self.made += 1
        path = str(self.folder / f"{self.made}.raw")
        storage = FileStorage.create_open(
            StorageCreateOptions(name=path, size=len(content), lock=False)
        )
        if content:
            storage.writev((content,), 0)
        return storage


class TestMemory(StorageContract):
    made = 0

    def make(self, content: bytes) -> AnyStorage:
        TestMemory.made += 1
        storage = MemoryStorage.create_open(
            StorageCreateOptions(name=f"memory:contract/{os.getpid()}/{self.made}", lock=False)
        )
        if content:
            storage.writev((content,), 0)
        return storage

    def reopen(self, storage: AnyStorage) -> AnyStorage:
        return MemoryStorage.open(StorageOpenOptions(name=storage.name(), lock=False))

    def stored(self, storage: AnyStorage) -> bytes:
        with_another = self.reopen(storage)
        assert isinstance(with_another, MemoryStorage)
        content = bytearray(with_another.size())
        if content:
            with_another.readv((content,), 0)
        return bytes(content)


class TestBlocksOfMemory(StorageContract):
    """Padding and read-modify-write, whatever the filesystem of this machine wants."""

    def make(self, content: bytes) -> AnyStorage:
        return AlignedStorage(MemoryStorage(content), request=512, memory=1024)


class TestNull(StorageContract):
    keeps_data = False

    def make(self, content: bytes) -> AnyStorage:
        return NullStorage(len(content))

    def reopen(self, storage: AnyStorage) -> AnyStorage:
        return NullStorage.open(StorageOpenOptions(name=storage.name()))


class TestCoroutineStorage(StorageContract):
    async def make(self, content: bytes) -> AnyStorage:
        return AwaitableMemoryStorage(content)

    async def reopen(self, storage: AnyStorage) -> AnyStorage:
        assert isinstance(storage, AwaitableMemoryStorage)
        return storage.another_handle()
