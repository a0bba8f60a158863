"""A disk as a file object, for parsers that know nothing of disks."""

from __future__ import annotations

import array
import io
import os
import struct
import threading
import zipfile
from collections.abc import Iterator

import pytest

import underlay
from underlay_storage.memory import MemoryStorage

_CONTENT = bytes(range(256)) * 40 + b"odd"


@pytest.fixture
def disk() -> Iterator[underlay.SyncFormatAccess]:
    with underlay.open_image(MemoryStorage(_CONTENT), format="raw", writable=True) as disk:
        yield disk


def test_it_says_what_it_is(disk: underlay.SyncFormatAccess) -> None:
    file = disk.as_file()
    assert isinstance(file, io.BufferedIOBase)
    assert file.readable()
    assert file.writable()
    assert file.seekable()
    assert not file.isatty()
    assert file.mode == "rb+"
    assert file.name == "<memory>"
    with pytest.raises(OSError, match="fileno"):
        file.fileno()
    with underlay.open_image(MemoryStorage(b"x"), format="raw") as read_only:
        assert read_only.as_file().mode == "rb"
        assert not read_only.as_file().writable()


def test_reading_stops_at_the_end(disk: underlay.SyncFormatAccess) -> None:
    file = disk.as_file()
    assert file.read(10) == _CONTENT[:10]
    assert file.tell() == 10
    assert file.read1(5) == _CONTENT[10:15]
    assert file.read() == _CONTENT[15:]
    assert file.read() == file.read(5) == file.read1() == b""
    assert file.seek(-3, os.SEEK_END) == len(_CONTENT) - 3
    assert file.read(100) == b"odd"
    assert file.seek(10_000_000) == 10_000_000
    assert file.read(1) == b""
    assert file.readinto(bytearray(5)) == 0
    assert file.seek(0) == 0
    assert file.seek(7, os.SEEK_CUR) == 7
    assert file.read(0) == b""
    assert file.read(None) == _CONTENT[7:]


def test_it_reads_into_any_buffer(disk: underlay.SyncFormatAccess) -> None:
    file = disk.as_file()
    numbers = array.array("I", bytes(400))
    assert file.readinto(numbers) == 400
    assert numbers.tobytes() == _CONTENT[:400]
    grid = memoryview(bytearray(600)).cast("B", (20, 30))
    assert file.readinto1(grid) == 600
    assert grid.tobytes() == _CONTENT[400:1000]
    file.seek(-2, os.SEEK_END)
    buffer = bytearray(b"?" * 6)
    assert file.readinto(buffer) == 2
    assert buffer == b"dd????"
    assert file.readinto(bytearray()) == 0
    with pytest.raises(TypeError, match="read-only"):
        file.readinto(b"constant")


def test_parsers_can_use_it(disk: underlay.SyncFormatAccess) -> None:
    with disk.as_file() as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hello", b"world" * 100)
    with disk.as_file() as file, io.BufferedReader(file, 64) as reader:
        assert reader.peek(2)[:2] == b"PK"
        assert struct.unpack("<4sH", reader.read(6)) == (b"PK\3\4", 20)
    whole = disk.read_bytes(0, disk.size)
    end = whole.rindex(b"PK\5\6") + 22
    with disk.slice(0, end).as_file() as file, zipfile.ZipFile(file) as archive:
        assert archive.read("hello") == b"world" * 100


def test_lines_and_text() -> None:
    with underlay.open_image(MemoryStorage(b"one\ntwo\nthree"), format="raw") as disk:
        assert list(disk.as_file()) == [b"one\n", b"two\n", b"three"]
        assert io.TextIOWrapper(disk.as_file()).readlines() == ["one\n", "two\n", "three"]


def test_writing_never_grows_the_disk(disk: underlay.SyncFormatAccess) -> None:
    file = disk.as_file()
    file.seek(100)
    assert file.write(array.array("H", [1, 2, 3])) == 6
    assert file.tell() == 106
    assert disk.read_bytes(100, 6) == array.array("H", [1, 2, 3]).tobytes()
    file.seek(-2, os.SEEK_END)
    with pytest.raises(underlay.OutOfRangeError):
        file.write(b"xxx")
    assert file.tell() == len(_CONTENT) - 2
    assert file.truncate(len(_CONTENT)) == len(_CONTENT)
    with pytest.raises(ValueError, match="size"):
        file.truncate(10)
    assert disk.size == len(_CONTENT)
    with underlay.open_image(MemoryStorage(b"x"), format="raw") as read_only:
        with pytest.raises(underlay.ReadOnlyError):
            read_only.as_file().write(b"y")
        read_only.as_file().flush()


def test_misuse_is_as_with_any_file(disk: underlay.SyncFormatAccess) -> None:
    file = disk.as_file()
    with pytest.raises(ValueError, match="before the start"):
        file.seek(-1)
    with pytest.raises(ValueError, match="whence"):
        file.seek(0, 5)
    with pytest.raises(TypeError):
        file.seek(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        file.write("text")


def test_closing_it_leaves_the_disk_open(disk: underlay.SyncFormatAccess) -> None:
    first, second = disk.as_file(), disk.as_file()
    first.seek(5)
    assert second.tell() == 0
    first.close()
    first.close()
    for call in (first.read, first.tell, first.flush, lambda: first.seek(0)):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert second.read(3) == _CONTENT[:3]
    disk.close()
    with pytest.raises(underlay.ClosedError):
        second.read(1)
    second.close()
    with pytest.raises(underlay.ClosedError):
        disk.as_file()


def test_threads_share_a_position() -> None:
    content = os.urandom(200_000)
    with underlay.open_image(MemoryStorage(content), format="raw") as disk:
        file, pieces = disk.as_file(), set[bytes]()

        def work() -> None:
            while piece := file.read(1000):
                pieces.add(piece)

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pieces == {content[at : at + 1000] for at in range(0, len(content), 1000)}
