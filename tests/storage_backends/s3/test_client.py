"""The client against a real server: what each request gives, and which error says what."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from underlay.errors import (
    OptionError,
    StorageAccessError,
    StorageChangedError,
    StorageError,
    StorageExistsError,
    StorageNotFoundError,
    UnsupportedOperationError,
)
from underlay_storage.s3 import client as client_module
from underlay_storage.s3.client import CREATE, Condition, ObjectClient
from underlay_storage.s3.conditions import UPLOADS, WRITES, require_conditions
from underlay_storage.s3.location import locate
from underlay_storage.s3.multipart import publish
from underlay_storage.s3.settings import Settings

from .conftest import MakeClient
from .proxy import Proxy, answered, no_fault
from .servers import BUCKET, Server
from .workloads import pending

MIB = 1 << 20
STALE = Condition('"00000000000000000000000000000000"')


# -- reading


def test_a_range_comes_with_the_facts_of_the_object(client: ObjectClient, prefix: str) -> None:
    etag = client.put(f"{prefix}/a", bytes(range(100)), write_id="one")
    got = client.get(f"{prefix}/a", 10, 20)
    assert bytes(got.data) == bytes(range(10, 30))
    assert (got.facts.size, got.facts.etag, got.facts.write_id) == (100, etag, "one")
    assert client.head(f"{prefix}/a") == got.facts


@pytest.mark.parametrize(
    ("size", "start", "expected"),
    [(100, 90, 10), (100, 99, 1), (100, 100, 0), (100, 1000, 0), (0, 0, 0)],
)
def test_a_range_ends_where_the_object_does(
    client: ObjectClient, prefix: str, size: int, start: int, expected: int
) -> None:
    client.put(f"{prefix}/a", b"x" * size, write_id="one")
    got = client.get(f"{prefix}/a", start, 50)
    assert (len(got.data), got.facts.size) == (expected, size)


def test_one_request_is_all_that_a_range_costs(
    through: MakeClient, proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    client.put(f"{prefix}/a", b"x" * 100, write_id="one")
    asking = through()
    with proxy.scripted(no_fault) as requests:
        asking.get(f"{prefix}/a", 0, 512)
    assert [request.verb for request in requests] == ["GET"]


def test_an_object_that_was_replaced_is_never_mixed_with_the_old(
    client: ObjectClient, prefix: str
) -> None:
    etag = client.put(f"{prefix}/a", b"old", write_id="one")
    client.put(f"{prefix}/a", b"new", write_id="two")
    with pytest.raises(StorageChangedError, match="open it again"):
        client.get(f"{prefix}/a", 0, 3, etag=etag)
    with pytest.raises(StorageChangedError):
        client.get(f"{prefix}/a", 100, 3, etag=etag)


def test_a_listing_is_of_one_folder_and_in_order(
    client: ObjectClient, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_PAGE", 3)
    keys = [f"{prefix}/in/{number}" for number in range(8)]
    for key in [*keys, f"{prefix}/inn", f"{prefix}/in.not/1"]:
        client.put(key, b"12345", write_id="one")
    listed = list(client.listing(f"{prefix}/in"))
    assert [one.key for one in listed] == keys
    assert {one.size for one in listed} == {5}
    assert max(one.modified for one in listed) > 1.6e9
    assert list(client.listing(f"{prefix}/nothing")) == []


def test_any_name_is_the_name_that_others_see(client: ObjectClient, prefix: str) -> None:
    names = ["a b", "é", "100%", "%41", "a?b#c", "a+b", "~", "(x)", "a=b&c", "\N{GRINNING FACE}"]
    for name in names:
        client.put(f"{prefix}/{name}", name.encode(), write_id="one")
        assert bytes(client.get(f"{prefix}/{name}", 0, 64).data) == name.encode()
    uploads: Any = client.uploads
    seen = uploads._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")["Contents"]
    assert sorted(one["Key"] for one in seen) == sorted(f"{prefix}/{name}" for name in names)
    assert {one.key for one in client.listing(prefix)} == {one["Key"] for one in seen}


# -- writing


def test_creating_needs_that_there_is_none(client: ObjectClient, prefix: str) -> None:
    etag = client.put(f"{prefix}/a", b"first", write_id="one", condition=CREATE)
    with pytest.raises(StorageExistsError, match="exists") as caught:
        client.put(f"{prefix}/a", b"second", write_id="two", condition=CREATE)
    assert caught.value.filename == f"s3://{BUCKET}/{prefix}/a"
    assert client.head(f"{prefix}/a").etag == etag


def test_replacing_needs_the_object_that_was_seen(client: ObjectClient, prefix: str) -> None:
    first = client.put(f"{prefix}/a", b"first", write_id="one")
    second = client.put(f"{prefix}/a", b"second", write_id="two", condition=Condition(first))
    assert second != first
    with pytest.raises(StorageChangedError, match="somebody else"):
        client.put(f"{prefix}/a", b"third", write_id="three", condition=Condition(first))
    with pytest.raises(StorageChangedError):
        client.put(f"{prefix}/none", b"third", write_id="three", condition=STALE)
    assert bytes(client.get(f"{prefix}/a", 0, 9).data) == b"second"


def test_deleting_is_of_many_and_of_what_is_not_there(
    client: ObjectClient, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_PAGE", 2)
    for number in range(5):
        client.put(f"{prefix}/{number}", b"", write_id="one")
    client.delete(f"{prefix}/{number}" for number in (0, 1, 2, 7, 4))
    assert [one.key for one in client.listing(prefix)] == [f"{prefix}/3"]
    client.delete([])


# -- publishing


def source(data: bytes | bytearray, *, log: list[tuple[int, int]]) -> Callable[[int, int], bytes]:
    def read(start: int, length: int) -> bytes:
        log.append((start, length))
        return bytes(data[start : start + length])

    return read


def test_what_is_larger_than_a_part_goes_in_parts_and_unchanged_ones_are_not_sent(
    through: MakeClient, proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    key = f"{prefix}/disk"
    asking = through(part_size="5M", parallel=2)
    data = bytearray(os.urandom(12 * MIB))
    etag = publish(
        asking, key, source(data, log=[]), size=len(data), write_id="one", condition=CREATE
    )
    assert asking.head(key).write_id == "one"
    data[6 * MIB : 6 * MIB + 5] = b"hello"
    data += b"tail"
    changed = [(6 * MIB, 5), (12 * MIB, 4)]
    read: list[tuple[int, int]] = []
    with proxy.scripted(no_fault) as requests:
        new = publish(
            asking,
            key,
            source(data, log=read),
            size=len(data),
            write_id="two",
            condition=Condition(etag),
            changed=changed,
            present=12 * MIB,
        )
    assert sorted(read) == [(5 * MIB, 5 * MIB), (10 * MIB, 2 * MIB + 4)]
    verbs = [request.verb for request in requests]
    assert verbs[0] == "CreateUpload"
    assert sorted(verbs[1:4]) == ["CopyPart", "UploadPart", "UploadPart"]
    assert verbs[4:] == ["CompleteUpload"]
    got = client.get(key, 0, 20 * MIB)
    assert bytes(got.data) == bytes(data)
    assert (got.facts.etag, got.facts.write_id) == (new, "two")


@pytest.mark.parametrize("condition", [CREATE, STALE])
def test_of_two_uploads_the_later_is_refused_and_leaves_nothing(
    client: ObjectClient, seaweed: Server, prefix: str, condition: Condition
) -> None:
    key = f"{prefix}/disk"
    client.put(key, b"winner", write_id="winner")
    asking = seaweed.client(part_size="5M", parallel=2)
    with pytest.raises((StorageChangedError, StorageExistsError)):
        publish(
            asking,
            key,
            source(bytes(6 * MIB), log=[]),
            size=6 * MIB,
            write_id="loser",
            condition=condition,
        )
    assert [one.key for one in client.listing(prefix)] == [key]
    assert client.head(key).write_id == "winner"
    assert pending(client, prefix) == []


def test_an_upload_that_is_interrupted_leaves_nothing(
    client: ObjectClient, seaweed: Server, prefix: str
) -> None:
    asking = seaweed.client(part_size="5M", parallel=2)

    def read(start: int, length: int) -> bytes:
        if start:
            raise KeyboardInterrupt
        return bytes(length)

    with pytest.raises(KeyboardInterrupt):
        publish(asking, f"{prefix}/disk", read, size=12 * MIB, write_id="one", condition=CREATE)
    assert list(client.listing(prefix)) == []
    assert pending(client, prefix) == []


def test_no_more_parts_are_in_memory_than_requests_are_allowed(
    seaweed: Server, prefix: str
) -> None:
    asking = seaweed.client(part_size="5M", parallel=2)
    lock, reading, most = threading.Lock(), set[str](), 0

    def read(start: int, length: int) -> bytes:
        nonlocal most
        with lock:
            reading.add(threading.current_thread().name)
            most = max(most, length)
        return bytes(length)

    publish(asking, f"{prefix}/disk", read, size=26 * MIB, write_id="one", condition=None)
    assert len(reading) == 2
    assert most == 5 * MIB


# -- conditions


def test_a_server_that_honours_conditions_is_asked_once(
    through: MakeClient, proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    asking = through()
    require_conditions(asking, f"{prefix}/disk")
    require_conditions(asking, f"{prefix}/disk", UPLOADS)
    with proxy.scripted(no_fault) as requests:
        require_conditions(asking, f"{prefix}/disk")
        require_conditions(asking, f"{prefix}/disk", UPLOADS)
    assert requests == []
    assert list(client.listing(prefix)) == []
    assert pending(client, prefix) == []


@pytest.mark.parametrize("what", [WRITES, UPLOADS])
def test_a_server_that_ignores_conditions_is_refused(
    rclone: Server, prefix: str, what: str
) -> None:
    with pytest.raises(UnsupportedOperationError, match="single_writer=on"):
        require_conditions(rclone.client(), f"{prefix}/disk", what)
    require_conditions(rclone.client(single_writer="on"), f"{prefix}/disk", what)
    assert list(rclone.client().listing(prefix)) == []


def test_of_a_server_without_ranges_only_small_objects_are_read(
    rclone: Server, prefix: str
) -> None:
    client = rclone.client()
    client.put(f"{prefix}/a", bytes(range(100)), write_id="one")
    for length in (100, 4096):
        assert bytes(client.get(f"{prefix}/a", 0, length).data) == bytes(range(100))
    with pytest.raises(UnsupportedOperationError, match="cannot be read in parts"):
        client.get(f"{prefix}/a", 10, 10)


# -- who asks, and where


def one_line(error: BaseException, *secrets: str) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 300
    assert not any(secret in text for secret in ("nobody-may-see-this", *secrets))
    return text


def test_what_is_missing_is_said(seaweed: Server, prefix: str) -> None:
    for bucket, code in ((BUCKET, "NoSuchKey"), ("no-such-bucket", "NoSuchBucket")):
        with pytest.raises(StorageNotFoundError, match=code) as caught:
            seaweed.client(bucket).get(f"{prefix}/none", 0, 1)
        one_line(caught.value)
    with pytest.raises(StorageNotFoundError, match="create the bucket"):
        seaweed.client("no-such-bucket").put("a", b"", write_id="one")
    with pytest.raises(StorageNotFoundError):
        seaweed.client(BUCKET).head(f"{prefix}/none")


def test_wrong_credentials_are_said_at_once(seaweed: Server, prefix: str) -> None:
    wrong = seaweed.client(secret_access_key="wrong-secret")  # noqa: S106
    attempts: list[Callable[[], object]] = [
        lambda: wrong.get(f"{prefix}/a", 0, 1),
        lambda: wrong.head(f"{prefix}/a"),
        lambda: wrong.put(f"{prefix}/a", b"", write_id="one"),
        lambda: wrong.delete([f"{prefix}/a"]),
        lambda: list(wrong.listing(prefix)),
    ]
    for attempt in attempts:
        with pytest.raises(StorageAccessError, match="403") as caught:
            attempt()
        one_line(caught.value, "wrong-secret")
    with pytest.raises(StorageAccessError, match="SignatureDoesNotMatch") as caught:
        publish(
            seaweed.client(secret_access_key="wrong-secret", part_size="5M"),  # noqa: S106
            f"{prefix}/a",
            source(bytes(6 * MIB), log=[]),
            size=6 * MIB,
            write_id="one",
            condition=None,
        )
    one_line(caught.value, "wrong-secret")


def test_no_credentials_at_all_are_said_before_anything_is_sent(seaweed: Server) -> None:
    location = locate("s3://bucket/disk")
    with pytest.raises(StorageAccessError, match="AWS_ACCESS_KEY_ID") as caught:
        ObjectClient.connect(location, Settings.read({"endpoint": seaweed.endpoint}))
    one_line(caught.value)
    open_to_all = Settings.read({"endpoint": seaweed.endpoint, "anonymous": "on"})
    with pytest.raises(StorageAccessError, match="AccessDenied"):
        ObjectClient.connect(location, open_to_all).get("disk", 0, 1)


def test_the_environment_is_read_at_each_open(
    seaweed: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = locate(f"s3://{BUCKET}/{prefix}/a")
    for variable, value in seaweed.environment().items():
        monkeypatch.setenv(variable, value)
    client = ObjectClient.connect(location, Settings.read({}))
    client.put(location.key, b"1", write_id="one")
    assert ObjectClient.connect(location, Settings.read({})) is client
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StorageAccessError):
        ObjectClient.connect(location, Settings.read({})).head(location.key)
    assert client.head(location.key).size == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    found = ObjectClient.connect(location, Settings.read({})).access
    assert found is not None
    assert found.endpoint == "http://127.0.0.1:1"
    # And what an option says counts more than all of it.
    ObjectClient.connect(location, Settings.read(seaweed.options())).head(location.key)


def test_the_files_of_aws_are_read(
    seaweed: Server,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("aws")
    given = seaweed.environment()
    count = folder / "count"
    answer = (
        f'{{"Version": 1, "AccessKeyId": "{given["AWS_ACCESS_KEY_ID"]}",'
        f' "SecretAccessKey": "{given["AWS_SECRET_ACCESS_KEY"]}",'
        ' "Expiration": "2020-01-01T00:00:00Z"}'
    ).replace("2020", "2120")
    script = folder / "give-credentials"
    script.write_text(f"#!/bin/sh\necho x >>{count}\necho '{answer}'\n")
    script.chmod(0o755)
    config = folder / "config"
    config.write_text(
        f"[profile mine]\nregion = eu-north-1\nendpoint_url = {seaweed.endpoint}\n"
        f"credential_process = {script}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    client = ObjectClient.connect(locate(f"s3://{BUCKET}/a"), Settings.read({}))
    assert client.access is not None
    assert client.access.region == "eu-north-1"
    client.put(f"{prefix}/a", b"1", write_id="one")
    publish(
        client,
        f"{prefix}/b",
        source(bytes(17 * MIB), log=[]),
        size=17 * MIB,
        write_id="two",
        condition=None,
    )
    assert client.head(f"{prefix}/b").size == 17 * MIB
    assert count.read_text() == "x\n"


def test_credentials_that_expire_are_renewed(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("aws")
    script = folder / "give-credentials"
    # They expire in a minute, which is less than what is left unused.
    script.write_text(
        f"#!/bin/sh\necho x >>{folder}/count\nn=$(wc -l <{folder}/count)\n"
        'echo "{\\"Version\\": 1, \\"AccessKeyId\\": \\"key-$n\\", \\"SecretAccessKey\\": \\"s\\",'
        ' \\"Expiration\\": \\"$(date -u -d +1min +%Y-%m-%dT%H:%M:%SZ)\\"}"\n'
    )
    script.chmod(0o755)
    (folder / "config").write_text(f"[default]\ncredential_process = {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    client = ObjectClient.connect(locate(f"s3://{BUCKET}/a"), Settings.read({}))
    assert client.access is not None
    provide = client.access.provider()
    first, second = provide()["access_key_id"], provide()["access_key_id"]
    assert first != second


def test_credentials_that_cannot_be_sent_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret\n")
    with pytest.raises(StorageAccessError, match="end of a line") as caught:
        ObjectClient.connect(locate(f"s3://{BUCKET}/a"), Settings.read({}))
    one_line(caught.value, "wrong-secret")


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("az://container/disk", {}),
        ("az://container/disk", {"access_key_id": "name", "secret_access_key": "wrong-secret!"}),
    ],
)
def test_what_other_clouds_lack_is_said(
    monkeypatch: pytest.MonkeyPatch, url: str, options: dict[str, str]
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(OptionError, match="cannot be asked for") as caught:
        ObjectClient.connect(locate(url), Settings.read(options))
    one_line(caught.value, "wrong-secret")


def test_a_panic_in_the_library_below_is_an_error_like_others(
    client: ObjectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    def panic() -> None:
        raise PanicException

    with pytest.raises(StorageError, match="Could not read"):
        client.request(panic, doing="read", key="a")


def test_google_is_asked_by_generations(proxy: Proxy) -> None:
    # Not tried on the real service.
    client = ObjectClient.connect(
        locate("gs://bucket/disk"), Settings.read({"endpoint": proxy.endpoint, "anonymous": True})
    )
    headers = [
        ("x-goog-generation", "17"),
        ("ETag", '"of-no-use"'),
        ("Content-Range", "bytes 0-2/3"),
        ("x-goog-meta-underlaywriteid", "one"),
        ("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT"),
    ]
    with proxy.scripted(lambda _: answered(206, headers=headers, body=b"abc")):
        facts = client.get("disk", 0, 3, etag="17").facts
        assert (facts.etag, facts.write_id) == ("17", "one")
        with pytest.raises(StorageChangedError):
            client.get("disk", 0, 3, etag="16")


def test_a_file_of_aws_that_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageAccessError, match="nobody"):
        ObjectClient.connect(locate(f"s3://{BUCKET}/a"), Settings.read({}))


@pytest.mark.parametrize(
    "style",
    [("on", "storage.test", "/the-bucket/disk"), ("off", "the-bucket.storage.test", "/disk")],
)
def test_the_bucket_is_in_the_path_or_in_the_host(
    seaweed: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, style: tuple[str, str, str]
) -> None:
    path_style, host, path = style
    for variable in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(variable, proxy.endpoint)
    options = seaweed.options(
        endpoint="http://storage.test/", path_style=path_style, deadline=3, part_size="5M"
    )
    client = ObjectClient.connect(locate("s3://the-bucket/disk"), Settings.read(options))
    with proxy.scripted(lambda _: answered(403, "AccessDenied")) as requests:
        with pytest.raises(StorageAccessError):
            client.get("disk", 0, 1)
        with pytest.raises(StorageAccessError):
            publish(
                client,
                "disk",
                lambda _start, length: bytes(length),
                size=6 * MIB,
                write_id="one",
                condition=None,
            )
    assert [request.headers["Host"] for request in requests] == [host, host]
    assert all(request.path.endswith(f"{host}{path}") for request in requests)


# -- processes


def test_a_forked_child_is_told_and_does_not_hang(seaweed: Server, prefix: str) -> None:
    client = seaweed.client()
    client.put(f"{prefix}/a", b"1", write_id="one")
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # there are threads, and that is the point
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            client.head(f"{prefix}/a")
        except Exception as error:  # noqa: BLE001 - the parent looks
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read().startswith("ClosedError: ")
    os.waitpid(child, 0)


def test_a_web_page_is_read_and_never_written(
    seaweed: Server, proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    location = locate(f"{proxy.endpoint}/{BUCKET}/{prefix}/a b")
    web = ObjectClient.connect(location, Settings.read({"deadline": 2}))

    body = bytes(range(200))
    with proxy.scripted(lambda _: answered(200, body=body)) as requests:
        got = web.get(location.key, 0, 4096)
    assert bytes(got.data) == body
    assert requests[0].path == f"/{BUCKET}/{prefix}/a%20b"
    with pytest.raises(OptionError):
        locate("https://host/disk?signature=secret")
