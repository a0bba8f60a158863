"""L2 entries that lead past all that was in use when a session began.

Nothing counts what they lead to, so in time the allocator would come to it, and two guest clusters
would share it. Each L2 table is looked at once, when it is first read, so this costs next to
nothing; entries that the session makes itself lie there too, and come later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from underlay.errors import CorruptImageError
from underlay_drivers.qcow2 import layout

if TYPE_CHECKING:
    from underlay_drivers.qcow2.allocation import Allocator
    from underlay_drivers.qcow2.tables import Geometry, Table

__all__ = ["Strays"]

#: More clusters than compressed data can touch.
_TOUCHED: Final = 3


class Strays:
    """Looks for them, and lets nothing be handed out from the first one on."""

    __slots__ = ("_allocator", "_end", "_geometry", "_name", "_seen")

    def __init__(self, geometry: Geometry, allocator: Allocator, *, name: str) -> None:
        self._geometry = geometry
        self._allocator = allocator
        self._name = name
        #: Host offset of the end of all that was in use.
        self._end = allocator.fresh_from
        #: Numbers of tables.
        self._seen: set[int] = set()

    def expect(self, number: int) -> None:
        """This table is the session's own from now on."""
        self._seen.add(number)

    def look(self, number: int, table: Table) -> None:
        """Look at a table that was read.

        Raises:
            CorruptImageError: an entry leads where something was put meanwhile.
        """
        if number in self._seen or self._geometry.external:
            return
        allocator, geometry = self._allocator, self._geometry
        size, mask = geometry.cluster_size, layout.HOST_OFFSET
        near = self._end - _TOUCHED * size
        for entry in [entry for entry in table[:: geometry.words] if entry & mask >= near]:
            first = entry & mask & -size
            last = first
            if entry & layout.COMPRESSED:
                start, length = geometry.compressed(entry)
                first, last = start & -size, (start + length - 1) & -size
            if last < self._end:
                continue
            first = max(first, self._end)
            if first < allocator.fresh_from:
                raise CorruptImageError(
                    f"'{self._name}': an L2 entry leads to {first:#x}, which was past the end of "
                    "all that is in use, and is now something else's; check the image",
                    offset=first,
                    field="L2 entry",
                    value=entry,
                )
            allocator.limit = min(allocator.limit, first)
        self._seen.add(number)
