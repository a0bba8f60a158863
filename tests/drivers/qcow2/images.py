"""Images in memory for the tests of the qcow2 driver: opened, read, and listed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from underlay.driver import FormatOpenOptions
from underlay.face import run_blocking
from underlay.handle import StorageHandle
from underlay.mapping import ShallowMapping
from underlay.reading import Reader
from underlay_drivers.qcow2 import Qcow2
from underlay_storage.memory import MemoryStorage

from ...hostile.editing import Image

__all__ = ["Image", "mappings", "open_bytes", "read"]


@contextmanager
def open_bytes(data: bytes | bytearray, **options: Any) -> Generator[Qcow2]:
    """The driver on these bytes, which it must leave as they are."""
    storage = MemoryStorage(bytes(data))
    handle = StorageHandle(storage, owned=True)
    try:
        disk = run_blocking(Qcow2.open(FormatOpenOptions(storage=handle, **options)))
        try:
            yield disk
        finally:
            run_blocking(disk.close())
    finally:
        after = bytearray(storage.size())
        storage.readv((after,), 0)
        run_blocking(handle.close())
        assert after == data


def read(disk: Qcow2, offset: int, length: int) -> bytes:
    """Guest bytes, through the core."""
    out = bytearray(length)
    run_blocking(Reader(disk).readv((memoryview(out),) if length else (), offset))
    return bytes(out)


def mappings(
    disk: Qcow2, offset: int = 0, length: int | None = None
) -> list[tuple[int, ShallowMapping]]:
    """What ``iter_mappings`` gives, with the guest offset of each."""

    async def collect() -> list[tuple[int, ShallowMapping]]:
        found: list[tuple[int, ShallowMapping]] = []
        at = offset
        async for mapping in disk.iter_mappings(offset, length or disk.size()):
            found.append((at, mapping))
            at += mapping.length
        return found

    return run_blocking(collect())
