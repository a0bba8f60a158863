"""A bucket in memory that does what S3 does, and can be told to write down or to misbehave.

For what needs thousands of runs, or a stop between two requests; all else runs on a real server.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

import attrs

from underlay.errors import (
    StorageChangedError,
    StorageError,
    StorageExistsError,
    StorageNotFoundError,
)
from underlay_storage.s3.client import Condition, Facts, Got, Listed, ObjectClient
from underlay_storage.s3.conditions import WRITES
from underlay_storage.s3.location import Location
from underlay_storage.s3.settings import Settings

__all__ = ["Bucket", "MemoryClient", "Put", "Removal"]


@attrs.frozen
class Put:
    """An object was written; the server acknowledged it."""

    key: str
    data: bytes


@attrs.frozen
class Removal:
    """An object was removed."""

    key: str


@attrs.define
class _Stored:
    data: bytes
    etag: str
    write_id: str
    modified: float


@attrs.define
class Bucket:
    """What a server holds."""

    objects: dict[str, _Stored] = attrs.field(factory=dict[str, _Stored])
    #: Seconds, by its clock.
    now: float = 1_000_000
    lock: threading.RLock = attrs.field(factory=threading.RLock)
    _etags: int = 0

    def store(self, key: str, data: bytes, write_id: str = "") -> str:
        """Write an object, whatever is there."""
        with self.lock:
            self._etags += 1
            etag = f'"{self._etags:032x}"'
            self.objects[key] = _Stored(data, etag, write_id, self.now)
            return etag


class MemoryClient(ObjectClient):
    """A client of such a bucket."""

    def __init__(self, bucket: Bucket | None = None, **options: object) -> None:
        # Not super's: it would make real connections.
        self.location = Location(scheme="s3+blocks", bucket="memory", key="any")
        self.settings = Settings.read(options)
        self.access = None
        self.honoured = {WRITES: True}
        self.learning = threading.Lock()
        self.bucket = bucket or Bucket()
        #: What was acknowledged, in order.
        self.journal: list[Put | Removal] = []
        #: Called with each request before anything comes of it: may raise, or wait.
        self.before: Callable[[str, str], None] = _nothing
        #: The same when it has come to pass, and the answer is on its way.
        self.after: Callable[[str, str], None] = _nothing

    def get(self, key: str, start: int, length: int, *, etag: str | None = None) -> Got:
        self.before("get", key)
        with self.bucket.lock:
            stored = self._stored(key)
            got = Got(data=memoryview(stored.data)[start : start + length], facts=_facts(stored))
        self.after("get", key)
        if etag is not None and got.facts.etag != etag:
            raise StorageChangedError(f"'{key}' was changed")
        return got

    def head(self, key: str) -> Facts:
        self.before("head", key)
        with self.bucket.lock:
            return _facts(self._stored(key))

    def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        *,
        write_id: str,
        condition: Condition | None = None,
    ) -> str | None:
        self.before("put", key)
        with self.bucket.lock:
            there = self.bucket.objects.get(key)
            if condition is not None and (there and there.etag) != condition.etag:
                if there is not None and there.write_id == write_id:
                    return there.etag
                if condition.etag is None:
                    raise StorageExistsError(f"'{key}' exists", filename=key)
                raise StorageChangedError(f"'{key}' was written by somebody else")
            etag = self.bucket.store(key, bytes(data), write_id)
        self.after("put", key)
        self.journal.append(Put(key, bytes(data)))
        return etag

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.before("delete", key)
            with self.bucket.lock:
                self.bucket.objects.pop(key, None)
            self.after("delete", key)
            self.journal.append(Removal(key))

    def listing(self, folder: str) -> Iterator[Listed]:
        self.before("list", folder)
        with self.bucket.lock:
            found = [
                Listed(key=key, size=len(stored.data), modified=stored.modified)
                for key, stored in sorted(self.bucket.objects.items())
                if key.startswith(f"{folder}/")
            ]
        yield from found

    def _stored(self, key: str) -> _Stored:
        try:
            return self.bucket.objects[key]
        except KeyError:
            raise StorageNotFoundError(f"There is no '{key}'", filename=key) from None


def lose(*_request: str) -> None:
    """For ``before`` and ``after``: no answer comes."""
    raise StorageError("no answer came before the deadline")


def _nothing(_request: str, _key: str) -> None:
    """Let it be."""


def _facts(stored: _Stored) -> Facts:
    return Facts(size=len(stored.data), etag=stored.etag, write_id=stored.write_id)
