"""What has changed in memory and not yet on disk, and the order in which it gets there.

Nothing on disk ever refers to something that is not durable:

1. under the lock, copies of all dirty refcount blocks, L2 tables and L1 entries are taken;
2. the refcount blocks are written, and the L2 tables to which nothing on disk leads yet;
   if blocks are new (or the refcount table has moved): a sync, and then the entries (or the header)
   that lead to them;
3. barrier A: a sync of the data file and of the image, if anything was allocated since the last;
4. the L2 tables that are in use, in their places, and the L1 entries.

The caller's own ``sync`` (barrier B) makes that durable. Clusters that an entry let go are freed
late: once a barrier has passed since the entry was written, and every lease that is older has
ended. Only then are they punched, counted down, and used again.
"""

from __future__ import annotations

from underlay.locks import Lock

__all__ = ["Writeback"]


class Writeback:
    """The dirty state of one writable image."""

    #: Guards all tables in memory. Not held during data I/O or syncs.
    lock: Lock

    # -- under the lock

    def touch_l2(self, number: int) -> None:
        """The L2 table behind L1 entry ``number`` was changed."""

    def link_l2(self, number: int, offset: int) -> None:
        """Let L1 entry ``number`` lead to a new table at ``offset``."""

    def release(self, offset: int, clusters: int = 1) -> None:
        """Free these clusters (one reference each), late: nothing in memory leads to them now."""

    # -- without it

    def check(self) -> None:
        """Raise what broke this image for writing, if anything did."""

    async def flush(self) -> None:
        """Write everything that is dirty, in order.

        Raises:
            StorageError: not all was written; what was not stays dirty. After a failed *sync* the
                image cannot be written any more, since nobody knows what reached the disk.
        """

    async def sync(self) -> None:
        """Make what was flushed durable, and free what waited for that."""

    async def finish(self) -> None:
        """At the end of a session: free what is still waiting, and cut the file's free tail."""
