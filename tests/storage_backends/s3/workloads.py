"""One request of each kind, to be disturbed; what each gives is looked at."""

from __future__ import annotations

import os
from typing import Any

from underlay_storage.s3.client import CREATE, Condition, ObjectClient
from underlay_storage.s3.multipart import publish
from underlay_storage.s3.retrying import Retrying

from .proxy import Fault, Script
from .servers import BUCKET

__all__ = [
    "BODY",
    "DISK",
    "MIB",
    "SMALL_REQUESTS",
    "first",
    "impatient",
    "pending",
    "small_requests",
    "upload_requests",
]

MIB = 1 << 20
BODY = bytes(range(256)) * 400
#: How many ``small_requests`` are.
SMALL_REQUESTS = 8
DISK = os.urandom(6 * MIB)


def first(verb: str, fault: Fault) -> Script:
    """The first request of a kind."""
    waiting = [fault]
    return lambda request: waiting.pop() if waiting and request.verb == verb else None


def small_requests(client: ObjectClient, folder: str) -> None:
    """One of each request of one piece; what each gives is right."""
    key = f"{folder}/a"
    etag = client.put(key, BODY, write_id="one", condition=CREATE)
    got = client.get(key, 1000, 5000, etag=etag)
    assert (bytes(got.data), got.facts.etag, got.facts.size) == (BODY[1000:6000], etag, len(BODY))
    assert client.head(key) == got.facts
    new = client.put(key, BODY[::-1], write_id="two", condition=Condition(etag))
    assert bytes(client.get(key, 0, len(BODY), etag=new).data) == BODY[::-1]
    assert [one.key for one in client.listing(folder)] == [key]
    client.delete([key])
    client.put(key, b"last", write_id="three")


def impatient(client: ObjectClient) -> ObjectClient:
    """Gives up after two tries, for faults that do not pass."""
    client._retrying = Retrying(deadline=0.1)
    return client


def upload_requests(client: ObjectClient, folder: str) -> None:
    """Uploads in parts: a new object, and one with a part that is copied."""
    key = f"{folder}/disk"
    etag = publish(
        client,
        key,
        lambda start, length: DISK[start : start + length],
        size=len(DISK),
        write_id="one",
        condition=CREATE,
    )
    data = DISK[: 5 * MIB] + b"tail"
    new = publish(
        client,
        key,
        lambda start, length: data[start : start + length],
        size=len(data),
        write_id="two",
        condition=Condition(etag),
        changed=[(5 * MIB, 4)],
        present=len(DISK),
    )
    got = client.get(key, 0, 8 * MIB, etag=new)
    assert bytes(got.data) == data
    assert (got.facts.write_id, got.facts.etag) == ("two", new)


def pending(client: ObjectClient, folder: str) -> list[Any]:
    """Uploads in parts that somebody began and did not end."""
    uploads: Any = client.uploads
    answer = uploads._client.list_multipart_uploads(Bucket=BUCKET)
    return [one for one in answer.get("Uploads", ()) if one["Key"].startswith(folder)]
