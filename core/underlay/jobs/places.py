"""Whether two disks have the same bytes in one place, so that nobody need read them to know."""

from __future__ import annotations

from collections.abc import Generator, Hashable
from contextlib import closing

from underlay.handle import StorageHandle
from underlay.jobs.runs import Run, runs
from underlay.sync import SyncFormatAccess

__all__ = ["Places", "padded_runs"]


class Places:
    """Compares where runs lie, and remembers which storages are the same."""

    __slots__ = ("_identities",)

    def __init__(self) -> None:
        self._identities: dict[int, Hashable | None] = {}

    def same(self, first: Run, second: Run) -> bool:
        """Whether two runs are equal unseen: zeroes both, or the same bytes of a storage."""
        if first.storage is None or second.storage is None:
            return first.storage is second.storage
        if first.offset - first.start != second.offset - second.start:
            return False
        if first.special is None or second.special is None:
            if first.special is not second.special:
                return False
        elif first.special.offset != second.special.offset:
            return False
        ours = self._identity(first.storage)
        return ours is not None and ours == self._identity(second.storage)

    def _identity(self, storage: StorageHandle) -> Hashable | None:
        key = id(storage)
        if key not in self._identities:
            self._identities[key] = storage.identity()
        return self._identities[key]


def padded_runs(disk: SyncFormatAccess | None, total: int) -> Generator[Run, None, None]:
    """The runs of the first ``total`` bytes of a disk, with zeroes behind it."""
    size = 0 if disk is None else disk.size
    if disk is not None:
        with closing(runs(disk, 0, min(size, total))) as found:
            yield from found
    if size < total:
        yield Run(size, total - size)
