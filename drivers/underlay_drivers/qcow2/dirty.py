"""What has changed in memory and not yet on disk.

L2 tables are dirty in pieces, L1 entries in sectors; what was let go waits beside them, since it
can only be freed after what let it go has reached the disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from underlay.locks import Lock
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.allocation import Allocator
from underlay_drivers.qcow2.condition import Condition
from underlay_drivers.qcow2.refcount_blocks import RefcountChanges
from underlay_drivers.qcow2.tables import Table, packed

if TYPE_CHECKING:
    from underlay_drivers.qcow2.dependencies import Dependencies

__all__ = ["DirtyState", "Freed", "Work"]

#: An L2 table is written in pieces of this many bytes: those that were changed.
_SLICE: Final = 4096
#: L1 entries are written in sectors.
_SECTOR_ENTRIES: Final = layout.SECTOR // 8
#: Memory for one item of what waits to be freed.
_FREED_BYTES: Final = 128

#: Host offset and clusters; one reference of each is let go.
Freed: TypeAlias = tuple[int, int]


@attrs.frozen(kw_only=True)
class Work:
    """Copies of all that one flush writes."""

    refcounts: RefcountChanges | None
    #: L2 tables that nothing on disk leads to: what to mark again if it fails, what to write.
    new: dict[int, int]
    new_bytes: list[tuple[int, bytes]]
    #: The changed pieces of those that are in use.
    changed: dict[int, int]
    changed_bytes: list[tuple[int, bytes]]
    l1: frozenset[int]
    l1_bytes: list[tuple[int, bytes]]
    #: Whether anything is shown that was not there before.
    shows: bool
    unlinked: list[Freed]


class DirtyState(Condition):
    """What one writable image has in memory alone."""

    __slots__ = (
        "_dirty_l1",
        "_dirty_l2",
        "_new_l2",
        "_shows",
        "_slice",
        "_unlinked",
        "allocator",
        "dirty_limit",
        "lock",
    )

    def __init__(self, disk: Dependencies, allocator: Allocator, *, dirty_limit: int) -> None:
        super().__init__(disk)
        self.allocator = allocator
        #: Guards all tables in memory. Not held during data I/O or syncs.
        self.lock = Lock()
        #: Bytes of tables beyond which a writer flushes first.
        self.dirty_limit = dirty_limit
        self._slice = min(_SLICE, disk.geometry.cluster_size)
        #: L2 tables by the number of their L1 entry: a bit for each piece that was changed.
        self._dirty_l2: dict[int, int] = {}
        #: Those to which no L1 entry on disk leads.
        self._new_l2: set[int] = set()
        self._dirty_l1: set[int] = set()
        self._shows = False
        #: What was let go in memory only.
        self._unlinked: list[Freed] = []

    # -- marking; under the lock

    def touch_l2(self, number: int, table: Table, index: int, count: int, *, shows: bool) -> None:
        """``count`` entries from ``index`` on of the L2 table behind L1 entry ``number`` changed.

        ``shows`` says that what they lead to must be durable before they are written.
        """
        entry_bytes = self._disk.geometry.words * 8
        first = index * entry_bytes // self._slice
        last = ((index + count) * entry_bytes - 1) // self._slice
        bits = (1 << last + 1) - (1 << first)
        dirty = self._dirty_l2.get(number)
        if dirty is None:
            self._disk.pin_table(number, table)
            dirty = 0
        self._dirty_l2[number] = dirty | bits
        self._shows = self._shows or shows

    def link_l2(self, number: int, table: Table, offset: int) -> None:
        """Let L1 entry ``number`` lead to a new table, which is to be at ``offset``."""
        self._disk.pin_table(number, table)
        self._dirty_l2[number] = -1
        self._new_l2.add(number)
        self._disk.l1[number] = offset | layout.COPIED
        self.touch_l1(number)

    def unlink_l2(self, number: int) -> None:
        """Let L1 entry ``number`` lead nowhere, and free its table late."""
        offset = self._disk.l1[number] & layout.HOST_OFFSET
        self._dirty_l1.add(number)
        self._disk.l1[number] = 0
        self._disk.forget_table(number)
        self._dirty_l2.pop(number, None)
        self._new_l2.discard(number)
        self.release(offset)

    def touch_l1(self, number: int) -> None:
        """L1 entry ``number`` was changed."""
        self._dirty_l1.add(number)
        self._shows = True

    def release(self, offset: int, clusters: int = 1) -> None:
        """Free these clusters (one reference each), late: nothing in memory leads to them now."""
        if self._unlinked:
            start, count = self._unlinked[-1]
            if start + count * self._disk.geometry.cluster_size == offset:
                self._unlinked[-1] = start, count + clusters
                return
        self._unlinked.append((offset, clusters))

    @property
    def at_peace(self) -> bool:
        """Whether the disk says all that the guest has been told is there."""
        dirty = self._dirty_l2 or self._dirty_l1 or self._unlinked
        return self._broken is None and not dirty

    @property
    def too_dirty(self) -> bool:
        """Whether more is dirty than memory may be used for."""
        tables = len(self._dirty_l2) + self.allocator.dirty_blocks
        waiting = len(self._unlinked) * _FREED_BYTES
        return tables * self._disk.geometry.cluster_size + waiting > self.dirty_limit

    # -- for the write-back; under the lock

    def _take(self) -> Work | None:
        """Copies of all that is dirty, which is clean from now on; under the lock."""
        refcounts = self.allocator.take_changes()
        if refcounts is None and not (self._dirty_l2 or self._dirty_l1 or self._unlinked):
            return None
        new: dict[int, int] = {}
        changed: dict[int, int] = {}
        new_bytes: list[tuple[int, bytes]] = []
        changed_bytes: list[tuple[int, bytes]] = []
        for number in sorted(self._dirty_l2):
            pieces = self._dirty_l2[number]
            offset = self._disk.l1[number] & layout.HOST_OFFSET
            table = self._disk.cached_table(number)
            assert table is not None
            if number in self._new_l2:
                new[number] = pieces
                new_bytes.append((offset, packed(table)))
            else:
                changed[number] = pieces
                changed_bytes += self._pieces(offset, table, pieces)
        work = Work(
            refcounts=refcounts,
            new=new,
            new_bytes=new_bytes,
            changed=changed,
            changed_bytes=changed_bytes,
            l1=frozenset(self._dirty_l1),
            l1_bytes=self._l1_sectors(),
            shows=self._shows,
            unlinked=self._unlinked,
        )
        self._dirty_l2 = {}
        self._new_l2 = set()
        self._dirty_l1 = set()
        self._shows = False
        self._unlinked = []
        return work

    def _pieces(self, offset: int, table: Table, pieces: int) -> list[tuple[int, bytes]]:
        """The changed pieces of a table, those that follow each other as one."""
        words = self._slice // 8
        found: list[tuple[int, bytes]] = []
        first = 0
        count = len(table) // words
        while first < count:
            if not pieces >> first & 1:
                first += 1
                continue
            last = first + 1
            while last < count and pieces >> last & 1:
                last += 1
            found.append(
                (offset + first * self._slice, packed(table[first * words : last * words]))
            )
            first = last
        return found

    def _l1_sectors(self) -> list[tuple[int, bytes]]:
        l1 = self._disk.l1
        base = self._disk.header.l1_table_offset
        found: list[tuple[int, bytes]] = []
        for sector in sorted({number // _SECTOR_ENTRIES for number in self._dirty_l1}):
            first = sector * _SECTOR_ENTRIES
            found.append((base + first * 8, packed(l1[first : first + _SECTOR_ENTRIES])))
        return found

    def _put_back(self, work: Work, *, counted: bool, linked: bool) -> None:
        """Mark what was taken as dirty again; under the lock."""
        if work.refcounts is not None and not counted:
            self.allocator.put_back(work.refcounts)
        for number, pieces in (*work.new.items(), *work.changed.items()):
            if self._disk.l1[number]:
                self._dirty_l2[number] = self._dirty_l2.get(number, 0) | pieces
        if not linked:
            self._new_l2 |= work.new.keys() & self._dirty_l2.keys()
        self._dirty_l1 |= work.l1
        self._shows = self._shows or work.shows
        self._unlinked = work.unlinked + self._unlinked
