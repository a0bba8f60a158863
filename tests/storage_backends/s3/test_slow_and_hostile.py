"""Servers that are slow, absent, or refuse and lie, and a client: O14, O16 and O19."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import pytest

from underlay.errors import (
    StorageAccessError,
    StorageError,
    StorageNotFoundError,
    UnderlayError,
    UnsupportedOperationError,
)
from underlay_storage.s3.client import CREATE, Condition, ObjectClient
from underlay_storage.s3.conditions import UPLOADS

from .conftest import MakeClient
from .proxy import (
    LOST_AFTER,
    LOST_BEFORE,
    Fault,
    Proxy,
    Request,
    Script,
    answered,
    cut,
    silent,
    trickling,
)
from .servers import BUCKET, Server
from .workloads import (
    BODY,
    MIB,
    SMALL_REQUESTS,
    Waits,
    first,
    impatient,
    small_requests,
    until,
    upload_requests,
)

# -- O14: slow, or silent


def side_by_side(proxy: Proxy, scripts: dict[str, Script], work: Callable[[str], object]) -> None:
    """Let ``work`` go on in several folders at once, each with a script of its own."""

    def script(request: Request) -> Fault | None:
        said = unquote(request.target).encode() + request.body
        [folder] = [folder for folder in scripts if f"{folder}/".encode() in said]
        return scripts[folder](request)

    with proxy.scripted(script), ThreadPoolExecutor(len(scripts)) as pool:
        for done in [pool.submit(work, folder) for folder in scripts]:
            done.result()


def counted(number: int, fault: Fault) -> Script:
    """``nth`` of the requests that this script is asked about."""
    count = itertools.count(1)
    return lambda _: fault if next(count) == number else None


@pytest.mark.usefixtures("waits")
def test_o14_a_first_byte_that_comes_late_is_not_waited_for(
    through: MakeClient, proxy: Proxy, prefix: str
) -> None:
    client = through(deadline=4)
    began = time.monotonic()
    side_by_side(
        proxy,
        {
            f"{prefix}/{number}": counted(number, silent(600))
            for number in range(1, SMALL_REQUESTS + 1)
        },
        lambda folder: small_requests(client, folder),
    )
    assert time.monotonic() - began < 60


@pytest.mark.usefixtures("waits")
def test_o14_nor_in_an_upload(through: MakeClient, proxy: Proxy, prefix: str) -> None:
    client = through(part_size="5M", parallel=2, deadline=6)
    client.honoured[UPLOADS] = True
    began = time.monotonic()
    side_by_side(
        proxy,
        {
            f"{prefix}/{verb}": first(verb, silent(600))
            for verb in ("CreateUpload", "UploadPart", "CopyPart", "CompleteUpload")
        },
        lambda folder: upload_requests(client, folder),
    )
    assert time.monotonic() - began < 60


def test_o14_an_answer_that_trickles_is_given_up_at_the_deadline(
    through: MakeClient, proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    client.put(f"{prefix}/a", BODY, write_id="one")
    began = time.monotonic()
    with (
        proxy.scripted(lambda _: trickling(100)),
        pytest.raises(StorageError, match="took too long"),
    ):
        through(deadline=2).get(f"{prefix}/a", 0, len(BODY))
    assert time.monotonic() - began < 60


@contextlib.contextmanager
def listening() -> Generator[str]:
    """A server that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def closed() -> Generator[str]:
    """A port that is somebody's, so that no other server comes to it; nobody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def nameless() -> Generator[str]:
    yield "http://no-such-host.invalid"


@pytest.mark.parametrize("where", [listening, closed, nameless])
def test_o14_a_server_that_is_not_there_is_said_in_time(
    seaweed: Server, where: Callable[[], contextlib.AbstractContextManager[str]]
) -> None:
    with where() as endpoint:
        asking = seaweed.client(endpoint=endpoint, deadline=1, part_size="5M")
        attempts: list[Callable[[], object]] = [
            lambda: asking.get("a", 0, 1),
            lambda: asking.request(lambda: asking.uploads.create("a", {}), doing="write", key="a"),
        ]
        for attempt in attempts:
            began = time.monotonic()
            with pytest.raises(StorageError, match=r"Could not \w+ 's3://"):
                attempt()
            assert time.monotonic() - began < 30


@pytest.mark.parametrize("where", [closed, nameless])
def test_o14_nobody_waits_long_to_hear_of_a_wrong_address(
    seaweed: Server, waits: Waits, where: Callable[[], contextlib.AbstractContextManager[str]]
) -> None:
    with where() as endpoint:
        asking = seaweed.client(endpoint=endpoint, deadline=30)
        attempts: list[Callable[[], object]] = [
            lambda: asking.get("a", 0, 1),
            lambda: asking.request(lambda: asking.uploads.create("a", {}), doing="write", key="a"),
        ]
        for attempt in attempts:
            began = waits.now
            with pytest.raises(StorageError, match=r"no connection|not found"):
                attempt()
            assert waits.now - began < 4


def test_o14_a_server_that_has_answered_is_waited_for_while_it_restarts(
    seaweed: Server,
    client: ObjectClient,
    prefix: str,
    waits: Waits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client.put(f"{prefix}/a", BODY, write_id="one")
    proxy = Proxy(seaweed.endpoint)
    asking = seaweed.client(endpoint=proxy.endpoint, deadline=30)
    asking.head(f"{prefix}/a")
    port = int(proxy.endpoint.rpartition(":")[2])
    proxy.close()
    stopped = waits.now
    again: list[Proxy] = []

    def wait(seconds: float) -> None:
        Waits.sleep(waits, seconds)
        # Longer than one waits for a server that was never there.
        if not again and waits.now - stopped > 5:
            again.append(Proxy(seaweed.endpoint, port=port))

    monkeypatch.setattr(waits, "sleep", wait)
    try:
        assert bytes(asking.get(f"{prefix}/a", 0, len(BODY)).data) == BODY
    finally:
        for proxy in again:
            proxy.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate that nobody signed, with its key."""
    file = tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(file), "-out", str(tmp_path / "public.pem")),
        ],
        check=True,
        capture_output=True,
    )
    with file.open("ab") as both:
        both.write((tmp_path / "public.pem").read_bytes())
    return file


def test_o14_a_certificate_that_nobody_signed_is_refused_at_once(
    seaweed: Server, certificate: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    proxy = Proxy(seaweed.endpoint, tls=context)
    try:
        asking = seaweed.client(endpoint=proxy.endpoint)
        with pytest.raises(StorageError, match="certificate"):
            asking.get("a", 0, 1)
        with pytest.raises(StorageError, match="certificate"):
            asking.request(lambda: asking.uploads.create("a", {}), doing="write", key="a")
        assert proxy.requests == []
    finally:
        proxy.close()


def test_o14_connections_do_not_pile_up(
    through: MakeClient, proxy: Proxy, client: ObjectClient, prefix: str
) -> None:
    client.put(f"{prefix}/a", BODY, write_id="one")
    asking = through()
    faults = [None, answered(503, "SlowDown"), cut(10), LOST_BEFORE, LOST_AFTER, None]

    def script(request: Request) -> Fault | None:
        return faults[request.number % len(faults)] if request.number % 10 == 0 else None

    def work() -> None:
        for _ in range(125):
            asking.get(f"{prefix}/a", 0, 100)

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    asking.get(f"{prefix}/a", 0, 100)
    before = descriptors()
    with proxy.scripted(script):
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Both ends of each connection are in this process, and the proxy's to the server, which takes
    # a moment to see that the other end was closed.
    until(lambda: descriptors() - before <= 3 * 2 * 8)


# -- O16: credentials, buckets, redirects, clocks


REFUSALS = [
    (answered(400, "ExpiredToken"), StorageAccessError, "get new credentials"),
    (answered(403, "AccessDenied"), StorageAccessError, "AccessDenied"),
    (answered(403, "RequestTimeTooSkewed"), StorageAccessError, "clock"),
    (answered(401), StorageAccessError, "401"),
    (answered(404, "NoSuchBucket"), StorageNotFoundError, "bucket"),
    (answered(301, "PermanentRedirect"), StorageError, "sent us away"),
    (answered(400, "SomethingElse"), StorageError, "SomethingElse"),
    (answered(501, "NotImplemented"), UnsupportedOperationError, "501"),
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_o16_a_refusal_is_said_and_not_asked_for_again(
    through: MakeClient,
    proxy: Proxy,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
    refusal: tuple[Fault, type[UnderlayError], str],
) -> None:
    fault, error, said = refusal
    client = through(part_size="5M", session_token="nobody-may-see-this-token")  # noqa: S106
    attempts: list[Callable[[], object]] = [
        lambda: client.get(f"{prefix}/a", 0, 1),
        lambda: client.put(f"{prefix}/a", b"", write_id="one", condition=CREATE),
        lambda: client.put(f"{prefix}/a", b"", write_id="one", condition=Condition('"1"')),
        lambda: client.request(
            lambda: client.uploads.create(f"{prefix}/a", {}), doing="write", key=f"{prefix}/a"
        ),
    ]
    with caplog.at_level(logging.INFO):
        for attempt in attempts:
            with proxy.scripted(lambda _: fault) as requests:
                with pytest.raises(error, match=said) as caught:
                    attempt()
                # And a conditional write may have to look.
                assert [request.verb for request in requests][1:] in ([], ["HEAD"])
            assert "nobody-may-see-this" not in f"{caught.value} {caught.value.__cause__}"
    assert "nobody-may-see-this" not in caplog.text


def test_o16_a_redirect_in_a_circle_ends(through: MakeClient, proxy: Proxy, prefix: str) -> None:
    there = [("Location", f"{proxy.endpoint}/{BUCKET}/{prefix}/a")]
    with (
        proxy.scripted(lambda _: answered(307, "TemporaryRedirect", headers=there)) as requests,
        pytest.raises(StorageError, match="sent us away"),
    ):
        through().get(f"{prefix}/a", 0, 1)
    assert len(requests) < 15


# -- O19: answers that are weapons


LAUGHS = b"".join(
    [
        b'<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a0 "lol">',
        *(
            b'<!ENTITY a%d "%b">' % (number, b"&a%d;" % (number - 1) * 10)
            for number in range(1, 10)
        ),
        b"]><ListBucketResult><Name>&a9;</Name></ListBucketResult>",
    ]
)


@pytest.mark.parametrize(
    "fault",
    [
        answered(200, body=LAUGHS),
        answered(500, body=LAUGHS),
        answered(200, body=b"<a>" * 100_000),
        answered(200, headers=[(f"X-{number}", "y" * 1000) for number in range(5000)]),
        answered(200, headers=[("X-Long", "y" * 8 * MIB)]),
    ],
)
def test_o19_hostile_answers_do_no_more_than_fail(
    through: MakeClient, proxy: Proxy, prefix: str, fault: Fault
) -> None:
    client = impatient(through())
    attempts: list[Callable[[], object]] = [
        lambda: list(client.listing(prefix)),
        lambda: client.get(f"{prefix}/a", 0, 100),
        lambda: client.request(
            lambda: client.uploads.create(f"{prefix}/a", {}), doing="write", key=f"{prefix}/a"
        ),
    ]
    for attempt in attempts:
        began = time.process_time()
        with proxy.scripted(lambda _: fault):
            said = outcome_of(attempt)
        # Entities that nobody uses make a listing no worse.
        assert said == "[]" or f"'s3://{BUCKET}/" in said
        assert len(said) < 400
        assert time.process_time() - began < 5


def outcome_of(attempt: Callable[[], object]) -> str:
    try:
        return str(attempt())
    except UnderlayError as error:
        return str(error)


HUNGRY = """
import sys, threading, http.server
from underlay.errors import UnderlayError
from underlay_storage.s3.client import ObjectClient
from underlay_storage.s3.location import locate
from underlay_storage.s3.settings import Settings

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(int(sys.argv[1]))
        self.send_header("Content-Range", "bytes 0-4095/1000000")
        self.send_header("Content-Length", str(int(sys.argv[2]) << 20))
        self.end_headers()
        try:
            for _ in range(int(sys.argv[2])):
                self.wfile.write(b"x" * (1 << 20))
        except OSError:
            pass
    do_POST = do_GET
    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
options = {"endpoint": f"http://127.0.0.1:{server.server_port}", "access_key_id": "k",
           "secret_access_key": "s", "deadline": 2}
client = ObjectClient.connect(locate("s3://bucket/a"), Settings.read(options))

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith("VmHWM"))

_ = client.uploads  # botocore is large
before = peak()
try:
    if sys.argv[3] == "read":
        client.get("a", 0, 4096)
    else:
        client.request(lambda: client.uploads.create("a", {}), doing="write", key="a")
except UnderlayError as error:
    assert len(str(error)) < 400
else:
    raise SystemExit("no error")
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("doing", "status", "size", "most"),
    # A body is read as far as it was asked for. An error's is read whole by obstore, some
    # times over: it is bounded by what a server can send in the time that a request has.
    [
        ("read", 206, 1000, 32),
        ("read", 400, 16, 8 * 16),
        ("upload", 200, 1000, 32),
        ("upload", 500, 1000, 32),
    ],
)
def test_o19_memory_is_bounded_whatever_a_server_sends(
    doing: str, status: int, size: int, most: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HUNGRY), str(status), str(size), doing],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(done.stdout) <= most
