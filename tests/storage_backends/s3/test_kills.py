"""O17 with real kills: a process that writes one object is killed, and the object is whole.

At every moment of it: while it stages, while it publishes (in one request, and in parts), and when
the server has done it. What it leaves can be found and removed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

import underlay
from underlay import jobs
from underlay.errors import OptionError, StorageNotFoundError
from underlay_storage.s3.client import ObjectClient
from underlay_storage.s3.conditions import probe_folder
from underlay_storage.s3.sweeping import sweep
from underlay_storage.s3.uploads import Begun

from .proxy import LOST_BEFORE, Fault, Proxy, Request
from .servers import BUCKET, Server
from .workloads import pending, until

MIB = 1 << 20
PART = 5 * MIB
NEW = b"new" * (MIB // 3)

#: Opens the image that is there, changes it in place and publishes it; or makes a new one.
CHILD = """
    import sys
    import underlay

    name, is_new = sys.argv[1], sys.argv[2] == "new"
    options = {"part_size": "5M", "parallel": 2}
    if is_new:
        disk = underlay.create(name, size="1G", overwrite=True, storage_options=options)
    else:
        disk = underlay.open_any(name, writable=True, storage_options=options)
    with disk:
        print("open", flush=True)
        sys.stdin.readline()
        disk.write(b"new" * ((1 << 20) // 3), 6 << 20 if disk.size > 8 << 20 else 0)
        if is_new:
            disk.write(bytes(range(1, 256)) * (12 << 12), 8 << 20)
        print("staged", flush=True)
        sys.stdin.readline()
    print("published", flush=True)
"""


@attrs.frozen(kw_only=True)
class Moment:
    """When to kill: as the ``nth`` request of this kind for the object comes."""

    verb: str
    nth: int = 1
    #: Whether the server still does what it is asked for.
    arrives: bool
    #: Whether the object is the new one then.
    published: bool = False
    #: How many uploads are left.
    left: int = 0

    def script(
        self, process: subprocess.Popen[str], path: str
    ) -> Callable[[Request], Fault | None]:
        seen = 0

        def script(request: Request) -> Fault | None:
            nonlocal seen
            if process.returncode is not None or request.path != path:
                return None
            seen += request.verb == self.verb
            if request.verb != self.verb or seen != self.nth:
                return None
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return None if self.arrives else LOST_BEFORE

        return script


IN_ONE_REQUEST = [
    Moment(verb="PUT", arrives=False),
    Moment(verb="PUT", arrives=True, published=True),
]
IN_PARTS = [
    Moment(verb="CreateUpload", arrives=True, left=1),
    Moment(verb="UploadPart", arrives=False, left=1),
    Moment(verb="CopyPart", nth=2, arrives=True, left=1),
    Moment(verb="CompleteUpload", arrives=False, left=1),
    Moment(verb="CompleteUpload", arrives=True, published=True),
]


@pytest.fixture
def start(seaweed: Server, proxy: Proxy) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def child(url: str, kind: str = "present") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), url, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **seaweed.environment(), "AWS_ENDPOINT_URL": proxy.endpoint},
        )
        processes.append(process)
        return process

    yield child
    for process in processes:
        process.kill()
        process.communicate()


def says(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{word}\n"


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def publish_and_die(process: subprocess.Popen[str], proxy: Proxy, moment: Moment, key: str) -> None:
    """Let the child, which is open, write and publish, until it is killed."""
    with proxy.scripted(moment.script(process, f"/{BUCKET}/{key}")):
        go_on(process)
        says(process, "staged")
        go_on(process)
        assert process.wait(120) == -signal.SIGKILL, moment
        # What was under way comes to its end all the same.
        until(lambda: not proxy.connections)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[bytes, bytes]]:
    """By the size of the disk: the image as it is, and as it is after the child has written."""
    made: dict[int, tuple[bytes, bytes]] = {}
    noise = random.Random(6).randbytes(12 * MIB)
    for size in (MIB, 12 * MIB):
        path = tmp_path_factory.mktemp("images") / "image.qcow2"
        with underlay.create(path, size=size) as disk:
            disk.write(noise[:size], 0)
        old = path.read_bytes()
        with underlay.open_any(path, writable=True) as disk:
            disk.write(NEW, 6 * MIB if size > 8 * MIB else 0)
        made[size] = old, path.read_bytes()
    return made


def content(client: ObjectClient, key: str) -> bytes:
    return bytes(client.get(key, 0, 64 * MIB).data)


def check_what_is_left(
    url: str, key: str, client: ObjectClient, options: dict[str, object], *, left: int
) -> None:
    """So many uploads are left; they wait for the grace period, and then go."""
    assert len(pending(client, key)) == left
    waiting = jobs.collect_storage(url, storage_options=options)
    assert (waiting.removed, waiting.waiting) == (0, left)
    told = jobs.collect_storage(url, grace=0, dry_run=True, storage_options=options)
    assert len(pending(client, key)) == told.removed == left
    done = jobs.collect_storage(url, grace=0, storage_options=options)
    assert (done.removed, done.waiting) == (left, 0)
    assert len(pending(client, key)) == 0


@pytest.mark.parametrize(
    ("size", "moments"), [(MIB, IN_ONE_REQUEST), (12 * MIB, IN_PARTS)], ids=["small", "parts"]
)
def test_whenever_a_writer_is_killed_the_object_is_the_old_or_the_new_one(
    start: Callable[..., subprocess.Popen[str]],
    proxy: Proxy,
    seaweed: Server,
    client: ObjectClient,
    prefix: str,
    *,
    images: dict[int, tuple[bytes, bytes]],
    size: int,
    moments: list[Moment],
) -> None:
    old, new = images[size]
    assert old != new
    options = seaweed.options(part_size="5M")
    for number, moment in enumerate(moments):
        key = f"{prefix}/{number}.qcow2"
        url = f"s3://{BUCKET}/{key}"
        client.put(key, old, write_id="a test")
        process = start(url)
        says(process, "open")
        publish_and_die(process, proxy, moment, key)
        expected = new if moment.published else old
        assert content(client, key) == expected, moment
        check_what_is_left(url, key, client, options, left=moment.left)
        with underlay.open_any(url, writable=True, storage_options=options) as disk:
            disk.write(b"the next writer", 4096)
        with underlay.open_any(url, storage_options=options) as disk:
            assert disk.read_bytes(4096, 15) == b"the next writer"
            assert disk.size == size
        assert jobs.check(url, storage_options=options).corruptions == 0


def test_who_is_killed_while_staging_has_changed_nothing(
    start: Callable[..., subprocess.Popen[str]],
    client: ObjectClient,
    prefix: str,
    *,
    images: dict[int, tuple[bytes, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    key = f"{prefix}/a.qcow2"
    client.put(key, images[MIB][0], write_id="a test")
    process = start(f"s3://{BUCKET}/{key}")
    says(process, "open")
    go_on(process)
    says(process, "staged")
    process.kill()
    process.wait()
    assert content(client, key) == images[MIB][0]
    assert [one.key for one in client.listing(prefix)] == [key]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [None, b"old" * MIB])
def test_whoever_is_killed_making_an_image_has_made_none(
    start: Callable[..., subprocess.Popen[str]],
    proxy: Proxy,
    seaweed: Server,
    client: ObjectClient,
    prefix: str,
    *,
    old: bytes | None,
) -> None:
    key = f"{prefix}/a.qcow2"
    url = f"s3://{BUCKET}/{key}"
    if old is not None:
        client.put(key, old, write_id="a test")
    process = start(url, "new")
    says(process, "open")
    moment = Moment(verb="UploadPart", nth=2, arrives=True)
    publish_and_die(process, proxy, moment, key)
    if old is None:
        with pytest.raises(StorageNotFoundError):
            client.head(key)
    else:
        assert content(client, key) == old
    check_what_is_left(url, key, client, seaweed.options(), left=1)
    with pytest.raises(OptionError, match="nobody to take it over from"):
        jobs.collect_storage(url, take_over=True, storage_options=seaweed.options())


def test_what_is_left_of_trying_conditions_can_be_removed(
    start: Callable[..., subprocess.Popen[str]],
    proxy: Proxy,
    seaweed: Server,
    client: ObjectClient,
    prefix: str,
) -> None:
    key = f"{prefix}/a.qcow2"

    def script(request: Request) -> None:
        if request.method == "PUT" and process.returncode is None:
            process.kill()
            process.wait()

    with proxy.scripted(script):
        process = start(f"s3://{BUCKET}/{key}", "new")
        assert process.wait(120) == -signal.SIGKILL
        until(lambda: not proxy.connections)
    assert len(list(client.listing(probe_folder(key)))) == 1
    url = f"s3://{BUCKET}/{key}"
    assert jobs.collect_storage(url, storage_options=seaweed.options()).waiting == 1
    done = jobs.collect_storage(url, grace=0, storage_options=seaweed.options())
    assert (done.removed, done.removed_bytes) == (1, 1)
    assert list(client.listing(prefix)) == []


def test_an_upload_that_goes_on_is_left_alone(
    seaweed: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long ago it was begun: what counts is when its last part came."""
    client = seaweed.client()
    key = f"{prefix}/a"
    upload = client.uploads.create(key, {})
    client.uploads.send(key, upload, 1, b"part")
    now, [begun] = client.uploads.begun(key)
    assert abs(now - begun.since) < 60
    [(size, since)] = client.uploads.parts(key, upload)
    assert size == 4
    assert abs(now - since) < 60
    long_ago = Begun(key, upload, now - 1_000_000)

    def as_of_long_ago(_prefix: str) -> tuple[float, list[Begun]]:
        return now, [long_ago]

    monkeypatch.setattr(client.uploads, "begun", as_of_long_ago)
    for grace, waiting in ((3600, 1), (0, 0)):
        assert sweep(client, key, grace=grace).waiting == waiting
