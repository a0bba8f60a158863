"""Finding zeroes in data, so that they need not be stored."""

from __future__ import annotations

from underlay.errors import OptionError

__all__ = ["check_sparse_size", "data_ranges"]

_MOST = 16 << 20
_SECTOR = 512
_ZEROES = bytes(64 << 10)


def check_sparse_size(size: int) -> None:
    """Refuse what cannot be the least length of zeroes to be left out.

    Raises:
        OptionError: it is no multiple of 512 bytes, or more than 16 MiB.
    """
    if size % _SECTOR or not 0 <= size <= _MOST:
        raise OptionError(
            f"sparse_size is {size}; it can be a multiple of {_SECTOR} up to {_MOST}, or 0 to "
            f"store zeroes like any data",
            option="sparse_size",
        )


def data_ranges(buffer: bytearray, start: int, end: int, sparse_size: int) -> list[tuple[int, int]]:
    """Where bytes ``start`` to ``end`` hold data: starts and ends, without runs of zeroes.

    Zeroes are looked for in granules: the largest power of two up to ``sparse_size``. Whole
    granules of them that follow each other are left out if they are ``sparse_size`` bytes or more;
    with 0 nothing is.
    """
    if not sparse_size:
        return [(start, end)]
    granule = min(1 << sparse_size.bit_length() - 1, len(_ZEROES))
    zeroes = _ZEROES[:granule]
    # Only what begins with a zero can be one: a look at every granule's first byte spares the rest.
    heads = buffer[start:end:granule]
    index = heads.find(0)
    ranges: list[tuple[int, int]] = []
    data = start
    while index >= 0:
        first = last = start + index * granule
        while last < end:
            step = min(granule, end - last)
            if not buffer.startswith(zeroes if step == granule else zeroes[:step], last):
                break
            last += step
        if last - first >= sparse_size:
            if first > data:
                ranges.append((data, first))
            data = last
        index = heads.find(0, max(index + 1, -(-(last - start) // granule)))
    if data < end:
        ranges.append((data, end))
    return ranges
