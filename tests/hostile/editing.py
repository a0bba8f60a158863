"""An image in memory, to be damaged on purpose."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Self

from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Header

__all__ = ["Image"]

_OFFSET = 0x00FF_FFFF_FFFF_FE00


class Image:
    """The bytes of an image, where its structures are, and how to change them."""

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

    def set_bit(self, offset: int, bit: int) -> Self:
        """Set a bit of an eight-byte field."""
        return self.put(offset, "Q", self.word(offset) | 1 << bit)

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

    def count(self, offset: int) -> int:
        """Where the count of the host cluster at ``offset`` lies, with 16 bits a count."""
        assert self.header.refcount_bits == 16
        return self.refcount_block() + 2 * (offset // self.cluster)

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

    def name_backing(self, name: bytes, backing_format: bytes | None = b"raw") -> Self:
        """Let it name a backing file, in place of all its extensions."""
        kind = layout.EXTENSION_BACKING_FORMAT
        self.extensions(*([] if backing_format is None else [(kind, backing_format)]))
        at = self.cluster - len(name)
        self.data[at : at + len(name)] = name
        return self.put(8, "QI", at, len(name))
