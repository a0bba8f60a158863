"""One request of each kind, to be disturbed; what each gives is looked at. And ways to wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
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
    "Waits",
    "first",
    "impatient",
    "pending",
    "small_requests",
    "until",
    "upload_requests",
]

MIB = 1 << 20
BODY = bytes(range(256)) * 400
#: How many ``small_requests`` are.
SMALL_REQUESTS = 8
DISK = os.urandom(6 * MIB)


class Waits:
    """The clock of retries: time passes when one of them waits, and at no other time."""

    def __init__(self) -> None:
        #: Seconds.
        self.now = 100.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def retrying(self, chance: float = 1.0, *, deadline: float = 30) -> Retrying:
        return Retrying(
            deadline=deadline, clock=lambda: self.now, sleep=self.sleep, chance=lambda: chance
        )


def until(condition: Callable[[], bool]) -> None:
    """Wait for what takes but moments."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


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
