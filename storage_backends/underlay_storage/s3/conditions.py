"""Whether a server honours the conditions of a write: some answer 200 and overwrite."""

from __future__ import annotations

import contextlib
import uuid
from typing import Final

from underlay.errors import (
    StorageChangedError,
    StorageExistsError,
    UnderlayError,
    UnsupportedOperationError,
)
from underlay_storage.s3.client import ObjectClient
from underlay_storage.s3.facts import CREATE, Condition
from underlay_storage.s3.problems import Kind, RequestFailedError
from underlay_storage.s3.requesting import UploadLostError

__all__ = ["UPLOADS", "WRITES", "probe_folder", "require_conditions"]

WRITES: Final = "conditions of writes"
UPLOADS: Final = "conditions of uploads in parts"

#: No object has this ETag.
_NOBODYS: Final = f'"{"0" * 32}"'


def require_conditions(client: ObjectClient, key: str, what: str = WRITES) -> None:
    """Refuse to write where a second writer could not be noticed.

    Tried with a tiny object beside ``key``, once for each client: for ``WRITES``, and where S3 is
    spoken for ``UPLOADS`` (in parts). With ``single_writer`` there is no need to know.

    Raises:
        UnsupportedOperationError: the server does not honour conditions.
        And what every request raises.
    """
    if client.settings.single_writer:
        return
    with client.learning:
        if what not in client.honoured:
            beside = f"{probe_folder(key)}/{uuid.uuid4().hex}"
            client.honoured[what] = _TRIALS[what](client, beside)
    if not client.honoured[what]:
        raise UnsupportedOperationError(
            f"The server of '{client.location.at(key)}' ignores {what}: two writers could ruin "
            "each other's work unnoticed. If nobody else writes there, say single_writer=on"
        )


def probe_folder(key: str) -> str:
    """Where the tiny objects beside ``key`` are, for as long as it takes to try."""
    return f"{key}.underlay-probe"


def _honours_conditions(client: ObjectClient, key: str) -> bool:
    etag = client.put(key, b"1", write_id=uuid.uuid4().hex, condition=CREATE)
    try:
        return (
            etag is not None
            and not _writes(client, key, CREATE)
            and not _writes(client, key, Condition(_NOBODYS))
            and _writes(client, key, Condition(etag))
        )
    finally:
        client.delete([key])


def _writes(client: ObjectClient, key: str, condition: Condition) -> bool:
    try:
        client.put(key, b"2", write_id=uuid.uuid4().hex, condition=condition)
    except (StorageExistsError, StorageChangedError, UnsupportedOperationError):
        return False
    return True


def _honours_upload_conditions(client: ObjectClient, key: str) -> bool:
    uploads = client.uploads
    client.put(key, b"1", write_id=uuid.uuid4().hex)
    try:
        upload = client.request(lambda: uploads.create(key, {}), doing="write", key=key)
        try:
            part = client.request(
                lambda: uploads.send(key, upload, 1, b"2"), doing="write", key=key
            )
            return all(
                _refuses(client, key, upload, part, condition)
                for condition in ({"IfNoneMatch": "*"}, {"IfMatch": _NOBODYS})
            )
        finally:
            with contextlib.suppress(UnderlayError, UploadLostError):
                client.request(lambda: uploads.abort(key, upload), doing="write", key=key)
    finally:
        client.delete([key])


def _refuses(
    client: ObjectClient, key: str, upload: str, part: str, condition: dict[str, str]
) -> bool:
    """Whether the server does not make an object under a condition that does not hold."""

    def attempt() -> bool:
        try:
            client.uploads.complete(key, upload, [part], condition)
        except RequestFailedError as failure:
            if failure.problem.kind in {Kind.TRANSIENT, Kind.UNREACHED}:
                raise
            return failure.problem.kind is Kind.CONDITION
        return False

    return client.request(attempt, doing="write", key=key)


_TRIALS: Final = {WRITES: _honours_conditions, UPLOADS: _honours_upload_conditions}
