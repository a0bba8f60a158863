"""What only objects in memory do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress

import pytest

from underlay.errors import (
    ImageInUseError,
    OptionError,
    ReadOnlyError,
    StorageError,
    StorageExistsError,
    StorageNotFoundError,
)
from underlay.storage import Extent, PreallocateMode, StorageCreateOptions, StorageOpenOptions
from underlay_storage.memory import MemoryStorage

KIB = 1 << 10
_numbers = itertools.count()


@pytest.fixture
def name() -> Iterator[str]:
    """One that is free, and free again afterwards."""
    name = f"memory:tests/{next(_numbers)}"
    yield name
    with suppress(StorageNotFoundError):
        MemoryStorage.remove(name)


def create(name: str, **options: object) -> MemoryStorage:
    return MemoryStorage.create_open(StorageCreateOptions(name=name, **options))  # type: ignore[arg-type]


def open_(name: str, **options: object) -> MemoryStorage:
    return MemoryStorage.open(StorageOpenOptions(name=name, **options))  # type: ignore[arg-type]


def read(storage: MemoryStorage, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    storage.readv((buffer,), offset)
    return bytes(buffer)


def test_it_holds_what_it_was_given() -> None:
    assert read(MemoryStorage(b"abc"), 0, 4) == b"abc\0"
    assert MemoryStorage(5).size() == 5
    assert not MemoryStorage(b"abc", writable=False).writable()
    with pytest.raises(ReadOnlyError):
        MemoryStorage(b"abc", writable=False).discard(0, 1)
    with pytest.raises(ValueError, match="negative"):
        MemoryStorage(-1)


def test_a_name_is_shared_until_it_is_removed(name: str) -> None:
    with pytest.raises(StorageNotFoundError):
        open_(name)
    first = create(name, size=3)
    first.writev((b"abc",), 0)
    first.close()
    one, other = open_(name), open_(name)
    assert one.identity() == other.identity()
    assert read(other, 0, 3) == b"abc"
    MemoryStorage.remove(name)
    with pytest.raises(StorageNotFoundError):
        open_(name)
    with pytest.raises(StorageNotFoundError):
        MemoryStorage.remove(name)
    assert read(one, 0, 3) == b"abc"


def test_without_a_name_each_is_its_own() -> None:
    assert create("memory:").identity() != create("memory:").identity()
    with pytest.raises(StorageNotFoundError):
        open_("memory:")


def test_creating_overwrites_only_when_told_and_not_what_is_in_use(name: str) -> None:
    holder = create(name, size=3)
    with pytest.raises(StorageExistsError):
        create(name)
    with pytest.raises(ImageInUseError):
        create(name, overwrite=True)
    assert holder.size() == 3
    holder.close()
    again = create(name, overwrite=True)
    assert again.size() == 0
    again.close()


def test_users_are_kept_apart_as_with_files(name: str) -> None:
    create(name).close()
    reader, other = open_(name), open_(name)
    assert reader.describe() == {"locked": True}
    with pytest.raises(ImageInUseError):
        open_(name, writable=True)
    open_(name, writable=True, lock=False).close()
    reader.close()
    reader.close()
    with pytest.raises(ImageInUseError):
        open_(name, writable=True)
    other.close()
    writer = open_(name, writable=True)
    with pytest.raises(ImageInUseError, match="lock=False"):
        open_(name)
    writer.close()
    open_(name).close()


def test_abandoning_removes_what_was_made_and_nothing_else(name: str) -> None:
    for stays in (False, True):
        if stays:
            create(name).close()
        storage = create(name, overwrite=True)
        storage.abandon()
        storage.close()
        if stays:
            open_(name).close()
        else:
            with pytest.raises(StorageNotFoundError):
                open_(name)


def test_relative_names_are_siblings() -> None:
    storage = create("memory:a/b/overlay")
    assert storage.resolve_relative("base") == "memory:a/b/base"
    assert storage.resolve_relative("../base") == "memory:a/base"
    assert storage.resolve_relative("memory:other") == "memory:other"
    storage.close()
    MemoryStorage.remove("a/b/overlay")
    assert MemoryStorage().resolve_relative("base") == "memory:base"


def test_only_what_was_written_takes_room() -> None:
    storage = MemoryStorage(1 << 60)
    storage.writev((b"x" * 10,), 1 << 59)
    assert storage.extent_at(0) == Extent(length=1 << 59, is_data=False)
    assert storage.extent_at(1 << 59) == Extent(length=64 * KIB, is_data=True)
    rest = (1 << 59) + 64 * KIB
    assert storage.extent_at(rest) == Extent(length=(1 << 60) - rest, is_data=False)
    storage.write_zeroes(0, 1 << 60)
    assert storage.extent_at(5) == Extent(length=(1 << 60) - 5, is_data=False)


def test_zeroing_frees_whole_blocks_unless_they_shall_stay() -> None:
    storage = MemoryStorage(b"x" * (256 * KIB))
    storage.write_zeroes(60 * KIB, 100 * KIB)
    assert storage.extent_at(64 * KIB) == Extent(length=64 * KIB, is_data=False)
    storage.write_zeroes(0, 256 * KIB, allocate=True)
    assert storage.extent_at(0) == Extent(length=256 * KIB, is_data=True)
    assert read(storage, 0, 256 * KIB) == bytes(256 * KIB)


def test_preallocation_takes_the_room_at_once() -> None:
    for mode in PreallocateMode:
        storage = create("memory:", size=100_000, preallocation=mode)
        reserved = mode in {PreallocateMode.FALLOC, PreallocateMode.FULL}
        assert storage.extent_at(0) == Extent(length=100_000, is_data=reserved)


def test_bad_options_are_typed_errors(name: str) -> None:
    with pytest.raises(OptionError):
        create(name, size=-1)
    with pytest.raises(OptionError):
        create(name, options={"direct": True})
    with pytest.raises(StorageError):
        open_(name)
