r"""The tiles format: a disk cut into tiles, of which only those that hold data are stored.

All numbers are little-endian::

    offset  bytes  what
         0      8  magic, "\\x89TILES\\r\\n"
         8      4  version, 1
        12      4  tile size in bytes, a power of two from 512 on
        16      8  virtual size in bytes
        24     8n  for each tile its host offset, or 0: the tile reads as zeroes
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from underlay.driver import FormatDriverInstance, FormatOpenOptions, Location
from underlay.errors import CorruptImageError, InvalidImageError, UnsupportedFeatureError
from underlay.hookspecs import hookimpl
from underlay.mapping import Data, Eof, ShallowMapping, Zero
from underlay.probing import Match, NoMatch, ProbeVerdict, ProbeView

if TYPE_CHECKING:
    from underlay.handle import StorageHandle

__all__ = ["Tiles", "pack", "underlay_format_drivers"]

MAGIC = b"\x89TILES\r\n"
VERSION = 1
HEADER = struct.Struct("<8sIIQ")
ENTRY_BYTES = 8
MIN_TILE, MAX_TILE = 512, 1 << 24


class Tiles(FormatDriverInstance):
    """One open tiles image, read-only."""

    __slots__ = ("_offsets", "_size", "_storage", "_tile")

    format_name: ClassVar[str] = "tiles"

    def __init__(
        self, storage: StorageHandle, *, size: int, tile: int, offsets: Sequence[int]
    ) -> None:
        self._storage = storage
        self._size = size
        self._tile = tile
        self._offsets = offsets

    @classmethod
    def probe(cls, view: ProbeView) -> ProbeVerdict:
        """A magic number alone is half a signature: the version is checked too."""
        if len(view.head) < HEADER.size or not view.head.startswith(MAGIC):
            return NoMatch()
        _, version, _, _ = HEADER.unpack_from(view.head)
        return Match(f"magic {MAGIC!r}, version {version}") if version == VERSION else NoMatch()

    @classmethod
    async def open(cls, options: FormatOpenOptions) -> Self:
        """Nothing in the file is believed before it is checked."""
        storage, name = options.storage, options.storage.name()
        magic, version, tile, size = HEADER.unpack(await storage.read_bytes(0, HEADER.size))
        if magic != MAGIC:
            raise InvalidImageError(f"{name}: no tiles image, its magic number is {magic!r}")
        if version != VERSION:
            raise UnsupportedFeatureError(
                f"{name}: tiles version {version} is not known here", feature=f"version {version}"
            )
        if not MIN_TILE <= tile <= MAX_TILE or tile & (tile - 1):
            raise CorruptImageError(
                f"{name}: the tile size is {tile}", offset=12, field="tile size", value=tile
            )
        options.limits.check("virtual_size", size, what=f"{name}: the virtual size")
        table_bytes = -(-size // tile) * ENTRY_BYTES
        options.limits.check("metadata", table_bytes, what=f"{name}: the size of the tile table")

        offsets = array("Q", bytes(await storage.read_bytes(HEADER.size, table_bytes)))
        if sys.byteorder == "big":
            offsets.byteswap()
        end = storage.size()
        for number, offset in enumerate(offsets):
            length = min(tile, size - number * tile)
            if offset and not HEADER.size + table_bytes <= offset <= end - length:
                raise CorruptImageError(
                    f"{name}: tile {number} lies at {offset}, outside the file's data",
                    offset=HEADER.size + number * ENTRY_BYTES,
                    field="tile offset",
                    value=offset,
                )
        return cls(storage, size=size, tile=tile, offsets=offsets)

    def size(self) -> int:
        """The virtual size in bytes."""
        return self._size

    def collect_storage_dependencies(self) -> Sequence[StorageHandle]:
        """One file holds everything."""
        return (self._storage,)

    def locate(self, offset: int) -> Location | None:
        """The hot path of every read: four lines that make it fast, though none is needed."""
        if not 0 <= offset < self._size:
            return None
        number, skip = divmod(offset, self._tile)
        host = self._offsets[number]
        length = min(self._tile - skip, self._size - offset)
        return (self._storage, host + skip, length, False) if host else None

    async def get_mapping(self, offset: int, max_length: int) -> ShallowMapping:
        """Where a byte is, and how far it goes on like that."""
        if offset >= self._size:
            return Eof()
        number, skip = divmod(offset, self._tile)
        host = self._offsets[number]
        length = self._tile - skip
        last = len(self._offsets) - 1
        while number < last and length < max_length:
            number += 1
            if self._offsets[number] != (host + skip + length if host else 0):
                break
            length += self._tile
        length = min(length, self._size - offset)
        if host == 0:
            return Zero(length, explicit=True)
        return Data(self._storage, host + skip, length, writable=False)


def pack(content: bytes, *, tile: int = 4096) -> bytes:
    """The tiles image of a disk with this content."""
    count = -(-len(content) // tile)
    at = HEADER.size + count * ENTRY_BYTES
    entries: list[int] = []
    stored: list[bytes] = []
    for start in range(0, len(content), tile):
        piece = content[start : start + tile]
        if any(piece):
            entries.append(at)
            stored.append(piece)
            at += len(piece)
        else:
            entries.append(0)
    header = HEADER.pack(MAGIC, VERSION, tile, len(content))
    return header + struct.pack(f"<{count}Q", *entries) + b"".join(stored)


@hookimpl
def underlay_format_drivers() -> Iterable[type[FormatDriverInstance]]:
    """What this distribution brings."""
    return (Tiles,)
