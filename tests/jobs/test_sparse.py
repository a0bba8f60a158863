"""Zeroes are found where they are, and nothing else is taken for them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from underlay.jobs.sparse import data_ranges

_RUNS = st.lists(st.tuples(st.integers(1, 6000), st.sampled_from([b"\0", b"\0\1", b"\2"])))


@given(
    runs=_RUNS,
    sparse_size=st.sampled_from([512, 1024, 1536, 4096, 12288]),
    spare=st.integers(0, 5000),
)
def test_what_is_left_out_is_zero_and_all_that_can_be_is_left_out(
    runs: list[tuple[int, bytes]], sparse_size: int, spare: int
) -> None:
    content = b"".join((pattern * length)[:length] for length, pattern in runs)
    # What lies behind the length that is asked for does not count.
    ranges = data_ranges(bytearray(content + bytes(spare)), 0, len(content), sparse_size)

    assert all(start < end for start, end in ranges)
    assert ranges == sorted(ranges)
    borders = [0, *(border for pair in ranges for border in pair), len(content)]
    holes = [(a, b) for a, b in zip(borders[::2], borders[1::2], strict=True) if a < b]
    granule = 1 << sparse_size.bit_length() - 1
    for start, end in holes:
        assert not content[start:end].strip(b"\0")
        assert end - start >= sparse_size
        assert start % granule == 0
    kept = [content[start:end] for start, end in ranges]
    for (start, _), data in zip(ranges, kept, strict=True):
        # No run of zeroes that is long enough begins at a whole granule of what is kept.
        for at in range(-start % granule, len(data), granule):
            piece = data[at : at + sparse_size + granule]
            assert len(piece) < sparse_size or piece.strip(b"\0")


def test_with_0_nothing_is_left_out() -> None:
    assert data_ranges(bytearray(100_000), 0, 100_000, 0) == [(0, 100_000)]
