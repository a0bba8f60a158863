"""The object in the bucket behind an open handle: the version that is read, and its successor.

The entity tag (ETag) is pinned when it is opened, and every request is conditional on it, so that
bytes of two versions never mix. It is replaced whole, on the condition that nobody else has done so
meanwhile: of two writers the later one learns it, and never writes again.
"""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Callable, Hashable, Mapping
from typing import Final, Self

from underlay.errors import (
    ConflictError,
    ReadOnlyError,
    StorageChangedError,
    StorageExistsError,
    StorageNotFoundError,
    UnsupportedOperationError,
)
from underlay.steps import StepsCallback
from underlay_storage.s3.client import ObjectClient
from underlay_storage.s3.conditions import require_conditions
from underlay_storage.s3.facts import CREATE, Condition, Facts
from underlay_storage.s3.location import Location, locate
from underlay_storage.s3.multipart import publish
from underlay_storage.s3.settings import Settings

__all__ = ["Published", "connect"]

#: What the first request brings along: of a typical image the header, the tables of counts and the
#: first of the tables that lead to the data.
_HEAD: Final = 512 << 10
#: Of what does not exist yet.
_NOTHING: Final = Facts(size=0, etag=None, write_id=None)


class Published:
    """One object, as one handle knows it. Reading is thread-safe; publishing is its user's turn."""

    def __init__(
        self, client: ObjectClient, key: str, *, facts: Facts, condition: Condition | None
    ) -> None:
        """``condition``: what has to hold when it is replaced; None where nobody else writes."""
        self.settings = client.settings
        self.location = client.location.at(key)
        self.name = str(self.location)
        #: What is read.
        self.facts = facts
        #: Held while it is being replaced.
        self.replacing = threading.Lock()
        self._client = client
        self._key = key
        self._condition = condition
        #: The write of a publication that failed, and may yet have been made.
        self._doubtful: str | None = None
        #: Why nothing is published any more.
        self._fence: ConflictError | None = None
        #: Whether this handle made an object where there was none.
        self._made = False

    @classmethod
    def find(
        cls, name: str, options: Mapping[str, object], *, writable: bool
    ) -> tuple[Self, memoryview]:
        """The object of a URL, and its first bytes; raises as ``BlockingStorage.open`` does.

        One request; to be sure of writing a few more, once for each bucket that is in use.
        """
        location, client = connect(name, options, writable=writable)
        head = client.get(location.key, 0, _HEAD)
        condition = _condition(client, location.key, head.facts) if writable else None
        return cls(client, location.key, facts=head.facts, condition=condition), head.data

    @classmethod
    def begin(cls, name: str, options: Mapping[str, object], *, overwrite: bool) -> Self:
        """An object that is to be; raises as ``BlockingStorage.create_open`` does.

        Nothing is made yet. One that exists is replaced when it is published, and not before.
        """
        location, client = connect(name, options, writable=True)
        try:
            present = client.head(location.key)
        except StorageNotFoundError:
            present = None
        if present is not None and not overwrite:
            raise StorageExistsError(
                f"'{location}' exists; choose another name, or allow it to be overwritten",
                filename=str(location),
            )
        condition = _condition(client, location.key, present)
        return cls(client, location.key, facts=_NOTHING, condition=condition)

    def identity(self) -> Hashable:
        """The server, the bucket and the key."""
        access = self._client.access
        if access is None:
            # On Azure containers are an account's.
            server: Hashable = (self.settings.endpoint, self.settings.access_key_id)
        else:
            server = access.endpoint
        return self.location.scheme, server, self.location.bucket, self._key

    # -- reading

    def fetch(self, offset: int, length: int) -> memoryview:
        """These bytes of the version that was opened, or of the one that replaced it here.

        Those are for ranges that nothing published here has changed. Short where it has become
        shorter.

        Raises:
            StorageChangedError: somebody else has written or removed it.
        """
        while True:
            facts = self.facts
            try:
                return self.fetch_exactly(facts, offset, length)
            except StorageChangedError:
                with self.replacing:
                    if self.facts is facts:
                        raise

    def fetch_exactly(self, facts: Facts, offset: int, length: int) -> memoryview:
        """These bytes of one version, or those that it has; raises as ``fetch`` does."""
        try:
            got = self._client.get(self._key, offset, length, etag=facts.etag)
        except StorageNotFoundError:
            raise self._removed() from None
        expected = max(min(length, facts.size - offset), 0)
        if got.facts.version != facts.version or len(got.data) != expected:
            raise StorageChangedError(
                f"'{self.name}' was changed by somebody while it was open: open it again"
            )
        return got.data

    def _removed(self) -> StorageChangedError:
        return StorageChangedError(f"'{self.name}' was removed by somebody while it was open")

    # -- replacing

    def check(self) -> None:
        """Raise what the lost publication raised, if one was lost."""
        if self._fence is not None:
            raise copy.copy(self._fence)

    def replace(
        self,
        content: Callable[[int, int], bytearray],
        *,
        size: int,
        changes: Callable[[], list[tuple[int, int]]],
        progress: StepsCallback | None = None,
    ) -> None:
        """Publish ``size`` bytes, which ``content(offset, length)`` gives, as the object.

        ``changes`` tells offset and length of what differs from the present version. ``progress``
        counts bytes. The caller holds ``replacing``.

        Raises:
            StorageChangedError, StorageExistsError: somebody else has written it: what they wrote
                stands, and nothing is published here any more.
            StorageError: it could not be published; it may be tried again.
        """
        self.check()
        try:
            if self._doubtful is not None:
                self._settle_doubt()
            self._doubtful = write_id = uuid.uuid4().hex
            etag = publish(
                self._client,
                self._key,
                content,
                size=size,
                write_id=write_id,
                condition=self._condition,
                changed=None if self.facts is _NOTHING else changes(),
                present=self.facts.size,
                progress=progress,
            )
        except ConflictError as error:
            self._fence = error
            raise
        except StorageNotFoundError as error:
            if self._condition in {None, CREATE}:
                raise
            self._fence = self._removed()
            raise self._fence from error
        self._follow(Facts(size=size, etag=etag, write_id=write_id))

    def _settle_doubt(self) -> None:
        """Find out whether the last publication, which seemed to fail, was made after all."""
        try:
            facts = self._client.head(self._key)
        except StorageNotFoundError:
            return
        if facts.write_id == self._doubtful:
            self._follow(facts)

    def _follow(self, facts: Facts) -> None:
        """From now on this is the version that is read, and the one to be replaced."""
        self._made = self._made or self._condition == CREATE
        if facts.etag is None:
            facts = self._client.head(self._key)
        self.facts = facts
        self._doubtful = None
        if self._condition is not None:
            self._condition = Condition(facts.etag)

    def withdraw(self) -> None:
        """Remove what was published, if that was a new object and is still this one.

        Not every server can delete under a condition: somebody who writes it at this very moment
        loses that.
        """
        if self._made:
            try:
                present = self._client.head(self._key)
            except StorageNotFoundError:
                return
            if present.write_id == self.facts.write_id:
                self._client.delete([self._key])


def connect(
    name: str, options: Mapping[str, object], *, writable: bool
) -> tuple[Location, ObjectClient]:
    """What a URL names, and the client for it; raises as ``BlockingStorage.open`` does."""
    location = locate(name)
    if writable and location.is_web:
        raise ReadOnlyError(f"'{location}' cannot be written: pages of the web are read-only")
    return location, ObjectClient.connect(location, Settings.read(options))


def _condition(client: ObjectClient, key: str, present: Facts | None) -> Condition | None:
    """What has to hold when the object is published; None where nobody else writes.

    Raises:
        UnsupportedOperationError: the server could not tell of another writer.
    """
    require_conditions(client, key)
    if client.settings.single_writer:
        return None
    if present is None:
        return CREATE
    if present.etag is None:
        raise UnsupportedOperationError(
            f"The server gives '{client.location.at(key)}' no entity tag: another writer could not "
            "be noticed. If nobody else writes there, say single_writer=on"
        )
    return Condition(present.etag)
