"""The public class by itself, under the seed's names."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from underlay.access import FormatAccess
from underlay.errors import (
    CorruptImageError,
    ImplicitOpenDeniedError,
    OptionError,
    StorageChangedError,
    StorageNotFoundError,
)
from underlay.face import run_blocking
from underlay.gate import DirectoryGate, PermissiveImplicitOpenGate
from underlay_drivers.qcow2 import Qcow2
from underlay_storage.memory import MemoryStorage

from .conftest import Tool
from .images import Image, open_bytes, read


@pytest.fixture
def chain(tmp_path: Path, qemu_img: Tool, qemu_io: Tool) -> Path:
    """An overlay with a data file over a base; the overlay's path."""
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    qemu_io("-f", "qcow2", "-c", "write -P 0x11 0 1M", base)
    options = f"backing_file=base.qcow2,backing_fmt=qcow2,data_file={tmp_path / 'data.raw'}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, overlay)
    qemu_io("-f", "qcow2", "-c", "write -P 0x22 0 64k", overlay)
    return overlay


def check(disk: Qcow2) -> None:
    assert read(disk, 0, 65536) == b"\x22" * 65536
    assert read(disk, 65536, 65536) == b"\x11" * 65536


def test_a_builder_opens_what_the_gate_allows(chain: Path) -> None:
    builder = Qcow2.builder_path(chain)
    assert builder.get_image_path() == str(chain)
    assert not builder.get_writable()
    with pytest.raises(ImplicitOpenDeniedError):
        builder.open_sync()
    disk = builder.open_sync(DirectoryGate())
    check(disk)
    disk.close_sync()
    disk.close_sync()


def test_a_builder_takes_what_the_caller_has(chain: Path, tmp_path: Path) -> None:
    data = MemoryStorage((tmp_path / "data.raw").read_bytes())
    base = Qcow2.open_path_sync(tmp_path / "base.qcow2")
    disk = Qcow2.builder_path(chain).backing(base).data_file(data).open_sync()
    check(disk)
    disk.close_sync()
    with FormatAccess(base).blocking() as lent:
        disk = (
            Qcow2.builder(MemoryStorage(chain.read_bytes()))
            .backing(lent)
            .data_file(data)
            .open_sync()
        )
        check(disk)
        disk.close_sync()
    disk = Qcow2.builder_path(chain).backing(None).data_file(data).open_sync()
    assert read(disk, 65536, 1) == b"\0"
    disk.close_sync()


def test_a_builder_opens_a_backing_image_by_path(chain: Path, tmp_path: Path) -> None:
    other = (tmp_path / "base.qcow2").rename(tmp_path / "elsewhere")
    builder = Qcow2.builder_path(chain).backing_path(other, "qcow2")
    disk = builder.open_sync(DirectoryGate())
    check(disk)
    disk.close_sync()
    with pytest.raises(LookupError):
        Qcow2.builder_path(chain).backing_path(other, "qcow3").open_sync(DirectoryGate())


def test_a_builder_opens_in_an_event_loop(chain: Path) -> None:
    async def work() -> None:
        disk = await Qcow2.builder_path(chain).open(DirectoryGate())
        async with FormatAccess(disk) as access:
            assert await access.read_bytes(65535, 2) == b"\x22\x11"

    asyncio.run(work())


def test_options_reach_the_storage(chain: Path) -> None:
    builder = Qcow2.builder_path(chain).storage_open_options({"no-such-option": 1})
    with pytest.raises(OptionError):
        builder.open_sync()


def test_the_image_alone_opens_nothing_else(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "base.qcow2").unlink()
    (tmp_path / "data.raw").unlink()
    disk = Qcow2.open_path_sync(chain)
    assert disk.requires_external_data_file()
    assert disk.implicit_external_data_file() == str(tmp_path / "data.raw")
    assert disk.implicit_backing_file() == "base.qcow2"
    assert disk.implicit_backing_format() == "qcow2"
    assert len(disk.references()) == 2
    disk.close_sync()


def test_implicit_dependencies_are_opened_afterwards(chain: Path) -> None:
    disk = Qcow2.open_path_sync(chain)
    with pytest.raises(ImplicitOpenDeniedError):
        disk.open_implicit_dependencies_gated_sync(DirectoryGate("/nowhere"))
    disk.open_implicit_dependencies_gated_sync(PermissiveImplicitOpenGate())
    check(disk)
    disk.close_sync()
    disk = Qcow2.open_path_sync(chain)
    disk.open_implicit_dependencies_sync()
    check(disk)
    disk.close_sync()


def test_what_was_set_is_not_opened(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "base.qcow2").unlink()
    disk = Qcow2.open_path_sync(chain)
    disk.set_backing(None)
    disk.open_implicit_dependencies_sync()
    assert read(disk, 65536, 1) == b"\0"
    disk.close_sync()


def test_a_given_storage_stays_open(plain: Image) -> None:
    storage = MemoryStorage(bytes(plain.data))
    for _ in range(2):
        disk = Qcow2.open_image_sync(storage)
        assert read(disk, 0, 1) == b"\x11"
        disk.close_sync()


def test_a_failed_open_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(600))
    with pytest.raises(CorruptImageError):
        Qcow2.open_path_sync(tmp_path / "bad")
    with pytest.raises(StorageNotFoundError):
        Qcow2.open_path_sync(tmp_path / "missing")


@pytest.mark.parametrize("wrong", ["a path", 1, MemoryStorage(b"")])
def test_a_backing_image_is_a_disk(plain: Image, wrong: object) -> None:
    with open_bytes(plain.data) as disk, pytest.raises(TypeError):
        disk.set_backing(wrong)  # type: ignore[arg-type]


def test_the_image_is_read_anew_when_the_cache_is_dropped(plain: Image) -> None:
    storage = MemoryStorage(bytes(plain.data))
    disk = Qcow2.open_image_sync(storage)
    assert read(disk, 0, 1) == b"\x11"
    # Somebody else swaps two clusters, and makes the disk smaller.
    first, second = plain.word(plain.l2(0)), plain.word(plain.l2(1))
    plain.put(plain.l2(0), "QQ", second, first).put(24, "Q", 1 << 20)
    storage.writev((bytes(plain.data),), 0)
    assert read(disk, 0, 1) == b"\x11"
    run_blocking(disk.invalidate_cache())
    assert read(disk, 0, 1) == b"\x22"
    assert disk.size() == 1 << 20
    # It becomes another image altogether.
    plain.put(20, "I", 15).put(24, "Q", 1 << 20)
    storage.writev((bytes(plain.data),), 0)
    with pytest.raises(StorageChangedError):
        run_blocking(disk.invalidate_cache())
    disk.close_sync()


def test_a_disk_made_of_a_driver_closes_what_the_driver_opened(tmp_path: Path, chain: Path) -> None:
    driver = Qcow2.open_path_sync(tmp_path / "base.qcow2")
    storage = driver.collect_storage_dependencies()[0]
    with FormatAccess(driver).blocking() as disk:
        assert disk.read_bytes(0, 4)
        assert not storage.closed
    assert storage.closed
