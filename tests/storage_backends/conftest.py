"""Short ways to a file storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from underlay.storage import StorageOpenOptions
from underlay_storage.file import FileStorage

#: ``open_file(path, writable=True, …)``; closed at the end of the test.
OpenFile = Callable[..., FileStorage]


@pytest.fixture
def open_file() -> Iterator[OpenFile]:
    opened: list[FileStorage] = []

    def open_(path: Path | str, **options: object) -> FileStorage:
        chosen = {"lock": False, **options}
        storage = FileStorage.open(StorageOpenOptions(name=str(path), **chosen))  # type: ignore[arg-type]
        opened.append(storage)
        return storage

    yield open_
    for storage in opened:
        storage.close()
