"""What only nothing does."""

from __future__ import annotations

import pytest

from underlay.errors import OptionError, ReadOnlyError
from underlay.storage import Extent, StorageCreateOptions, StorageOpenOptions
from underlay_storage.null import NullStorage


def test_the_url_says_how_much_of_it_there_is() -> None:
    storage = NullStorage.open(StorageOpenOptions(name="null:1000"))
    assert storage.size() == 1000
    assert storage.extent_at(10) == Extent(length=990, is_data=False)
    assert not storage.writable()
    with pytest.raises(ReadOnlyError):
        storage.writev((b"x",), 0)
    for name in ("null:", "null:1k", "null:-1", "null:²"):
        with pytest.raises(OptionError):
            NullStorage.open(StorageOpenOptions(name=name))


def test_it_forgets_everything_but_its_size() -> None:
    storage = NullStorage.create_open(StorageCreateOptions(name="null:", size=10))
    storage.writev((b"x" * 100,), 50)
    assert storage.size() == 150
    assert storage.name() == "null:150"
    buffer = bytearray(b"?" * 20)
    assert storage.try_readv((buffer,), 50) == 20
    assert buffer == bytes(20)
    storage.resize(5)
    assert storage.size() == 5
