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
from underlay_storage.s3.client import ObjectClient, UploadLostError
from underlay_storage.s3.facts import CREATE, Condition
from underlay_storage.s3.problems import Kind, RequestFailedError

__all__ = ["require_conditional_uploads", "require_conditions"]

#: No object has this ETag.
_NOBODYS: Final = f'"{"0" * 32}"'


def require_conditions(client: ObjectClient, key: str) -> None:
    """Refuse to write where a second writer could not be noticed.

    Tried with a tiny object beside ``key``, once for each client. With ``single_writer`` there is
    no need to know.

    Raises:
        UnsupportedOperationError: the server does not honour conditions.
        And what every request raises.
    """
    if client.settings.single_writer:
        return
    with client.learning:
        if client.honours_conditions is None:
            client.honours_conditions = _honours_conditions(client, _beside(key))
    if not client.honours_conditions:
        raise _refusal(client, key, "conditions of writes")


def require_conditional_uploads(client: ObjectClient, key: str) -> None:
    """``require_conditions`` for uploads in parts; only where S3 is spoken."""
    if client.settings.single_writer:
        return
    with client.learning:
        if client.honours_upload_conditions is None:
            client.honours_upload_conditions = _honours_upload_conditions(client, _beside(key))
    if not client.honours_upload_conditions:
        raise _refusal(client, key, "conditions of uploads in parts")


def _refusal(client: ObjectClient, key: str, what: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"The server of '{client.location.at(key)}' ignores {what}: two writers could ruin each "
        "other's work unnoticed. If nobody else writes there, say single_writer=on"
    )


def _beside(key: str) -> str:
    return f"{key}.underlay-probe-{uuid.uuid4().hex}"


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
            if failure.problem.kind is Kind.TRANSIENT:
                raise
            return failure.problem.kind is Kind.CONDITION
        return False

    return client.request(attempt, doing="write", key=key)
