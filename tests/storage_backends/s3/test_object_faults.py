"""What networks, servers and other writers do to one object: O1, O2, O10, O11, O15 and O17."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable

import pytest

import underlay
from underlay.errors import ConflictError, StorageChangedError, StorageError, StorageExistsError
from underlay.storage import StorageCreateOptions, StorageOpenOptions
from underlay_storage.s3 import S3Object
from underlay_storage.s3.client import ObjectClient
from underlay_storage.s3.location import locate
from underlay_storage.s3.settings import Settings

from .proxy import LOST_AFTER, Answer, Fault, Proxy, Request, answered, edited
from .servers import BUCKET, Server
from .workloads import Waits

MIB = 1 << 20
PART = 5 * MIB


@pytest.fixture
def url(prefix: str) -> str:
    return f"s3://{BUCKET}/{prefix}/a"


@pytest.fixture
def options(seaweed: Server, proxy: Proxy) -> dict[str, object]:
    """Storage options that lead through the proxy."""
    return seaweed.options(endpoint=proxy.endpoint, part_size=PART)


@pytest.fixture
def forgetful(url: str, options: dict[str, object]) -> Callable[[], None]:
    """Keeps what is dear to make of the client, and lets it forget what it learnt of the server."""
    client = ObjectClient.connect(locate(url), Settings.read(options))

    def forget() -> None:
        client.honoured.clear()

    return forget


def work(url: str, options: dict[str, object]) -> bytes:
    """Create, publish in one request and in many, open again and read; what it reads."""
    with underlay.create(url, format="raw", size=5, storage_options=options) as disk:
        disk.write(b"first", 0)
        disk.flush()
        disk.sync()
        disk.resize(PART + 5)
        disk.write(b"last", PART)
    with underlay.open_image(url, format="raw", storage_options=options) as disk:
        return disk.read_bytes(0, 5) + disk.read_bytes(PART, 5)


DONE = b"firstlast\0"


@pytest.mark.parametrize(
    ("fault", "methods"),
    [
        (answered(503, "SlowDown"), {"GET", "HEAD", "PUT", "POST", "DELETE"}),
        # O3, O4: the server did it.
        (LOST_AFTER, {"PUT", "POST"}),
    ],
)
def test_o1_to_o4_whichever_request_fails_once_the_work_is_done(
    *,
    url: str,
    options: dict[str, object],
    forgetful: Callable[[], None],
    proxy: Proxy,
    fault: Fault,
    methods: set[str],
) -> None:
    number = 0
    while True:
        forgetful()
        number += 1
        seen: list[Request] = []

        def fail(
            request: Request, seen: list[Request] = seen, number: int = number
        ) -> Fault | None:
            if request.method in methods:
                seen.append(request)
            return fault if len(seen) == number and seen[-1] is request else None

        with proxy.scripted(fail):
            assert work(f"{url}-{number}", options) == DONE
        if len(seen) < number:
            break
    assert number > 8


def test_o2_what_could_not_be_published_is_not_lost_and_not_acknowledged(
    url: str,
    options: dict[str, object],
    proxy: Proxy,
    client: ObjectClient,
    prefix: str,
    *,
    waits: Waits,
) -> None:
    storage = S3Object.create_open(StorageCreateOptions(name=url, size=10, options=options))
    storage.writev((b"one",), 0)
    storage.sync()
    storage.writev((b"two",), 3)
    begun = waits.now
    with proxy.scripted(lambda _: answered(500)), pytest.raises(StorageError):
        storage.sync()
    assert waits.now - begun < 60  # of one request, and of another that looks what became of it
    assert bytes(client.get(f"{prefix}/a", 0, 10).data) == b"one" + bytes(7)
    storage.sync()
    assert bytes(client.get(f"{prefix}/a", 0, 10).data) == b"onetwo" + bytes(4)
    storage.close()


@pytest.mark.usefixtures("waits")
def test_o3_a_publication_that_was_made_though_it_seemed_to_fail_is_no_other_writer(
    url: str, options: dict[str, object], proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    storage = S3Object.create_open(StorageCreateOptions(name=url, size=10, options=options))
    storage.sync()
    storage.writev((b"one",), 0)
    puts: list[Request] = []

    def applied_and_then_silence(request: Request) -> Fault:
        if request.method == "PUT" and not puts:
            puts.append(request)
            return LOST_AFTER
        return answered(503)

    with proxy.scripted(applied_and_then_silence), pytest.raises(StorageError):
        storage.sync()
    storage.writev((b"two",), 3)
    storage.sync()
    assert bytes(client.get(f"{prefix}/a", 0, 10).data) == b"onetwo" + bytes(4)
    storage.close()


# -- O10, O11: many writers


def test_o10_of_sixteen_who_create_one_wins(
    seaweed: Server, url: str, client: ObjectClient, prefix: str
) -> None:
    start = threading.Barrier(16)
    outcomes: list[int | type[Exception]] = []

    def create(number: int) -> None:
        storage = S3Object.create_open(
            StorageCreateOptions(name=url, size=100, options=seaweed.options())
        )
        storage.writev((bytes([number]),), 0)
        start.wait()
        try:
            storage.sync()
            outcomes.append(number)
        except ConflictError as error:
            outcomes.append(type(error))
        finally:
            storage.close()

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [one for one in outcomes if isinstance(one, int)]
    assert len(outcomes) == 16
    assert bytes(client.get(f"{prefix}/a", 0, 1).data) == bytes(winners)
    assert {one for one in outcomes if not isinstance(one, int)} == {StorageExistsError}


def test_o10_every_acknowledged_change_of_many_writers_survives(
    seaweed: Server, url: str, client: ObjectClient, prefix: str
) -> None:
    client.put(f"{prefix}/a", bytes(8), write_id="a test")
    acknowledged: list[int] = []

    def count(_number: int) -> None:
        for _ in range(5):
            while True:
                storage = S3Object.open(
                    StorageOpenOptions(name=url, writable=True, options=seaweed.options())
                )
                try:
                    before = bytearray(8)
                    storage.readv((before,), 0)
                    after = int.from_bytes(before, "big") + 1
                    storage.writev((after.to_bytes(8, "big"),), 0)
                    storage.sync()
                except StorageChangedError:
                    continue
                finally:
                    storage.close()
                acknowledged.append(after)
                break

    threads = [threading.Thread(target=count, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(acknowledged) == list(range(1, 21))
    assert int.from_bytes(client.get(f"{prefix}/a", 0, 8).data, "big") == 20


WRITER = """
    import sys
    import underlay
    from underlay.storage import StorageOpenOptions
    from underlay_storage.s3 import S3Object

    storage = S3Object.open(StorageOpenOptions(name=sys.argv[1], writable=True))
    storage.writev((b"paused",), 0)
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        storage.sync()
    except underlay.StorageChangedError:
        print("told", flush=True)
    storage.close()
"""


def run_child(code: str, *arguments: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_o11_a_writer_that_slept_is_told_and_ruins_nothing(
    seaweed: Server, proxy: Proxy, url: str, client: ObjectClient, prefix: str
) -> None:
    client.put(f"{prefix}/a", bytes(10), write_id="a test")
    environment = {**seaweed.environment(), "AWS_ENDPOINT_URL": proxy.endpoint}
    with run_child(WRITER, url, environment=environment) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "ready\n"
        stopped = threading.Event()

        def stop(request: Request) -> Fault | None:
            # In the middle of its publication: the request is on its way.
            if request.method == "PUT" and not stopped.is_set():
                os.kill(child.pid, signal.SIGSTOP)
                stopped.set()
                return Fault(lost_before=True)
            return None

        with proxy.scripted(stop):
            child.stdin.write("go\n")
            child.stdin.flush()
            assert stopped.wait(60)
            other = S3Object.open(
                StorageOpenOptions(name=url, writable=True, options=seaweed.options())
            )
            other.writev((b"awake!",), 0)
            other.sync()
            other.close()
            os.kill(child.pid, signal.SIGCONT)
            assert child.stdout.readline() == "told\n"
    assert child.returncode == 0
    assert bytes(client.get(f"{prefix}/a", 0, 10).data) == b"awake!" + bytes(4)


# -- O15: old answers


def test_o15_an_old_answer_is_detected(
    url: str, options: dict[str, object], proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    replayed: list[Answer] = []

    def keep(answer: Answer) -> Answer:
        replayed.append(answer)
        return answer

    client.put(f"{prefix}/a", b"1" * (2 * MIB), write_id="one")
    with proxy.scripted(lambda _: edited(keep)):
        client_of_old = S3Object.open(StorageOpenOptions(name=url, options=options))
        client_of_old.readv((bytearray(100),), MIB)
    old = replayed[-1]
    client.put(f"{prefix}/a", b"2" * (2 * MIB), write_id="two")
    storage = S3Object.open(StorageOpenOptions(name=url, options=options))
    with (
        proxy.scripted(lambda _: Fault(instead=old)),
        pytest.raises(StorageChangedError),
    ):
        storage.readv((bytearray(100),), MIB)
    client_of_old.close()
    storage.close()


# -- O17: killed at any request


def test_o17_whenever_a_writer_is_killed_the_object_is_whole(
    url: str,
    options: dict[str, object],
    forgetful: Callable[[], None],
    proxy: Proxy,
    client: ObjectClient,
) -> None:
    """As if killed before the k-th request, for all k: the object is what was acknowledged."""
    versions = [bytes([size % 7]) * size for size in (10, 20, PART + 1)]
    killed_at, acknowledged = 0, 0
    while acknowledged < len(versions) - 1:
        killed_at += 1
        forgetful()
        key = f"{locate(url).key}-{killed_at}"
        client.put(key, versions[0], write_id="a test")
        acknowledged = _write_until_killed(
            f"{url}-{killed_at}", options, proxy, versions, killed_at=killed_at
        )
        stored = bytes(client.get(key, 0, 2 * PART).data)
        assert stored == versions[acknowledged], killed_at
    assert killed_at > 10


def _write_until_killed(
    url: str,
    options: dict[str, object],
    proxy: Proxy,
    versions: list[bytes],
    *,
    killed_at: int,
) -> int:
    """Publish one version after the other; no request from one on reaches the server."""

    def kill(request: Request) -> Fault | None:
        # Told so that nobody tries again: a killed one does not either.
        return answered(403) if request.number >= killed_at else None

    acknowledged = 0
    with proxy.scripted(kill), contextlib.suppress(StorageError):
        storage = S3Object.open(StorageOpenOptions(name=url, writable=True, options=options))
        try:
            for version in versions[1:]:
                storage.writev((version,), 0)
                storage.sync()
                acknowledged += 1
        finally:
            storage.close()
    return acknowledged
