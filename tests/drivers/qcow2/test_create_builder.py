"""Formatting a storage step by step, under imago's names."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import underlay
from underlay.errors import ImplicitOpenDeniedError, OptionError
from underlay.handle import StorageHandle
from underlay.storage import PreallocateMode
from underlay_drivers.qcow2 import Qcow2
from underlay_drivers.qcow2.builder import Qcow2OpenBuilder
from underlay_storage.memory import MemoryStorage


def test_it_makes_what_create_makes(tmp_path: Path) -> None:
    storage, path = MemoryStorage(b"old" * 500_000), tmp_path / "disk"
    builder = (
        Qcow2.create_builder(storage)
        .size("8M")
        .preallocate("metadata")
        .cluster_size(4096)
        .refcount_width(8)
        .option("lazy_refcounts", True)  # noqa: FBT003 (an option's value)
        .option("compat", "v3")
    )
    assert (builder.get_size(), builder.get_preallocate()) == (8 << 20, PreallocateMode.METADATA)
    builder.create_sync()
    underlay.create(
        path,
        size="8M",
        preallocation="metadata",
        cluster_size=4096,
        refcount_bits=8,
        lazy_refcounts=True,
    ).close()
    out = bytearray(storage.size())
    storage.readv((out,), 0)
    assert out == path.read_bytes()


def test_it_opens_what_it_made_on_both_faces() -> None:
    storage = MemoryStorage(b"")
    disk = Qcow2.create_builder(storage).size(1 << 20).create_open_sync()
    assert (disk.size(), disk.writable()) == (1 << 20, True)
    disk.close_sync()

    async def again() -> None:
        disk = await Qcow2.create_builder(storage).size(2 << 20).create_open()
        assert disk.size() == 2 << 20
        await disk.close()
        opened: list[object] = []

        def opener(image: StorageHandle) -> Qcow2OpenBuilder:
            opened.append(image)
            return Qcow2.builder(image)

        disk = await Qcow2.create_builder(storage).create_open(opener=opener)
        assert opened
        assert not disk.writable()
        await disk.close()

    asyncio.run(again())


def test_a_data_file_and_a_backing_image_are_recorded() -> None:
    storage, data = MemoryStorage(b""), MemoryStorage(b"old" * 1000)
    builder = Qcow2.create_builder(storage).size(100_000).data_file("data.raw", data)
    disk = builder.create_open_sync()
    with underlay.FormatAccess(disk).blocking() as access:
        assert access.read_bytes(0, 100_000) == bytes(100_000)
        access.write(b"new", 99_997)
    assert disk.implicit_external_data_file() == "data.raw"

    builder = Qcow2.create_builder(storage).size(512).backing("base", "raw")
    with pytest.raises(ImplicitOpenDeniedError):
        builder.create_open_sync()
    builder.create_sync()
    disk = Qcow2.open_image_sync(storage)
    assert (disk.implicit_backing_file(), disk.implicit_backing_format()) == ("base", "raw")
    disk.close_sync()


def test_what_is_impossible_is_refused_before_anything_is_written() -> None:
    storage = MemoryStorage(b"old")
    builder = Qcow2.create_builder(storage)
    for name, value in (("cluster_size", 3), ("compat", "v2"), ("refcount_bits", 5)):
        wrong = Qcow2.create_builder(storage).option("lazy_refcounts", name == "compat")
        with pytest.raises(OptionError):
            wrong.option(name, value).create_sync()
    with pytest.raises(OptionError, match="known: backing_file"):
        builder.option("nonsense", 1)
    with pytest.raises(OptionError, match="storage"):
        builder.option("data_file", "name")
    with pytest.raises(OptionError):
        builder.size(-1)
    assert storage.size() == 3
