"""The format, version 1: packing and unpacking what docs/blocks-format.md describes. Pure.

Whatever is unpacked is checked completely. How much memory that takes depends on how many bytes
came, never on a number in them.
"""

from __future__ import annotations

import re
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from struct import Struct
from typing import Final, NamedTuple

import attrs

from underlay.errors import InvalidImageError, UnsupportedFeatureError

__all__ = [
    "MARK_NAMES",
    "NOBODY",
    "ROOT_MOST",
    "SEGMENT_BLOCKS",
    "SEGMENT_MOST",
    "VERSION",
    "Name",
    "Ref",
    "Root",
    "checksum",
    "largest_size",
    "new_writer",
    "pack_mark",
    "pack_root",
    "pack_segment",
    "parse_name",
    "unpack_mark",
    "unpack_root",
    "unpack_segment",
]

VERSION: Final = 1

#: Blocks that one segment of the index tells of.
SEGMENT_BLOCKS: Final = 1024
#: The writer of a root whose last writer has closed it.
NOBODY: Final = bytes(16)

_MAGIC: Final = b"underlay"
#: Magic, kind, version, CRC-32 of all that follows it, and a number of the kind's own.
_HEADER: Final = Struct(">8s4sIII")
_CHECKED_FROM: Final = 20
#: Generation, size of the disk, writer.
_ROOT: Final = Struct(">QQ16s")
#: Slot, length, checksum; writer and number, which are the object's name.
_RECORD: Final = Struct(">III16sQ")
_NAME: Final = Struct(">16sQ")

#: Bytes of a root; it is read in one request, and written at each sync.
ROOT_MOST: Final = 4 << 20
_ROOT_RECORDS: Final = (ROOT_MOST - _HEADER.size - _ROOT.size) // _RECORD.size
#: Bytes of a segment.
SEGMENT_MOST: Final = _HEADER.size + SEGMENT_BLOCKS * _RECORD.size
#: Names in one mark.
MARK_NAMES: Final = 1 << 16

_BLOCK_LEAST: Final = 4096
_BLOCK_MOST: Final = 64 << 20
_WRITTEN_NAME: Final = re.compile(r"([0-9a-f]{32})-([0-9a-f]{16})")


class Name(NamedTuple):
    """What an object is called: no two objects ever have one name."""

    #: 16 random bytes, of whoever wrote it.
    writer: bytes
    #: Counted by that writer.
    number: int

    def __str__(self) -> str:
        return f"{self.writer.hex()}-{self.number:016x}"


class Ref(NamedTuple):
    """An object that is named by another, and how one knows that it is the right one."""

    name: Name
    #: Bytes, at least one.
    length: int
    #: CRC-32 of all of them.
    checksum: int


@attrs.frozen(kw_only=True)
class Root:
    """The one object that changes: all that can be read follows from it."""

    #: From 1 on; each root that takes the place of another has a higher one.
    generation: int
    #: Who alone may write the next one without taking over; ``NOBODY`` when it was closed.
    writer: bytes
    #: Bytes of the disk.
    size: int
    #: Bytes, a power of two.
    block_size: int
    #: By their place in the disk. One that is not there reads as zeroes.
    segments: Mapping[int, Ref]

    @property
    def blocks(self) -> int:
        """How many blocks the disk has; the last one may reach past its end."""
        return -(-self.size // self.block_size)


def new_writer() -> bytes:
    """An id that nobody has had."""
    return secrets.token_bytes(16)


def parse_name(text: str) -> Name | None:
    """A name as it stands in an object's key; None for another text."""
    found = _WRITTEN_NAME.fullmatch(text)
    return Name(bytes.fromhex(found[1]), int(found[2], 16)) if found else None


def checksum(data: bytes | bytearray | memoryview) -> int:
    """CRC-32, as of gzip and PNG."""
    return zlib.crc32(data)


def largest_size(block_size: int) -> int:
    """Bytes of the largest disk whose root stays small enough with every block there."""
    return _ROOT_RECORDS * SEGMENT_BLOCKS * block_size


# -- the root


def pack_root(root: Root) -> bytes:
    """The bytes of a root object."""
    body = _ROOT.pack(root.generation, root.size, root.writer) + _pack_records(root.segments)
    return _with_header(b"root", root.block_size, body)


def unpack_root(data: bytes | memoryview, *, what: str) -> Root:
    """Read a root object; ``what`` names it in messages.

    Raises:
        InvalidImageError: it is none, or contradicts itself.
        UnsupportedFeatureError: it is of a later version.
    """
    if len(data) > ROOT_MOST:
        raise InvalidImageError(f"{what} is longer than {ROOT_MOST} bytes: it is damaged")
    block_size, body = _checked(data, b"root", what=what)
    if len(body) < _ROOT.size:
        raise InvalidImageError(f"{what} is cut off")
    if not _BLOCK_LEAST <= block_size <= _BLOCK_MOST or block_size & block_size - 1:
        raise InvalidImageError(f"{what} has blocks of {block_size} bytes, which cannot be")
    generation, size, writer = _ROOT.unpack_from(body)
    if not 1 <= generation < 1 << 63:
        raise InvalidImageError(f"{what} has the generation {generation}, which cannot be")
    if size > largest_size(block_size):
        raise InvalidImageError(f"{what} tells of {size} bytes, more than can be")
    places = -(-size // (block_size * SEGMENT_BLOCKS))
    segments = dict(_records(body[_ROOT.size :], places, what=what))
    for ref in segments.values():
        if ref.length > SEGMENT_MOST:
            raise InvalidImageError(f"{what} names a segment of {ref.length} bytes, too many")
    return Root(
        generation=generation, writer=writer, size=size, block_size=block_size, segments=segments
    )


# -- segments of the index


def pack_segment(place: int, blocks: Mapping[int, Ref]) -> bytes:
    """The bytes of the segment at a place of the disk; ``blocks`` by their slots in it."""
    return _with_header(b"sgmt", place, _pack_records(blocks))


def unpack_segment(
    data: bytes | memoryview, place: int, root: Root, *, what: str
) -> dict[int, Ref]:
    """The blocks that a segment of ``root`` tells of, by their slots.

    Raises:
        InvalidImageError: it is no such segment, or contradicts itself.
        UnsupportedFeatureError: it is of a later version.
    """
    own_place, body = _checked(data, b"sgmt", what=what)
    if own_place != place:
        raise InvalidImageError(f"{what} is number {own_place} of the index, not {place}")
    first = place * SEGMENT_BLOCKS
    blocks = dict(_records(body, min(root.blocks - first, SEGMENT_BLOCKS), what=what))
    if not blocks:
        raise InvalidImageError(f"{what} names no block")
    for slot, ref in blocks.items():
        # What lies behind the disk's end is zeroes, so that growing shows nothing old.
        if ref.length > min(root.block_size, root.size - (first + slot) * root.block_size):
            raise InvalidImageError(f"{what} names a block of {ref.length} bytes, too many")
    return blocks


# -- marks of what is not named


def pack_mark(names: Iterable[Name]) -> bytes:
    """The bytes of a list of objects that no root names any more."""
    return _with_header(b"mark", 0, b"".join(_NAME.pack(*name) for name in names))


def unpack_mark(data: bytes | memoryview, *, what: str) -> list[Name]:
    """The names in such a list; raises as the others do."""
    _, body = _checked(data, b"mark", what=what)
    if len(body) % _NAME.size or len(body) > MARK_NAMES * _NAME.size:
        raise InvalidImageError(f"{what} is cut off")
    return [Name(*fields) for fields in _NAME.iter_unpack(body)]


# -- what they have in common


def _with_header(kind: bytes, number: int, body: bytes) -> bytes:
    checked = number.to_bytes(4, "big") + body
    return _HEADER.pack(_MAGIC, kind, VERSION, checksum(checked), number) + body


def _checked(data: bytes | memoryview, kind: bytes, *, what: str) -> tuple[int, memoryview]:
    """The number in the header, and what follows the header."""
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise InvalidImageError(f"{what} is too short to be one of underlay's")
    magic, found, version, crc, number = _HEADER.unpack_from(view)
    if magic != _MAGIC or found != kind:
        raise InvalidImageError(f"{what} is none of underlay's")
    if version != VERSION:
        raise UnsupportedFeatureError(
            f"{what} is of version {version}; this underlay knows {VERSION}: use a newer one",
            feature=f"blocks version {version}",
        )
    if checksum(view[_CHECKED_FROM:]) != crc:
        raise InvalidImageError(f"{what} is damaged: its checksum is another one")
    return number, view[_HEADER.size :]


def _pack_records(refs: Mapping[int, Ref]) -> bytes:
    return b"".join(
        _RECORD.pack(slot, ref.length, ref.checksum, *ref.name)
        for slot, ref in sorted(refs.items())
    )


def _records(body: memoryview, slots: int, *, what: str) -> Iterator[tuple[int, Ref]]:
    if len(body) % _RECORD.size:
        raise InvalidImageError(f"{what} is cut off")
    writers: dict[bytes, bytes] = {}
    last = -1
    for slot, length, crc, writer, number in _RECORD.iter_unpack(body):
        if not last < slot < slots:
            raise InvalidImageError(f"{what} names number {slot} where that cannot be")
        if not length or writer == NOBODY:
            raise InvalidImageError(f"{what} names an object that cannot be")
        last = slot
        yield slot, Ref(Name(writers.setdefault(writer, writer), number), length, crc)
