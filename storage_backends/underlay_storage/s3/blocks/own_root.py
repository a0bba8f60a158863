"""The root of one writer: it takes the place only of the root that this writer wrote before.

Whoever finds another one's there has been shut out, and never writes a root again.
"""

from __future__ import annotations

import errno
from typing import Final

import attrs

from underlay.errors import StorageChangedError, StorageError, StorageNotFoundError
from underlay_storage.s3.blocks.layout import Root
from underlay_storage.s3.blocks.objects import Objects, Published

__all__ = ["OwnRoot"]

#: How often a root is tried again that met an earlier try of its own writer.
_TRIES: Final = 5


class OwnRoot:
    """What its writer knows of it. Replacing and removing it are one caller's turn at a time."""

    def __init__(self, objects: Objects, published: Published) -> None:
        #: The last one that is known to be there.
        self.published = published
        self._objects = objects
        self._writer = published.root.writer
        self._lost: StorageChangedError | None = None

    @property
    def is_lost(self) -> bool:
        """Whether somebody else has taken over, or it was removed here."""
        return self._lost is not None

    def check(self) -> None:
        """Raise ``StorageChangedError`` if it is lost."""
        if self._lost is not None:
            raise StorageChangedError(str(self._lost))

    def swap(self, root: Root) -> Root:
        """Put ``root`` in the place of the one that was published last, as the next generation.

        Raises:
            StorageChangedError: somebody else has taken over.
            StorageError: it is not certain whether it was done.
        """
        last = self.published.root.generation
        etag = self.published.etag
        for _ in range(_TRIES):
            root = attrs.evolve(root, generation=last + 1)
            try:
                self.published = self._objects.replace_root(root, etag)
            except (StorageChangedError, StorageNotFoundError):
                found = self._found()
            else:
                return root
            if found.root.generation < last:
                raise StorageError(
                    f"'{self._objects}': the server answers with a root that is older than one "
                    "that it has acknowledged",
                    errno=errno.EIO,
                )
            # An earlier try of ours, whose answer never came: what it shows is not asked for.
            last, etag = found.root.generation, found.etag
        raise StorageError(
            f"'{self._objects}': its root could not be replaced; try again", errno=errno.EIO
        )

    def remove(self) -> None:
        """Take it away, if it is still there.

        Raises:
            StorageChangedError: somebody else has taken over.
        """
        self._found()
        self._lost = StorageChangedError(f"'{self._objects}' was removed here")
        self._objects.delete_root()

    def _found(self) -> Published:
        """The root that is there, if it is of this writer."""
        try:
            found = self._objects.read_root()
        except StorageNotFoundError:
            found = None
        if found is not None and found.root.writer == self._writer:
            return found
        what = "removed" if found is None else "taken over by another writer"
        self._lost = StorageChangedError(
            f"'{self._objects}' was {what} since it was opened: that stands, and what was "
            "written here since the last sync is lost; open it again"
        )
        raise self._lost
