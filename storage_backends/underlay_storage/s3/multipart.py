"""Publishing an object of any size: whole, at once, under a condition, with bounded memory.

What is larger than a part is uploaded in parts, which nobody sees before all of them are there.
What did not change is not sent: the server copies it from the present object.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Final, TypeVar

import attrs

from underlay.errors import UnderlayError, UnsupportedOperationError
from underlay.steps import Steps, StepsCallback
from underlay_storage.s3.client import ObjectClient
from underlay_storage.s3.conditions import UPLOADS, require_conditions
from underlay_storage.s3.facts import WRITE_ID, Condition, strong
from underlay_storage.s3.problems import RequestFailedError
from underlay_storage.s3.requesting import UploadLostError
from underlay_storage.s3.uploads import Uploads

__all__ = ["Part", "plan", "publish"]

T = TypeVar("T")

_MIB: Final = 1 << 20
#: S3 takes no more.
_PARTS_MOST: Final = 10_000
#: How much one request has the server copy; it is silent as long as it copies.
_COPY_MOST: Final = 64 * _MIB
#: How much is put in one request where a server has no conditional uploads in parts.
_WHOLE_MOST: Final = 64 * _MIB
#: How often an upload is begun anew that the server has lost.
_UPLOADS_MOST: Final = 3


@attrs.frozen
class Part:
    """Bytes of the object to be, by their offset and length."""

    start: int
    length: int
    #: They are the same in the present object.
    copied: bool = False


def plan(
    size: int, *, part_size: int, changed: Iterable[tuple[int, int]] | None = None, present: int = 0
) -> list[Part]:
    """The parts of an upload of ``size`` bytes.

    ``changed`` are offset and length of what differs from the present object of ``present`` bytes,
    in order; None: all of it does. Every part but the last has ``part_size`` bytes at least.
    """
    while size > part_size * _PARTS_MOST:
        part_size *= 2
    dirty: set[int] = set()
    for start, length in changed or ():
        dirty.update(range(start // part_size, -(-(start + length) // part_size)))
    parts: list[Part] = []
    for start in range(0, size, part_size):
        length = min(part_size, size - start)
        copied = (
            changed is not None and start + length <= present and start // part_size not in dirty
        )
        last = parts[-1] if parts else None
        if copied and last is not None and last.copied and last.length + length <= _COPY_MOST:
            parts[-1] = Part(last.start, last.length + length, copied=True)
        else:
            parts.append(Part(start, length, copied=copied))
    return parts


def publish(
    client: ObjectClient,
    key: str,
    read: Callable[[int, int], bytes | bytearray],
    *,
    size: int,
    write_id: str,
    condition: Condition | None,
    changed: Sequence[tuple[int, int]] | None = None,
    present: int = 0,
    progress: StepsCallback | None = None,
) -> str | None:
    """Make ``size`` bytes, which ``read(offset, length)`` gives, the object; its ETag.

    ``read`` is called from several threads, for a part at a time, and again for what has to be
    sent again. ``changed`` and ``present`` are as for ``plan``: what did not change is copied from
    the object that ``condition`` names. Memory: ``parallel`` times ``part_size``. ``progress``
    counts bytes, by parts.

    Raises:
        UnsupportedOperationError: the server cannot do this under a condition.
        And what ``ObjectClient.put`` raises: then the object is as it was, and nothing stays.
    """
    settings = client.settings
    if size <= settings.part_size:
        data = read(0, size) if size else b""
        return client.put(key, data, write_id=write_id, condition=condition)
    if not client.location.speaks_s3:
        return _elsewhere(client, key, read, size=size, write_id=write_id, condition=condition)
    if condition is not None:
        require_conditions(client, key, UPLOADS)
    if condition is None or condition.etag is None:
        changed = None
    parts = plan(size, part_size=settings.part_size, changed=changed, present=present)
    steps = Steps(progress, size)
    upload = _Upload(
        client, key, read, parts=parts, write_id=write_id, condition=condition, steps=steps
    )
    for _ in range(_UPLOADS_MOST - 1):
        with contextlib.suppress(UploadLostError):
            return upload.run()
    try:
        return upload.run()
    except UploadLostError:
        raise UnsupportedOperationError(
            f"The server loses uploads in parts: '{client.location.at(key)}' was not written"
        ) from None


def _elsewhere(
    client: ObjectClient,
    key: str,
    read: Callable[[int, int], bytes | bytearray],
    *,
    size: int,
    write_id: str,
    condition: Condition | None,
) -> str | None:
    """Google Cloud Storage and Azure, as far as obstore goes."""
    if size <= _WHOLE_MOST:
        return client.put(key, read(0, size), write_id=write_id, condition=condition)
    if condition is not None and not client.settings.single_writer:
        raise UnsupportedOperationError(
            f"'{client.location.at(key)}' has {size} bytes, and on {client.location.scheme}:// "
            f"what is larger than {_WHOLE_MOST >> 20} MiB, and than part_size, can be written only "
            "where nobody else writes: say single_writer=on if that is so, or a part_size of up to "
            "1G, which takes that much memory"
        )
    step = client.settings.part_size
    return client.put_in_pieces(
        key,
        lambda: (read(start, min(step, size - start)) for start in range(0, size, step)),
        write_id=write_id,
    )


class _Upload:
    """One object's upload; ``run`` may be called again after ``UploadLostError``."""

    def __init__(
        self,
        client: ObjectClient,
        key: str,
        read: Callable[[int, int], bytes | bytearray],
        *,
        parts: Sequence[Part],
        write_id: str,
        condition: Condition | None,
        steps: Steps,
    ) -> None:
        self._client = client
        self._key = key
        self._read = read
        self._parts = parts
        self._write_id = write_id
        self._condition = condition
        self._steps = steps
        self._uploads: Uploads = client.uploads
        #: The server cannot copy.
        self._no_copies = threading.Event()
        self._id = ""

    def run(self) -> str | None:
        metadata = {WRITE_ID: self._write_id}
        self._id = self._request(lambda: self._uploads.create(self._key, metadata))
        try:
            etag = self._complete(self._send_all())
        except BaseException:
            # What failed counts, not that this failed too.
            with contextlib.suppress(UnderlayError, UploadLostError):
                self._request(lambda: self._uploads.abort(self._key, self._id))
            raise
        self._steps.end()
        return etag

    def _send_all(self) -> list[str]:
        """The parts' ETags. When this returns, no request is under way."""
        threads = min(self._client.settings.parallel, len(self._parts))
        with ThreadPoolExecutor(threads, thread_name_prefix="underlay-upload") as pool:
            sent: dict[Future[str], Part] = {
                pool.submit(self._send, number, part): part
                for number, part in enumerate(self._parts, 1)
            }
            done = 0
            try:
                # The first failure ends it all, whichever part it was.
                for one in as_completed(sent):
                    one.result()
                    done += sent[one].length
                    self._steps.reach(done)
            finally:
                pool.shutdown(cancel_futures=True)
            return [one.result() for one in sent]

    def _send(self, number: int, part: Part) -> str:
        etag = self._condition.etag if self._condition is not None else None
        if part.copied and etag is not None:
            if not self._no_copies.is_set():
                try:
                    return self._request(lambda: self._copy(number, part, etag))
                except UnsupportedOperationError:
                    self._no_copies.set()
            got = self._client.get(self._key, part.start, part.length, etag=etag)
            data: bytes | bytearray = bytes(got.data)
        else:
            data = self._read(part.start, part.length)
        return self._request(lambda: self._uploads.send(self._key, self._id, number, data))

    def _copy(self, number: int, part: Part, etag: str) -> str:
        return self._uploads.copy(
            self._key, self._id, number, start=part.start, length=part.length, etag=etag
        )

    def _complete(self, etags: Sequence[str]) -> str | None:
        conditions: dict[str, str] = {}
        if self._condition is not None:
            etag = self._condition.etag
            conditions = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}

        def attempt() -> str | None:
            try:
                done = self._uploads.complete(self._key, self._id, etags, conditions)
            except RequestFailedError as failure:
                return self._client.settle(
                    failure.problem,
                    key=self._key,
                    write_id=self._write_id,
                    condition=self._condition,
                )
            return strong(done)

        return self._request(attempt)

    def _request(self, attempt: Callable[[], T]) -> T:
        return self._client.request(attempt, doing="write", key=self._key)
