"""What a caller may name: a path first, then a URL, or an open storage that stays the caller's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import underlay
from underlay.storage import BlockingStorage, ReadBuffers, StorageOpenOptions
from underlay_storage.file import FileStorage
from underlay_storage.memory import MemoryStorage


class _Path:
    """Any object with a path."""

    def __init__(self, path: str | bytes) -> None:
        self._path = path

    def __fspath__(self) -> str | bytes:
        return self._path


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def in_memory() -> Iterator[str]:
    with underlay.create("memory:target", format="raw", size=512) as disk:
        disk.write(b"in memory", 0)
    yield "memory:target"
    MemoryStorage.remove("target")


def _first(target: Any) -> bytes:
    with underlay.open_image(target, format="raw") as disk:
        return disk.read_bytes(0, 9)


def test_a_path_in_any_guise(in_folder: Path) -> None:
    (in_folder / "disk").write_bytes(b"in a file")
    for target in ("disk", "./disk", in_folder / "disk", _Path("disk"), _Path(b"disk")):
        assert _first(target) == b"in a file"
    assert _first((in_folder / "disk").as_uri()) == b"in a file"
    assert _first("file:disk") == b"in a file"


def test_a_registered_scheme_is_a_url(in_memory: str) -> None:
    assert _first(in_memory) == b"in memory"


def test_a_file_that_is_called_like_a_url_comes_first(in_folder: Path, in_memory: str) -> None:
    (in_folder / in_memory).write_bytes(b"in a file")
    assert _first(in_memory) == b"in a file"
    with underlay.open_image(in_memory, format="raw") as disk:
        (storage,) = disk.collect_storage_dependencies()
        assert isinstance(storage, FileStorage)
    os.unlink(in_memory)
    os.symlink("nowhere", in_memory)
    with pytest.raises(underlay.StorageNotFoundError):
        _first(in_memory)


def test_a_path_object_is_never_a_url(in_folder: Path, in_memory: str) -> None:
    for target in (Path(in_memory), _Path(in_memory), _Path(b"file:" + b"x")):
        with pytest.raises(underlay.StorageNotFoundError):
            _first(target)
    with underlay.create(Path("memory:created"), format="raw", size=9):
        pass
    assert (in_folder / "memory:created").stat().st_size == 9


def test_a_file_that_is_called_like_a_file_url_is_found(in_folder: Path) -> None:
    (in_folder / "file:x").write_bytes(b"in a file")
    (in_folder / "x").write_bytes(b"no, not me")
    for target in ("file:x", Path("file:x"), _Path("file:x"), _Path(b"file:x")):
        assert _first(target) == b"in a file"


def test_an_unknown_scheme_is_a_path(in_folder: Path) -> None:
    with pytest.raises(underlay.StorageNotFoundError):
        _first("gopher://host/disk")
    (in_folder / "C:").write_bytes(b"in a file")
    assert _first("C:") == b"in a file"


@pytest.mark.parametrize("target", [None, 5, b"bytes", ["x"], object(), MemoryStorage, Path])
def test_whatever_else_is_a_type_error(target: Any) -> None:
    for call in (underlay.open_any, underlay.probe, underlay.inspect):
        with pytest.raises(TypeError, match="path, a URL or an open storage"):
            call(target)
    with pytest.raises(TypeError):
        underlay.create(target, format="raw", size=1)


def test_a_storage_that_looks_right_but_is_none_is_a_type_error() -> None:
    class Lookalike:
        def size(self) -> int:
            return 5

        def readv(self, buffers: ReadBuffers, offset: int) -> None: ...

    with pytest.raises(TypeError):
        underlay.open_any(Lookalike())  # type: ignore[arg-type]


def test_a_given_storage_stays_open_and_is_flushed() -> None:
    class Counting(MemoryStorage):
        flushed = synced = closed = 0

        def flush(self) -> None:
            self.flushed += 1

        def sync(self) -> None:
            self.synced += 1

        def close(self) -> None:
            self.closed += 1

    storage = Counting(bytes(512))
    with underlay.open_image(storage, format="raw", writable=True) as disk:
        disk.write(b"x", 0)
    assert storage.flushed
    assert storage.synced
    assert not storage.closed
    with underlay.open_image(storage, format="raw") as disk:
        assert disk.read_bytes(0, 1) == b"x"
    with pytest.raises(underlay.OptionError):
        underlay.open_any(storage, nonsense=1)
    assert not storage.closed


def test_a_given_storage_must_be_writable_for_a_writable_disk() -> None:
    storage = MemoryStorage(bytes(512), writable=False)
    with pytest.raises(underlay.ReadOnlyError, match="read-only"):
        underlay.open_any(storage, writable=True)
    with underlay.open_any(storage) as disk:
        assert not disk.writable


def test_a_read_only_disk_leaves_a_writable_storage_alone() -> None:
    storage = MemoryStorage(bytes(512))
    with underlay.open_any(storage) as disk, pytest.raises(underlay.ReadOnlyError):
        disk.write(b"x", 0)


def test_a_storage_of_two_methods_is_enough() -> None:
    class Pattern(BlockingStorage):
        def size(self) -> int:
            return 1000

        def readv(self, buffers: ReadBuffers, offset: int) -> None:
            for buffer in buffers:
                memoryview(buffer)[:] = bytes(
                    at % 251 if at < 1000 else 0 for at in range(offset, offset + len(buffer))
                )
                offset += len(buffer)

    with underlay.open_any(Pattern()) as disk:
        assert disk.read_bytes(998, 4) == bytes([998 % 251, 999 % 251, 0, 0])
        assert [extent.length for extent in disk.extents()] == [1000]
        assert disk.info().actual_size is None


# -- options


def test_storage_options_reach_the_storage(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    for function in (underlay.open_any, underlay.probe, underlay.inspect):
        with pytest.raises(underlay.OptionError, match=r"sideways.*direct"):
            function(tmp_path / "disk", storage_options={"sideways": True})
    with pytest.raises(underlay.OptionError, match="open already"):
        underlay.open_any(MemoryStorage(), storage_options={"direct": True})


@pytest.mark.parametrize("option", ["sideways", "cluster_size", "preallocation"])
def test_an_unknown_format_option_lists_the_known_ones(tmp_path: Path, option: str) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    with pytest.raises(underlay.OptionError, match=f"'{option}'.*known: offset, size") as caught:
        underlay.open_image(tmp_path / "disk", format="raw", **{option: 1})  # type: ignore[arg-type]
    assert caught.value.option == option
    with pytest.raises(underlay.OptionError, match=f"'{option}'.*offset, size"):
        underlay.open_any(tmp_path / "disk", **{option: 1})  # type: ignore[arg-type]


def test_options_take_text_as_the_command_line_gives_it() -> None:
    storage = MemoryStorage(b"0123456789" * 1000)
    with underlay.open_image(storage, format="raw", offset="1k", size="0x10") as disk:
        assert disk.read_bytes(0, 16) == (b"0123456789" * 1000)[1024:1040]
        assert disk.size == 16
    for offset in ("much", -1, 1.5, 20_000, True):
        with pytest.raises(underlay.OptionError, match="offset"):
            underlay.open_image(storage, format="raw", offset=offset)
    with pytest.raises(underlay.OptionError):
        underlay.open_image(storage, format="raw", offset=9_000, size=1_001)


@pytest.mark.parametrize("name", [None, 5, "", "RAW"])
def test_a_format_is_a_name_that_is_known(name: object) -> None:
    with pytest.raises((TypeError, underlay.PluginError)):
        underlay.open_image(MemoryStorage(bytes(5)), format=name)  # type: ignore[arg-type]


def test_the_virtual_size_may_be_the_limit_and_no_more() -> None:
    for size, fits in ((4096, True), (4097, False)):
        limits = underlay.Limits(virtual_size=4096)
        calls = (
            partial(underlay.open_any, MemoryStorage(size), limits=limits),
            partial(underlay.create, MemoryStorage(), format="raw", size=size, limits=limits),
        )
        for call in calls:
            if fits:
                call().close()
                continue
            with pytest.raises(underlay.LimitExceededError) as caught:
                call()
            assert (caught.value.value, caught.value.allowed) == (4097, 4096)


def test_the_storage_can_be_named_again_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"in a file")
    storage = FileStorage.open(StorageOpenOptions(name=str(tmp_path / "disk"), lock=False))
    assert _first(storage.name()) == b"in a file"
    storage.close()
