"""Images in memory for the tests of the qcow2 driver: made by QEMU, and then damaged on purpose."""

from __future__ import annotations

import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from underlay.driver import FormatOpenOptions
from underlay.face import run_blocking
from underlay.handle import StorageHandle
from underlay.mapping import ShallowMapping
from underlay.reading import Reader
from underlay_drivers.qcow2 import Qcow2
from underlay_drivers.qcow2.header import Header
from underlay_storage.memory import MemoryStorage

__all__ = ["Image", "mappings", "open_bytes", "read"]

_OFFSET = 0x00FF_FFFF_FFFF_FE00


class Image:
    """The bytes of an image, and where its structures are."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.header = Header.unpack(bytes(data))

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls(path.read_bytes())

    def copy(self) -> Self:
        return type(self)(bytes(self.data))

    @property
    def cluster(self) -> int:
        return self.header.cluster_size

    def word(self, offset: int) -> int:
        (value,) = struct.unpack_from(">Q", self.data, offset)
        return int(value)

    def put(self, offset: int, form: str, *values: Any) -> Self:
        """Write big-endian values, making the file longer where that takes it."""
        packed = struct.pack(">" + form, *values)
        if offset + len(packed) > len(self.data):
            self.data.extend(bytes(offset + len(packed) - len(self.data)))
        self.data[offset : offset + len(packed)] = packed
        return self

    # -- places

    def l1(self, index: int = 0) -> int:
        """Where an L1 entry lies."""
        return self.header.l1_table_offset + 8 * index

    def l2(self, cluster: int, l1_index: int = 0) -> int:
        """Where the L2 entry of a guest cluster lies."""
        words = 2 if self.header.extended_l2 else 1
        return (self.word(self.l1(l1_index)) & _OFFSET) + 8 * words * cluster

    def refcount_block(self) -> int:
        """Where the first refcount block lies."""
        return self.word(self.header.refcount_table_offset)

    def add_cluster(self, content: bytes = b"") -> int:
        """A cluster at the end of the file."""
        offset = len(self.data) + -len(self.data) % self.cluster
        self.data.extend(bytes(offset - len(self.data)))
        self.data.extend(content.ljust(self.cluster, b"\0"))
        return offset

    def extensions(self, *extensions: tuple[int, bytes]) -> Self:
        """Replace the header extensions, and mark their end."""
        at = self.header.header_length
        self.data[at : self.cluster] = bytes(self.cluster - at)
        for kind, content in (*extensions, (0, b"")):
            self.put(at, "II", kind, len(content))
            self.data[at + 8 : at + 8 + len(content)] = content
            at += 8 + len(content) + -len(content) % 8
        return self


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
