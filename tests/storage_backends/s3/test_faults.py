"""What networks and servers do now and then, to a client: O1-O9, O12 and O13."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from underlay.errors import (
    StorageChangedError,
    StorageError,
    StorageExistsError,
    UnsupportedOperationError,
)
from underlay_storage.s3.client import CREATE, Condition, ObjectClient
from underlay_storage.s3.conditions import require_conditions

from .conftest import MakeClient
from .proxy import (
    LOST_AFTER,
    LOST_BEFORE,
    Answer,
    Fault,
    Proxy,
    Request,
    answered,
    cut,
    edited,
    edited_header,
    flipped,
    no_fault,
    nth,
    whole,
)
from .servers import Server
from .workloads import (
    BODY,
    DISK,
    SMALL_REQUESTS,
    Waits,
    first,
    impatient,
    pending,
    small_requests,
    upload_requests,
)

STATUSES = [(500, "InternalError"), (502, None), (503, "SlowDown"), (429, "TooManyRequests")]


# -- O1, O2: refusals that pass, or do not


@pytest.mark.parametrize(("status", "code"), STATUSES)
def test_o1_any_request_that_fails_once_is_made_again(
    through: MakeClient, proxy: Proxy, prefix: str, status: int, code: str | None
) -> None:
    client = through()
    for number in range(1, SMALL_REQUESTS + 1):
        with proxy.scripted(nth(number, answered(status, code))) as requests:
            small_requests(client, f"{prefix}/{number}")
        assert len(requests) == SMALL_REQUESTS + 1


def test_o1_any_request_of_an_upload_that_fails_once_is_made_again(
    proxy: Proxy, uploader: ObjectClient, client: ObjectClient, prefix: str
) -> None:
    with proxy.scripted(no_fault) as requests:
        upload_requests(uploader, f"{prefix}/0")
    count = len(requests)
    for number in range(1, count + 1):
        status, code = STATUSES[number % len(STATUSES)]
        with proxy.scripted(nth(number, answered(status, code))) as requests:
            upload_requests(uploader, f"{prefix}/{number}")
        assert len(requests) == count + 1
    assert pending(client, prefix) == []


@pytest.mark.parametrize("fault", [answered(503, "SlowDown"), LOST_BEFORE])
def test_o2_what_fails_forever_ends_at_the_deadline(
    through: MakeClient,
    proxy: Proxy,
    client: ObjectClient,
    prefix: str,
    *,
    waits: Waits,
    fault: Fault,
) -> None:
    client.put(f"{prefix}/a", BODY, write_id="one")
    etag = client.head(f"{prefix}/a").etag
    asking = through(deadline=30)
    attempts: list[Callable[[], object]] = [
        lambda: asking.get(f"{prefix}/a", 0, 100),
        lambda: asking.put(f"{prefix}/a", b"new", write_id="two", condition=Condition(etag)),
    ]
    for attempt in attempts:
        began = waits.now
        with (
            proxy.scripted(lambda _: fault) as requests,
            pytest.raises(StorageError, match=r"tried \d+ times"),
        ):
            attempt()
        assert waits.now - began < 30
        assert len(requests) > 2
    assert client.head(f"{prefix}/a").etag == etag


# -- O3, O4: the server did it, and the answer was lost


def test_o3_a_write_whose_answer_was_lost_is_no_conflict_with_itself(
    through: MakeClient, proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    key = f"{prefix}/a"
    asking = through()
    with proxy.scripted(nth(1, LOST_AFTER)) as requests:
        etag = asking.put(key, BODY, write_id="one", condition=CREATE)
    assert [request.verb for request in requests] == ["PUT", "PUT", "HEAD"]
    assert client.head(key).etag == etag
    with proxy.scripted(nth(1, LOST_AFTER)):
        new = asking.put(key, BODY[::-1], write_id="two", condition=Condition(etag))
    assert client.head(key).etag == new != etag
    with proxy.scripted(nth(1, LOST_AFTER)):
        asking.put(key, BODY, write_id="three")
    assert client.head(key).write_id == "three"


def test_o3_a_lost_answer_does_not_hide_somebody_elses_write(
    through: MakeClient, proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    key = f"{prefix}/a"
    etag = client.put(key, b"old", write_id="one")

    def overtaken(request: Request) -> Fault | None:
        if request.number == 1:
            client.put(key, b"theirs", write_id="theirs", condition=Condition(etag))
            return LOST_BEFORE
        return None

    with proxy.scripted(overtaken), pytest.raises(StorageChangedError):
        through().put(key, b"ours", write_id="ours", condition=Condition(etag))
    assert client.head(key).write_id == "theirs"


@pytest.mark.parametrize(
    "fault",
    [
        LOST_AFTER,
        LOST_BEFORE,
        # How S3 says that it failed when it has begun to answer already.
        answered(200, "InternalError"),
        answered(404, "NoSuchUpload"),
        answered(409, "ConditionalRequestConflict"),
    ],
)
def test_o4_the_end_of_an_upload_is_certain(
    proxy: Proxy, uploader: ObjectClient, client: ObjectClient, prefix: str, fault: Fault
) -> None:
    with proxy.scripted(first("CompleteUpload", fault)):
        upload_requests(uploader, prefix)
    assert [one.key for one in client.listing(prefix)] == [f"{prefix}/disk"]
    assert pending(client, prefix) == []


def test_o4_an_upload_that_the_server_lost_is_begun_anew(
    proxy: Proxy, uploader: ObjectClient, client: ObjectClient, prefix: str
) -> None:
    with proxy.scripted(first("UploadPart", answered(404, "NoSuchUpload"))) as requests:
        upload_requests(uploader, prefix)
    assert [request.verb for request in requests].count("CreateUpload") == 3
    assert pending(client, prefix) == []


# -- O5 to O7: answers that are not what they say


@pytest.mark.parametrize("chunked", [False, True])
def test_o5_a_body_that_ends_early_is_asked_for_again(
    through: MakeClient, proxy: Proxy, client: ObjectClient, prefix: str, *, chunked: bool
) -> None:
    client.put(f"{prefix}/a", BODY, write_id="one")
    asking = impatient(through())
    for at in (0, 1, 5000, len(BODY) - 1):
        with proxy.scripted(nth(1, cut(at, chunked=chunked))):
            assert bytes(asking.get(f"{prefix}/a", 0, len(BODY)).data) == BODY
    with (
        proxy.scripted(lambda _: cut(5000, chunked=chunked)),
        pytest.raises(StorageError, match="tried"),
    ):
        asking.get(f"{prefix}/a", 0, len(BODY))


def test_o6_a_flipped_bit_is_for_checksums_above_the_client_to_find(
    through: MakeClient, proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    # As documented: over TLS it cannot happen; a range of an object has no checksum of its own.
    client.put(f"{prefix}/a", BODY, write_id="one")
    with proxy.scripted(nth(1, flipped(10))):
        assert through().get(f"{prefix}/a", 0, 100).data[10] == BODY[10] ^ 1


@pytest.mark.parametrize(
    "fault",
    [
        whole(BODY),
        edited_header("Content-Range", lambda _: f"bytes 0-99/{len(BODY)}"),
        edited_header("Content-Range", lambda _: f"bytes 1000-1050/{len(BODY)}"),
        edited_header("Content-Range", lambda _: "bytes 1000-1099/5"),
        edited_header("Content-Range", lambda _: "bytes of all kinds"),
        edited_header("Content-Range", lambda _: None),
        edited(lambda answer: Answer(status=206, headers=answer.headers, body=answer.body[:50])),
        edited(lambda answer: Answer(status=206, headers=answer.headers, body=answer.body * 9)),
    ],
)
def test_o7_another_range_than_was_asked_for_is_never_taken_for_it(
    through: MakeClient, proxy: Proxy, client: ObjectClient, prefix: str, fault: Fault
) -> None:
    client.put(f"{prefix}/a", BODY, write_id="one")
    asking = impatient(through())
    with proxy.scripted(nth(1, fault)):
        assert bytes(asking.get(f"{prefix}/a", 1000, 100).data) == BODY[1000:1100]
    with (
        proxy.scripted(lambda request: fault if request.verb == "GET" else None),
        pytest.raises((StorageError, UnsupportedOperationError)),
    ):
        asking.get(f"{prefix}/a", 1000, 100)


# -- O8, O9: bodies and races


@pytest.mark.parametrize("fault", [answered(503, "SlowDown"), LOST_BEFORE, LOST_AFTER])
def test_o8_a_body_that_is_sent_again_is_sent_whole(
    proxy: Proxy, uploader: ObjectClient, client: ObjectClient, prefix: str, fault: Fault
) -> None:
    with proxy.scripted(nth(1, fault)) as requests:
        uploader.put(f"{prefix}/a", DISK, write_id="one")
    assert [len(request.body) for request in requests] == [len(DISK)] * 2
    assert bytes(client.get(f"{prefix}/a", 0, len(DISK)).data) == DISK
    with proxy.scripted(first("UploadPart", fault)):
        upload_requests(uploader, prefix)


def test_o9_a_race_is_run_again_and_a_lost_one_is_lost(
    through: MakeClient, proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    key = f"{prefix}/a"
    asking = through()
    race = answered(409, "ConditionalRequestConflict")
    with proxy.scripted(nth(1, race)):
        etag = asking.put(key, b"1", write_id="one", condition=CREATE)
    with proxy.scripted(nth(1, race)):
        etag = asking.put(key, b"2", write_id="two", condition=Condition(etag))
    client.put(key, b"3", write_id="theirs")
    with proxy.scripted(nth(1, race)), pytest.raises(StorageChangedError):
        asking.put(key, b"4", write_id="four", condition=Condition(etag))
    with proxy.scripted(nth(1, race)), pytest.raises(StorageExistsError):
        asking.put(key, b"4", write_id="four", condition=CREATE)
    with (
        proxy.scripted(lambda request: race if request.verb == "PUT" else None),
        pytest.raises(StorageError, match="409"),
    ):
        impatient(asking).put(key, b"4", write_id="four", condition=CREATE)
    assert client.head(key).write_id == "theirs"


# -- O12, O13: ETags and conditions


NO_ETAG: dict[str, Callable[[str], str | None]] = {
    "none": lambda _: None,
    "weak": lambda etag: f"W/{etag}",
    "weak in small letters": lambda etag: f"w/{etag}",
    "empty": lambda _: "",
}


@pytest.mark.parametrize("change", NO_ETAG)
def test_o12_without_an_etag_for_the_bytes_there_is_no_writing_with_others(
    through: MakeClient,
    proxy: Proxy,
    prefix: str,
    change: str,
) -> None:
    key = f"{prefix}/a"
    asking = through()
    with proxy.scripted(lambda _: edited_header("ETag", NO_ETAG[change])):
        assert asking.put(key, BODY, write_id="one") is None
        facts = asking.head(key)
        assert (facts.etag, facts.size, facts.write_id) == (None, len(BODY), "one")
        assert asking.get(key, 0, 10).facts == facts
        with pytest.raises(UnsupportedOperationError, match="single_writer"):
            require_conditions(asking, key)


def test_o12_an_etag_without_quotes_is_the_same_one(
    through: MakeClient, proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    etag = client.put(f"{prefix}/a", BODY, write_id="one")
    with proxy.scripted(lambda _: edited_header("ETag", lambda etag: etag.strip('"'))):
        small_requests(through(), f"{prefix}/in")
        assert through().head(f"{prefix}/a").etag == etag


def test_o13_a_condition_that_was_ignored_once_is_found(
    rclone: Server, seaweed: Server, prefix: str
) -> None:
    with pytest.raises(UnsupportedOperationError, match="two writers"):
        require_conditions(rclone.client(), f"{prefix}/a")
    require_conditions(seaweed.client(), f"{prefix}/a")
