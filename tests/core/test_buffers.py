"""Buffers of every kind that a caller may bring."""

from __future__ import annotations

import array
import mmap
from typing import Any

import numpy as np
import pytest

from underlay.buffers import (
    address_of,
    aligned_buffer,
    copy_into,
    fill_zero,
    flat,
    flat_writable,
    join,
    split_at,
    total,
)


def test_any_contiguous_buffer_is_seen_as_its_bytes() -> None:
    buffers: tuple[Any, ...] = (
        b"abcd",
        bytearray(b"abcd"),
        memoryview(b"abcd"),
        memoryview(b"xabcd")[1:],
        array.array("H", b"abcd"),
        np.frombuffer(b"abcd", dtype=">u4"),
        np.frombuffer(b"abcd", dtype=[("a", "u1"), ("b", "u1", 3)]),
        np.frombuffer(b"abcd", dtype="u1").reshape(2, 2),
        np.array(b"abcd"),
    )
    for buffer in buffers:
        view = flat(buffer)
        assert (view.format, view.ndim, bytes(view)) == ("B", 1, b"abcd"), buffer
    assert flat(b"").nbytes == 0
    empty: Any = np.zeros((0, 3), dtype=">u4")
    assert flat(empty).nbytes == 0


def test_what_is_written_through_the_view_is_in_the_buffer() -> None:
    target: Any = np.zeros(2, dtype=">u2")
    flat_writable(target)[:] = b"\0\1\0\2"
    assert list(target) == [1, 2]


def test_what_is_no_contiguous_buffer_is_a_type_error() -> None:
    wrong: tuple[Any, ...] = (
        memoryview(b"abcd")[::2],
        np.zeros((4, 4), dtype="u1")[:, 1],
        "text",
        5,
    )
    for buffer in wrong:
        with pytest.raises(TypeError):
            flat(buffer)
    with pytest.raises(TypeError, match="read-only"):
        flat_writable(b"abcd")


def test_lists_of_buffers_are_cut_where_they_should_be() -> None:
    views = [memoryview(b"abc"), memoryview(b"de"), memoryview(b"f")]
    assert total(views) == 6
    for at in range(7):
        head, rest = split_at(views, at)
        assert b"".join(head) == b"abcdef"[:at]
        assert b"".join(rest) == b"abcdef"[at:]
        assert all(head)
        assert all(rest)


def test_copying_goes_both_ways() -> None:
    targets = [bytearray(2), bytearray(3)]
    copy_into(targets, memoryview(b"abcdefg"))
    assert targets == [b"ab", b"cde"]
    into = memoryview(bytearray(6))
    join(targets, into)
    assert bytes(into) == b"abcde\0"
    large = bytearray(b"x" * 3_000_000)
    fill_zero([memoryview(large)[1:-1]])
    assert large == b"x" + bytes(2_999_998) + b"x"


def test_aligned_memory_is_aligned_zeroed_and_writable() -> None:
    for size in (0, 1, 4096, 1_000_001):
        buffer = aligned_buffer(size)
        assert len(buffer) == size
        assert not any(buffer)
        if size:
            address = address_of(buffer)
            assert address is not None
            assert address % mmap.PAGESIZE == 0
            buffer[:1] = b"x"
    assert address_of(b"read-only") is None
