"""The objects of one disk in their bucket: the root, what it names, and marks.

Everything but the root has a name that nobody had before, and never changes.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final

import attrs

from underlay.errors import (
    InvalidImageError,
    StorageError,
    StorageExistsError,
    StorageNotFoundError,
    UnsupportedOperationError,
)
from underlay_storage.s3.blocks.layout import (
    ROOT_MOST,
    Name,
    Ref,
    Root,
    checksum,
    pack_root,
    parse_name,
    unpack_root,
    unpack_segment,
)
from underlay_storage.s3.client import CREATE, Condition, Listed, ObjectClient
from underlay_storage.s3.conditions import probe_folder

__all__ = ["DamagedError", "Found", "Objects", "Published"]

_OBJECTS: Final = "objects"
_MARKS: Final = "marks"


class DamagedError(StorageError):
    """An object is there, and has other bytes than were written."""


@attrs.frozen
class Published:
    """A root, and how the server tells it from others."""

    root: Root
    etag: str | None


@attrs.frozen(kw_only=True)
class Found:
    """An object in the listing of a disk."""

    listed: Listed
    #: ``root``, ``object``, ``mark``, ``probe`` (of conditions), or None for what is nobody's.
    kind: str | None
    #: Of an object or a mark.
    name: Name | None = None


@attrs.frozen
class Objects:
    """Reads and writes of one disk's objects. Thread-safe. Raises what the client raises."""

    client: ObjectClient
    #: The prefix of all keys, without a slash at its end.
    prefix: str
    #: Whether roots are written under conditions; without, somebody promised to be alone.
    conditional: bool = True

    def __str__(self) -> str:
        return str(self.client.location.at(self.prefix))

    # -- the root

    def read_root(self) -> Published:
        """The root as it is now.

        Raises:
            StorageNotFoundError: there is no such disk.
            InvalidImageError, UnsupportedFeatureError: what is there is none, or a later one.
        """
        got = self.client.get(self._root_key, 0, ROOT_MOST + 1)
        return Published(unpack_root(got.data, what=f"The root of '{self}'"), got.facts.etag)

    def create_root(self, root: Root) -> Published:
        """Write the first root.

        Raises:
            StorageExistsError: there is one.
        """
        if not self.conditional:
            # Looking first is all that can be done.
            with suppress(StorageNotFoundError):
                self.client.head(self._root_key)
                raise StorageExistsError(
                    f"'{self}' exists; overwriting it was not asked for", filename=str(self)
                )
        return self._write_root(root, CREATE)

    def root_facts(self) -> tuple[int, str | None]:
        """The generation of the root (0 where it is damaged), and its ETag."""
        try:
            found = self.read_root()
        except InvalidImageError:
            return 0, self.client.head(self._root_key).etag
        return found.root.generation, found.etag

    def replace_root(self, root: Root, old: str | None) -> Published:
        """Write a root in the place of the one with the ETag ``old``.

        Raises:
            StorageChangedError: there is another one by now.
        """
        if old is None and self.conditional:
            raise UnsupportedOperationError(
                f"'{self}': the server gives no ETag, so that two writers could not be kept "
                "apart; say single_writer=on if nobody else writes"
            )
        return self._write_root(root, None if old is None else Condition(old))

    def _write_root(self, root: Root, condition: Condition | None) -> Published:
        etag = self.client.put(
            self._root_key,
            pack_root(root),
            write_id=secrets.token_hex(16),
            condition=condition if self.conditional else None,
        )
        return Published(root, etag)

    def delete_root(self) -> None:
        """Take the whole disk away: what it named is of nobody then."""
        self.client.delete([self._root_key])

    # -- what it names

    def read(self, ref: Ref) -> memoryview:
        """The bytes of an object, all of them and no others.

        Raises:
            StorageNotFoundError: it is not there.
            DamagedError: it is there, with other bytes.
        """
        for _ in range(2):  # the second time, what was damaged on its way is right
            got = self.client.get(self._key(ref.name), 0, ref.length)
            if len(got.data) == got.facts.size == ref.length and checksum(got.data) == ref.checksum:
                return got.data
        raise DamagedError(
            f"'{self.client.location.at(self._key(ref.name))}' is damaged: its bytes are not those "
            "that were written",
            errno=errno.EIO,
        )

    def read_segment(self, place: int, ref: Ref, root: Root) -> dict[int, Ref]:
        """The blocks of a segment of ``root``, by their slots."""
        what = f"The index of '{self}' ({ref.name})"
        return unpack_segment(self.read(ref), place, root, what=what)

    def write(self, name: Name, data: bytes | memoryview) -> Ref:
        """Write an object that is new, and be sure that it is there."""
        self.client.put(self._key(name), data, write_id=str(name))
        return Ref(name, len(data), checksum(data))

    def delete(self, names: Iterable[Name]) -> None:
        """Remove objects; those that are not there are no error."""
        self.client.delete(self._key(name) for name in names)

    # -- marks

    def read_mark(self, name: Name, most: int) -> memoryview:
        """Up to ``most`` bytes of a mark."""
        return self.client.get(self._mark_key(name), 0, most).data

    def write_mark(self, name: Name, data: bytes) -> None:
        """Write a mark."""
        self.client.put(self._mark_key(name), data, write_id=str(name))

    def delete_marks(self, names: Iterable[Name]) -> None:
        """Remove marks."""
        self.client.delete(self._mark_key(name) for name in names)

    # -- all of them

    def delete_probes(self, keys: Iterable[str]) -> None:
        """Remove what a writer left who was killed while it tried conditions."""
        self.client.delete(keys)

    def listing(self) -> Iterator[Found]:
        """All that lies under the prefix."""
        for listed in self.client.listing(self.prefix):
            kind: str | None = None
            name = None
            folder, _, last = listed.key[len(self.prefix) + 1 :].rpartition("/")
            if listed.key == self._root_key:
                kind = "root"
            elif listed.key.startswith(f"{probe_folder(self._root_key)}/"):
                kind = "probe"
            elif folder in {_OBJECTS, _MARKS}:
                name = parse_name(last)
                if name is not None:
                    kind = "object" if folder == _OBJECTS else "mark"
            yield Found(listed=listed, kind=kind, name=name)

    @property
    def _root_key(self) -> str:
        return f"{self.prefix}/root"

    def _key(self, name: Name) -> str:
        return f"{self.prefix}/{_OBJECTS}/{name}"

    def _mark_key(self, name: Name) -> str:
        return f"{self.prefix}/{_MARKS}/{name}"
