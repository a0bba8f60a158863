"""The reference counts of one block, of any width, in the file's own bytes. Pure.

Searching is done by ``bytes.find`` and ``re``, so that full blocks are passed at memory speed.
"""

from __future__ import annotations

import functools
import re
from typing import Final

__all__ = ["Counts"]

_BYTE: Final = 8


class Counts:
    """How to read, change and search a refcount block of one width.

    A block is a ``bytearray`` of one cluster, exactly as it is on disk.
    """

    __slots__ = ("_free_byte", "_one", "_zero", "bits", "maximum", "per_block", "width")

    def __init__(self, *, refcount_bits: int, cluster_size: int) -> None:
        self.bits = refcount_bits
        #: Bytes of one count; 0 where several share a byte.
        self.width = refcount_bits // _BYTE
        #: The largest count that can be stored.
        self.maximum = (1 << refcount_bits) - 1
        #: Counts in one block.
        self.per_block = cluster_size * _BYTE // refcount_bits
        self._zero = bytes(self.width)
        self._one = (1).to_bytes(self.width, "big") if self.width else b""
        self._free_byte = None if self.width else _byte_with_free_field(refcount_bits)

    def get(self, block: bytearray, index: int) -> int:
        """The count number ``index``."""
        width = self.width
        if width:
            return int.from_bytes(block[index * width : (index + 1) * width], "big")
        bit = index * self.bits
        return block[bit >> 3] >> (bit & 7) & self.maximum

    def set(self, block: bytearray, index: int, value: int) -> None:
        """Store ``value``, which must not exceed ``maximum``."""
        width = self.width
        if width:
            block[index * width : (index + 1) * width] = value.to_bytes(width, "big")
            return
        bit = index * self.bits
        shift = bit & 7
        kept = block[bit >> 3] & ~(self.maximum << shift)
        block[bit >> 3] = kept | value << shift

    def fill(self, block: bytearray, index: int, count: int) -> None:
        """Set ``count`` counts from ``index`` on to one."""
        width = self.width
        if width:
            block[index * width : (index + count) * width] = self._one * count
            return
        for number in range(index, index + count):
            self.set(block, number, 1)

    def find_free(self, block: bytearray, start: int) -> int:
        """The first count from ``start`` on that is zero, or -1."""
        width = self.width
        if width == 1:
            return block.find(0, start)
        if width:
            at = block.find(self._zero, start * width)
            while at >= 0 and at % width:  # the end of one count and the start of the next
                at = block.find(self._zero, at + width - at % width)
            return at // width if at >= 0 else -1
        return self._find_free_field(block, start)

    def _find_free_field(self, block: bytearray, start: int) -> int:
        in_byte = _BYTE // self.bits
        pattern = self._free_byte
        assert pattern is not None
        at = start // in_byte
        while (found := pattern.search(block, at)) is not None:
            at = found.start()
            for index in range(max(start, at * in_byte), (at + 1) * in_byte):
                if not self.get(block, index):
                    return index
            at += 1
        return -1

    def find_run(self, block: bytearray, start: int, most: int) -> tuple[int, int]:
        """The first count from ``start`` on that is zero, and how many follow, up to ``most``.

        None do if there is none in this block.
        """
        width = self.width
        if width and block.startswith(self._zero * most, start * width):
            return start, most
        found = self.find_free(block, start)
        return (start, 0) if found < 0 else (found, self.free_run(block, found, most))

    def free_run(self, block: bytearray, start: int, most: int) -> int:
        """How many counts from ``start`` on are zero, up to ``most`` or the block's end."""
        most = min(most, self.per_block - start)
        width = self.width
        if width:
            run = block[start * width : (start + most) * width]
            return (len(run) - len(run.lstrip(b"\0"))) // width
        count = 0
        while count < most and not self.get(block, start + count):
            count += 1
        return count

    def last_used(self, block: bytearray) -> int:
        """The last count that is not zero, or -1."""
        used = len(block.rstrip(b"\0"))
        if not used:
            return -1
        if self.width:
            return (used - 1) // self.width
        index = used * (_BYTE // self.bits) - 1
        while not self.get(block, index):
            index -= 1
        return index


@functools.cache
def _byte_with_free_field(bits: int) -> re.Pattern[bytes]:
    """Matches a byte of which at least one field of ``bits`` bits is zero."""
    mask = (1 << bits) - 1
    free = bytes(
        value
        for value in range(256)
        if any(not value >> shift & mask for shift in range(0, _BYTE, bits))
    )
    return re.compile(b"[" + re.escape(free) + b"]", re.DOTALL)
