"""The end of a job that wrote an image: it is there for good, however long its storage takes."""

from __future__ import annotations

from underlay.capabilities import offers
from underlay.maintenance import Publishing
from underlay.steps import Steps
from underlay.sync import SyncFormatAccess

__all__ = ["Publication"]


class Publication:
    """What makes durable all that a job wrote, and counts as steps of it.

    Some storages only begin then to send what they were given, which takes as long as all else.
    """

    def __init__(self, disk: SyncFormatAccess, *, size: int, steps: Steps) -> None:
        """Expect as many of the job's steps for each such storage as the disk has bytes: ``size``.

        An image's own storage comes last: what it says of its data file is not to be seen before
        the data.
        """
        self._disk = disk
        self._size = size
        self._steps = steps
        handles = reversed(disk.inner.collect_storage_dependencies())
        storages = [handle.storage for handle in handles if handle.writable()]
        self._storages = [storage for storage in storages if offers(storage, Publishing)]
        steps.expect(size * len(self._storages))

    def publish(self) -> None:
        """Do it."""
        self._disk.flush()
        for storage in self._storages:
            begun = self._steps.done
            storage.publish(self._steps.part(self._size))
            self._steps.reach(begun + self._size)
        self._disk.sync()
