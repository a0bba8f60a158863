"""Which clusters of the image file are in use: reference counts, and the search for free ones.

Everything here changes memory only, under the lock of ``Writeback``; what has to be written, and in
which order, is decided there.
"""

from __future__ import annotations

from underlay.handle import StorageHandle
from underlay_drivers.qcow2.header import Header

__all__ = ["Allocator"]


class Allocator:
    """The refcount table and its blocks. All offsets are host bytes, at cluster borders.

    A *metadata* cluster is one that holds the header, a table, a block or a directory;
    ``metadata`` is the set of their offsets, and nothing of it is ever handed out or freed as data.
    """

    def __init__(self, image: StorageHandle, header: Header, metadata: set[int]) -> None: ...

    async def load(self) -> None:
        """Read the refcount table and put its blocks among the metadata.

        Raises:
            CorruptImageError: the table makes no sense.
        """
        raise NotImplementedError

    async def refcount(self, offset: int) -> int:
        """The count of the cluster at ``offset``; 0 where there is no block for it yet."""
        raise NotImplementedError

    async def allocate(self, count: int, *, after: int = 0) -> tuple[int, int]:
        """Up to ``count`` contiguous free clusters (at least one): their offset, and how many.

        Their counts are one from now on. Taken from ``after`` on if that is free.
        """
        raise NotImplementedError

    async def allocate_exactly(self, count: int) -> int:
        """``count`` contiguous clusters, for a table."""
        raise NotImplementedError

    async def change(self, offset: int, delta: int) -> int:
        """Raise or lower one cluster's count, and return the new one.

        Raises:
            LimitExceededError: it cannot be counted so high in ``refcount_bits``.
            CorruptImageError: it is lowered below zero.
        """
        raise NotImplementedError
