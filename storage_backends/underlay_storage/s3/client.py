"""Requests to an object store: each is tried until it works, or its deadline is over.

What a request came to is certain: a write whose answer was lost is known again by the id that it
left in the object's metadata.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar

from underlay.errors import (
    StorageChangedError,
    StorageExistsError,
    UnsupportedOperationError,
)
from underlay_storage.s3.aws import Access, access
from underlay_storage.s3.facts import CREATE, WRITE_ID, Condition, Facts, Got, Listed, strong
from underlay_storage.s3.location import Location
from underlay_storage.s3.problems import NO_RANGES, Kind, Problem, problem_of
from underlay_storage.s3.requesting import Requester
from underlay_storage.s3.retrying import TransientError
from underlay_storage.s3.settings import Settings
from underlay_storage.s3.stores import Stores, surroundings
from underlay_storage.s3.uploads import Uploads

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta, PutMode, PutResult

__all__ = [
    "CREATE",
    "WRITE_ID",
    "Condition",
    "Facts",
    "Got",
    "Listed",
    "ObjectClient",
]

T = TypeVar("T")

#: How many keys one request deletes, or one page lists; S3 takes no more.
_PAGE: Final = 1000


class ObjectClient(Requester):
    """Requests to one bucket. Thread-safe; needs no closing.

    Every method raises, besides what it says itself:
        StorageNotFoundError: there is no such object, or no such bucket.
        StorageAccessError: the credentials are wrong, have expired, or do not allow it.
        UnsupportedOperationError: the server does not have what was asked for.
        StorageError: it did not work, or not before the deadline.
    """

    #: So that the images of a chain share connections, and what was learnt of the server.
    _shared: ClassVar[weakref.WeakValueDictionary[object, ObjectClient]] = (
        weakref.WeakValueDictionary()
    )
    _sharing: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, location: Location, settings: Settings, access: Access | None) -> None:
        super().__init__(location, deadline=settings.deadline)
        self.settings = settings
        self.access = access
        self._stores = Stores(location, settings, access)
        self._is_google = location.scheme == "gs"
        #: What ``conditions`` found out of the server so far. It holds ``learning``.
        self.honoured: dict[str, bool] = {}
        self.learning = threading.Lock()

    @classmethod
    def connect(cls, location: Location, settings: Settings) -> ObjectClient:
        """The client for a location's bucket, with the credentials of this moment.

        Nothing is sent yet.

        Raises:
            OptionError: there is an option that the scheme has no use for, or one that it lacks.
            PluginError: the extra ``s3`` is not installed.
            StorageAccessError: no credentials were found.
        """
        settings.require_used(location.scheme)
        found = access(location, settings) if location.speaks_s3 else None
        place = location.scheme, location.bucket
        # A forked child shares no connection with its parent.
        same = os.getpid(), place, settings, found or surroundings()
        with cls._sharing:
            client = cls._shared.get(same)
            if client is None:
                client = cls._shared[same] = cls(location, settings, found)
            return client

    # -- reading

    def get(self, key: str, start: int, length: int, *, etag: str | None = None) -> Got:
        """``length`` bytes (at least one) from ``start`` on, or those that there are.

        With ``etag``, of the object that has it and of no other.

        Raises:
            StorageChangedError: the object has another ETag.
        """
        import obstore

        store = self._stores.reading(length)
        options: GetOptions = {"range": (start, start + length)}
        if etag is not None and not self._is_google:
            options["if_match"] = etag

        wholes = 0

        def attempt() -> Got:
            nonlocal wholes
            try:
                got = self._got(obstore.get(store, key, options=options), start, length)
            except Exception as error:
                kind = problem_of(error).kind
                if kind is Kind.RANGE:
                    got = self._behind_the_end(key, start)
                elif kind is Kind.WHOLE:
                    wholes += 1
                    got = self._small_and_whole(key, start, length, again=wholes > 1)
                else:
                    raise
            # A server may ignore If-Match, and Google was not asked.
            if etag is not None and got.facts.etag != etag:
                raise self.changed(key)
            return got

        return self.request(attempt, doing="read", key=key)

    def _behind_the_end(self, key: str, start: int) -> Got:
        facts = self._facts(key)
        if start < facts.size:
            raise TransientError("the server refused a range that there is")
        return Got(data=memoryview(b""), facts=facts)

    def _small_and_whole(self, key: str, start: int, length: int, *, again: bool) -> Got:
        """For servers that know no ranges: what is small enough is read all the same."""
        import obstore

        size = self._facts(key).size
        if start or length < size:
            if not again:
                raise TransientError(NO_RANGES)
            raise UnsupportedOperationError(
                f"'{self.location.at(key)}' cannot be read in parts: {NO_RANGES}; download it first"
            )
        return self._got(obstore.get(self._stores.reading(length), key), 0, size)

    def head(self, key: str) -> Facts:
        """What is known of an object."""
        return self.request(lambda: self._facts(key), doing="look at", key=key)

    def _facts(self, key: str) -> Facts:
        import obstore

        return self._got_facts(obstore.get(self._stores.small(), key, options={"head": True}))

    def listing(self, folder: str) -> Iterator[Listed]:
        """The objects whose keys begin with ``folder`` and a slash, in the keys' order."""
        import obstore

        store = self._stores.reading(_PAGE << 10)
        after: str | None = None
        while True:

            def page(after: str | None = after) -> list[Listed]:
                # A page that fails is asked for again, from the last key that came.
                stream = obstore.list(  # pyright: ignore[reportUnknownMemberType]
                    store, folder, offset=after, chunk_size=_PAGE
                )
                return [
                    Listed(
                        key=entry["path"],
                        size=entry["size"],
                        modified=entry["last_modified"].timestamp(),
                    )
                    for entry in next(iter(stream), ())
                ]

            listed = self.request(page, doing="list", key=folder)
            yield from listed
            if len(listed) < _PAGE:
                return
            after = listed[-1].key

    # -- writing

    def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        *,
        write_id: str,
        condition: Condition | None = None,
    ) -> str | None:
        """Write an object whole, in one request; its ETag, as in ``Facts``.

        ``write_id`` is as unique as the write: by it a write is known again whose answer was lost.

        Raises:
            StorageExistsError: the condition was that there is none, and there is one.
            StorageChangedError: the condition was another ETag; what others wrote stands.
        """
        import obstore

        store = self._stores.writing(len(data))
        mode: PutMode = "overwrite"
        if condition is not None:
            mode = self._mode(condition)

        def attempt() -> str | None:
            try:
                done = obstore.put(
                    store,
                    key,
                    data,
                    attributes={WRITE_ID: write_id},
                    mode=mode,
                    use_multipart=False,
                )
            except Exception as error:  # noqa: BLE001 - as in request
                return self.settle(
                    problem_of(error), key=key, write_id=write_id, condition=condition
                )
            return self._tag(done)

        return self.request(attempt, doing="write", key=key)

    def _mode(self, condition: Condition) -> PutMode:
        if condition.etag is None:
            return "create"
        if self._is_google:
            return {"version": condition.etag}
        return {"e_tag": condition.etag}

    def settle(
        self, problem: Problem, *, key: str, write_id: str, condition: Condition | None
    ) -> str | None:
        """The ETag of a write that seems to have failed and yet was made, maybe at an earlier try.

        Raises:
            StorageExistsError, StorageChangedError: the condition does not hold.
            TransientError: it is to be tried again.
        """
        name = str(self.location.at(key))
        unclear = {Kind.CONDITION, Kind.DONE, Kind.LOST, Kind.MISSING, Kind.RACE}
        if problem.kind not in unclear or problem.no_bucket:
            raise self.typed(problem, doing="write", key=key)
        facts = self._facts_or_none(key)
        if facts is not None and facts.write_id == write_id:
            return facts.etag
        if problem.kind is Kind.RACE:
            raise TransientError(str(problem))
        if condition is None or problem.kind not in {Kind.CONDITION, Kind.MISSING}:
            raise self.typed(problem, doing="write", key=key)
        if condition.etag is not None:
            raise StorageChangedError(
                f"'{name}' was written by somebody else since it was opened: what they wrote "
                "stands, and what was written here since the last sync is not in it"
            )
        if facts is None:
            raise TransientError("it was there and is gone again")
        raise StorageExistsError(
            f"'{name}' exists; overwriting it was not asked for", filename=name
        )

    def put_in_pieces(
        self, key: str, pieces: Callable[[], Iterable[bytes | bytearray]], *, write_id: str
    ) -> str | None:
        """Write an object of any size, with no condition; its ETag, as in ``Facts``.

        It is nowhere to be seen before all of it is there.
        """
        import obstore

        settings = self.settings

        def attempt() -> str | None:
            done = obstore.put(
                self._stores.writing(settings.part_size),
                key,
                pieces(),
                attributes={WRITE_ID: write_id},
                chunk_size=settings.part_size,
                max_concurrency=settings.parallel,
            )
            return self._tag(done)

        return self.request(attempt, doing="write", key=key)

    @functools.cached_property
    def uploads(self) -> Uploads:
        """The requests of uploads in parts; only where S3 is spoken."""
        assert self.access is not None
        return Uploads(self.location, self.settings, self.access)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there are no error."""
        waiting: list[str] = []
        for key in keys:
            waiting.append(key)
            if len(waiting) == _PAGE:
                self._delete(waiting)
                waiting = []
        if waiting:
            self._delete(waiting)

    def _delete(self, keys: list[str]) -> None:
        import obstore

        # Others than S3 stop at the first that is not there.
        for some in [keys] if self.location.speaks_s3 else [[key] for key in keys]:

            def attempt(some: list[str] = some) -> None:
                try:
                    obstore.delete(self._stores.small(), some)
                except Exception as error:
                    problem = problem_of(error)
                    if problem.kind is not Kind.MISSING or problem.no_bucket:
                        raise

            self.request(attempt, doing="delete", key=some[0])

    # -- every request

    def _facts_or_none(self, key: str) -> Facts | None:
        try:
            return self._facts(key)
        except FileNotFoundError:
            return None

    def _got(self, result: GetResult, start: int, length: int) -> Got:
        facts = self._got_facts(result)
        # One piece, and no more is waited for or kept than that: a server may send without end.
        data = next(iter(result.stream(max(length, 1))), b"")
        if result.range[0] != start or len(data) != min(length, facts.size - start):
            raise TransientError("the server sent another range than was asked for")
        return Got(data=memoryview(data), facts=facts)

    def _got_facts(self, result: GetResult) -> Facts:
        meta = result.meta  # made anew each time
        return Facts(
            size=meta["size"],
            etag=self._tag(meta),
            write_id=result.attributes.get(WRITE_ID),
            modified=meta["last_modified"].timestamp(),
        )

    def _tag(self, said: ObjectMeta | PutResult) -> str | None:
        """What stands for an object's very bytes: an ETag, and Google's number of a generation."""
        return said["version"] if self._is_google else strong(said["e_tag"])
