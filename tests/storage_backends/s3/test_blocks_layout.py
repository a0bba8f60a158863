"""The bytes of roots, segments and marks: what is written is read, and no lie gets through."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from underlay.errors import InvalidImageError, UnsupportedFeatureError
from underlay_storage.s3.blocks.layout import (
    NOBODY,
    ROOT_MOST,
    SEGMENT_BLOCKS,
    SEGMENT_MOST,
    Name,
    Ref,
    Root,
    checksum,
    largest_size,
    pack_mark,
    pack_root,
    pack_segment,
    parse_name,
    unpack_mark,
    unpack_root,
    unpack_segment,
)

WRITER = bytes(range(1, 17))
BLOCK = 4096
SEGMENT = BLOCK * SEGMENT_BLOCKS

writers = st.binary(min_size=16, max_size=16).filter(lambda writer: writer != NOBODY)
names = st.builds(Name, writers, st.integers(0, 2**64 - 1))


def refs(longest: int) -> st.SearchStrategy[Ref]:
    return st.builds(Ref, names, st.integers(1, longest), st.integers(0, 2**32 - 1))


@st.composite
def roots(draw: st.DrawFn) -> Root:
    block_size = 1 << draw(st.integers(12, 26))
    size = draw(st.integers(0, min(largest_size(block_size), 2**50)))
    places = -(-size // (block_size * SEGMENT_BLOCKS))
    segments = st.dictionaries(st.integers(0, max(places - 1, 0)), refs(SEGMENT_MOST), max_size=20)
    return Root(
        generation=draw(st.integers(1, 2**63 - 1)),
        writer=draw(st.binary(min_size=16, max_size=16)),
        size=size,
        block_size=block_size,
        segments=draw(segments) if places else {},
    )


def root(**changes: object) -> Root:
    facts: dict[str, object] = {
        "generation": 7,
        "writer": WRITER,
        "size": 2 * SEGMENT,
        "block_size": BLOCK,
        "segments": {0: Ref(Name(WRITER, 3), 60, 5), 1: Ref(Name(WRITER, 4), 60, 6)},
    }
    return Root(**(facts | changes))  # type: ignore[arg-type]


# -- what is written is read


@given(roots())
def test_a_root_is_read_as_it_was_written(root: Root) -> None:
    data = pack_root(root)
    assert len(data) <= ROOT_MOST
    assert unpack_root(data, what="it") == root


@given(st.dictionaries(st.integers(0, SEGMENT_BLOCKS - 1), refs(BLOCK), min_size=1, max_size=50))
def test_a_segment_is_read_as_it_was_written(blocks: dict[int, Ref]) -> None:
    whole = root(size=8 * SEGMENT)
    assert unpack_segment(pack_segment(7, blocks), 7, whole, what="it") == blocks


@given(st.lists(names, max_size=50))
def test_a_mark_is_read_as_it_was_written(marked: list[Name]) -> None:
    assert unpack_mark(pack_mark(marked), what="it") == marked


@given(names)
def test_a_name_is_read_as_it_was_written(name: Name) -> None:
    assert parse_name(str(name)) == name
    assert parse_name(str(name).upper()) is None or str(name).isdigit()
    assert parse_name(f"{name}x") is None


def test_the_bytes_are_those_of_the_specification() -> None:
    data = pack_root(root(segments={1: Ref(Name(WRITER, 4), 60, 6)}))
    assert data[:16] == b"underlayroot" + (1).to_bytes(4, "big")
    assert data[16:20] == zlib.crc32(data[20:]).to_bytes(4, "big")
    assert data[20:40] == struct.pack(">IQQ", BLOCK, 7, 2 * SEGMENT)
    assert data[40:56] == WRITER
    assert data[56:] == struct.pack(">III16sQ", 1, 60, 6, WRITER, 4)
    segment = pack_segment(9, {3: Ref(Name(WRITER, 5), 4096, 8)})
    assert segment[:24] == struct.pack(">8s4sIII", b"underlay", b"sgmt", 1, _crc(segment), 9)
    assert segment[24:] == struct.pack(">III16sQ", 3, 4096, 8, WRITER, 5)
    mark = pack_mark([Name(WRITER, 5)])
    assert mark[:24] == struct.pack(">8s4sIII", b"underlay", b"mark", 1, _crc(mark), 0)
    assert mark[24:] == WRITER + (5).to_bytes(8, "big")


# -- what lies is refused

UNPACKING: list[Callable[[bytes], object]] = [
    lambda data: unpack_root(data, what="it"),
    lambda data: unpack_segment(data, 1, root(), what="it"),
    lambda data: unpack_mark(data, what="it"),
]


def _crc(data: bytes | bytearray) -> int:
    return zlib.crc32(data[20:])


def _with(data: bytes, offset: int, change: bytes) -> bytes:
    """Changed bytes under a right checksum: no damage, but a lie."""
    changed = bytearray(data)
    changed[offset : offset + len(change)] = change
    changed[16:20] = _crc(changed).to_bytes(4, "big")
    return bytes(changed)


def _number(value: int, length: int = 4) -> bytes:
    return value.to_bytes(length, "big")


LYING_ROOTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: data[:0],
    "a header alone": lambda data: _with(data[:24], 20, _number(BLOCK)),
    "cut in its header": lambda data: data[:23],
    "cut in its fields": lambda data: _with(data[:50], 20, _number(BLOCK)),
    "cut in a record": lambda data: _with(data[:-1], 20, _number(BLOCK)),
    "another magic": lambda data: b"overlay!" + data[8:],
    "a segment": lambda data: _with(data, 8, b"sgmt"),
    "no blocks": lambda data: _with(data, 20, _number(0)),
    "blocks of 2 KiB": lambda data: _with(data, 20, _number(2048)),
    "blocks of 128 MiB": lambda data: _with(data, 20, _number(1 << 27)),
    "blocks of 5000 bytes": lambda data: _with(data, 20, _number(5000)),
    "generation 0": lambda data: _with(data, 24, _number(0, 8)),
    "generation 2^63": lambda data: _with(data, 24, _number(1 << 63, 8)),
    "more bytes than can be": lambda data: _with(data, 32, _number(largest_size(BLOCK) + 1, 8)),
    "2^64-1 bytes": lambda data: _with(data, 32, b"\xff" * 8),
    "no bytes, and segments": lambda data: _with(data, 32, _number(0, 8)),
    "fewer bytes than segments": lambda data: _with(data, 32, _number(SEGMENT, 8)),
    "a place behind the end": lambda data: _with(data, 92, _number(2)),
    "place 2^32-1": lambda data: _with(data, 92, b"\xff" * 4),
    "one place twice": lambda data: _with(data, 92, _number(0)),
    "places out of order": lambda data: _with(data, 56, _number(1)),
    "an empty object": lambda data: _with(data, 60, _number(0)),
    "a segment of 4 GiB": lambda data: _with(data, 60, b"\xff" * 4),
    "an object of nobody's": lambda data: _with(data, 68, NOBODY),
    "too long": lambda data: data.ljust(ROOT_MOST + 1, b"\0"),
    "zeroes": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("lie", LYING_ROOTS)
def test_a_root_that_lies_is_refused(lie: str) -> None:
    data = LYING_ROOTS[lie](pack_root(root()))
    with pytest.raises(InvalidImageError, match=r"^The root of X "):
        unpack_root(data, what="The root of X")


def test_a_later_version_is_refused_by_its_number() -> None:
    objects = pack_root(root()), pack_segment(1, _BLOCKS), pack_mark([])
    for data, unpack in zip(objects, UNPACKING, strict=True):
        with pytest.raises(UnsupportedFeatureError, match="is of version 2; this underlay knows 1"):
            unpack(_with(data, 12, _number(2)))


_BLOCKS = {0: Ref(Name(WRITER, 3), 100, 5), 9: Ref(Name(WRITER, 4), BLOCK, 6)}

LYING_SEGMENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: data[:0],
    "a root": lambda data: _with(data, 8, b"root"),
    "of another place": lambda data: _with(data, 20, _number(0)),
    "without blocks": lambda data: _with(data[:24], 20, _number(1)),
    "cut in a record": lambda data: _with(data[:-1], 20, _number(1)),
    "a slot behind its end": lambda data: _with(data, 60, _number(SEGMENT_BLOCKS)),
    "a slot behind the disk's end": lambda data: _with(data, 60, _number(10)),
    "slots out of order": lambda data: _with(data, 24, _number(9)),
    "an empty block": lambda data: _with(data, 28, _number(0)),
    "a block that is too long": lambda data: _with(data, 28, _number(BLOCK + 1)),
    "a block of 4 GiB": lambda data: _with(data, 28, b"\xff" * 4),
    "a block that reaches behind the disk's end": lambda data: _with(data, 64, _number(BLOCK)),
    "an object of nobody's": lambda data: _with(data, 36, NOBODY),
}


@pytest.mark.parametrize("lie", LYING_SEGMENTS)
def test_a_segment_that_lies_is_refused(lie: str) -> None:
    whole = root(size=SEGMENT + 9 * BLOCK + 1000)
    honest = pack_segment(1, {**_BLOCKS, 9: Ref(Name(WRITER, 4), 1000, 6)})
    assert unpack_segment(honest, 1, whole, what="The index")
    with pytest.raises(InvalidImageError, match=r"^The index "):
        unpack_segment(LYING_SEGMENTS[lie](honest), 1, whole, what="The index")


def test_a_damaged_byte_is_noticed_wherever_it_is() -> None:
    objects = pack_root(root()), pack_segment(1, _BLOCKS), pack_mark([Name(WRITER, 5)])
    for data, unpack in zip(objects, UNPACKING, strict=True):
        assert unpack(data)
        for at in range(len(data)):
            damaged = bytearray(data)
            damaged[at] ^= 0x10
            with pytest.raises((InvalidImageError, UnsupportedFeatureError)):
                unpack(bytes(damaged))


@given(st.binary(max_size=300), st.booleans(), st.sampled_from([b"root", b"sgmt", b"mark"]))
def test_any_bytes_are_read_or_refused(body: bytes, honest: bool, kind: bytes) -> None:
    data = body
    if honest:
        data = struct.pack(">8s4sII", b"underlay", kind, 1, zlib.crc32(body)) + body
    for unpack in UNPACKING:
        with contextlib.suppress(InvalidImageError, UnsupportedFeatureError):
            unpack(data)


def test_no_number_decides_about_memory() -> None:
    data = _with(pack_root(root(segments={})), 20, _number(1 << 26))
    data = _with(data, 32, _number(largest_size(1 << 26), 8))
    tracemalloc.start()
    try:
        unpack_root(data, what="it")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_the_largest_disk_fits_with_every_block_there_and_in_bounded_memory() -> None:
    size = largest_size(BLOCK)
    ref = Ref(Name(WRITER, 1), SEGMENT_MOST, 0)
    data = pack_root(root(size=size, segments=dict.fromkeys(range(size // SEGMENT), ref)))
    assert ROOT_MOST - 100 < len(data) <= ROOT_MOST
    tracemalloc.start()
    try:
        assert len(unpack_root(data, what="it").segments) == size // SEGMENT
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()


def test_checksums_are_those_of_gzip() -> None:
    assert checksum(b"123456789") == 0xCBF43926
