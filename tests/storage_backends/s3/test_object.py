"""One object of a bucket as a disk's storage, on a real server."""

from __future__ import annotations

import gc
import http.server
import io
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

import underlay
import underlay.jobs
from underlay.errors import (
    OptionError,
    ReadOnlyError,
    StorageAccessError,
    StorageChangedError,
    StorageError,
    StorageExistsError,
    StorageNotFoundError,
    UnderlayError,
    UnsupportedOperationError,
)
from underlay.storage import AnyStorage, StorageCreateOptions, StorageOpenOptions
from underlay.testing import StorageContract
from underlay_storage.s3 import S3Object
from underlay_storage.s3.client import ObjectClient

from ...conftest import Tool
from .servers import BUCKET, Server
from .workloads import until

MIB = 1 << 20

#: ``create(name, size=…, overwrite=…, **options)`` and ``open_(name, writable=…, **options)``.
Open = Callable[..., S3Object]


@pytest.fixture
def opened() -> Iterator[list[S3Object]]:
    storages: list[S3Object] = []
    yield storages
    for storage in storages:
        storage.close()


@pytest.fixture
def url(prefix: str) -> Callable[[str], str]:
    return lambda name: f"s3://{BUCKET}/{prefix}/{name}"


@pytest.fixture
def create(seaweed: Server, opened: list[S3Object], url: Callable[[str], str]) -> Open:
    def make(name: str, *, size: int = 0, overwrite: bool = False, **more: object) -> S3Object:
        options = StorageCreateOptions(
            name=url(name), size=size, overwrite=overwrite, options=seaweed.options(**more)
        )
        opened.append(S3Object.create_open(options))
        return opened[-1]

    return make


@pytest.fixture
def open_(seaweed: Server, opened: list[S3Object], url: Callable[[str], str]) -> Open:
    def make(name: str, *, writable: bool = False, **more: object) -> S3Object:
        options = StorageOpenOptions(
            name=url(name), writable=writable, options=seaweed.options(**more)
        )
        opened.append(S3Object.open(options))
        return opened[-1]

    return make


def content(storage: S3Object) -> bytes:
    data = bytearray(storage.size())
    if data:
        storage.readv((data,), 0)
    return bytes(data)


def stored(client: ObjectClient, key: str) -> bytes:
    return bytes(client.get(key, 0, 1 << 30).data)


class _Contract(StorageContract):
    more: ClassVar[dict[str, object]] = {}

    @pytest.fixture(autouse=True)
    def _server(self, seaweed: Server, client: ObjectClient, prefix: str) -> None:
        self.server = seaweed
        self.client = client
        self.prefix = prefix
        self.made = 0

    def next_name(self) -> str:
        self.made += 1
        return f"s3://{BUCKET}/{self.prefix}/{self.made}"

    def reopen(self, storage: AnyStorage) -> AnyStorage:
        return self.open(storage.name(), writable=False)

    def open(self, name: str, *, writable: bool) -> S3Object:
        return S3Object.open(
            StorageOpenOptions(name=name, writable=writable, options=self.options())
        )

    def options(self) -> dict[str, object]:
        return self.server.options(**self.more)


class TestOpened(_Contract):
    def make(self, content: bytes) -> AnyStorage:
        name = self.next_name()
        key = name.removeprefix(f"s3://{BUCKET}/")
        self.client.put(key, content, write_id="a test")
        return self.open(name, writable=True)


class TestCreated(_Contract):
    def make(self, content: bytes) -> AnyStorage:
        storage = S3Object.create_open(
            StorageCreateOptions(name=self.next_name(), options=self.options())
        )
        if content:
            storage.writev((content,), 0)
        storage.sync()
        return storage


class TestWithoutRoom(TestCreated):
    """The least cache, and one request at a time."""

    more: ClassVar[dict[str, object]] = {"cache": "1M", "parallel": 1}


# -- coming to be


def test_nothing_is_to_be_seen_before_it_is_synced(
    create: Open, open_: Open, client: ObjectClient, prefix: str
) -> None:
    storage = create("a", size=100)
    storage.writev((b"hello",), 10)
    storage.flush()
    with pytest.raises(StorageNotFoundError):
        open_("a")
    storage.sync()
    assert content(open_("a")) == bytes(10) + b"hello" + bytes(85)
    assert [one.key for one in client.listing(prefix)] == [f"{prefix}/a"]


def test_what_was_not_synced_is_gone(create: Open, open_: Open) -> None:
    storage = create("a", size=5)
    storage.sync()
    storage.writev((b"lost",), 0)
    storage.close()
    assert content(open_("a")) == bytes(5)


def test_what_exists_is_not_created_again(create: Open, open_: Open) -> None:
    create("a", size=5).sync()
    with pytest.raises(StorageExistsError, match="exists"):
        create("a")
    late = create("b", size=1)
    create("b", size=2).sync()
    with pytest.raises(StorageExistsError):
        late.sync()
    assert open_("b").size() == 2


def test_overwriting_replaces_all_of_it_when_it_is_synced(create: Open, open_: Open) -> None:
    create("a", size=5).sync()
    storage = create("a", size=3, overwrite=True)
    assert open_("a").size() == 5
    storage.sync()
    assert content(open_("a")) == bytes(3)


def test_of_two_that_overwrite_the_later_one_is_told(create: Open, open_: Open) -> None:
    create("a", size=5).sync()
    one, two = (create("a", size=size, overwrite=True) for size in (1, 2))
    one.sync()
    with pytest.raises(StorageChangedError):
        two.sync()
    assert open_("a").size() == 1


def test_what_is_abandoned_is_removed_if_it_is_new_and_ones_own(create: Open, open_: Open) -> None:
    storage = create("a", size=5)
    storage.sync()
    storage.abandon()
    with pytest.raises(StorageNotFoundError):
        open_("a")
    create("b", size=5).sync()
    storage = create("b", size=1, overwrite=True)
    storage.sync()
    storage.abandon()
    assert open_("b").size() == 1
    storage = create("c", size=1)
    storage.sync()
    create("c", size=2, overwrite=True).sync()
    storage.abandon()
    assert open_("c").size() == 2
    create("d").abandon()


# -- two writers


def test_of_two_writers_the_later_is_told_and_never_writes_again(
    create: Open, open_: Open, client: ObjectClient, prefix: str
) -> None:
    create("a", size=10).sync()
    winner, loser = open_("a", writable=True), open_("a", writable=True)
    winner.writev((b"winner",), 0)
    loser.writev((b"loser!",), 2)
    winner.sync()
    for _ in range(3):
        with pytest.raises(StorageChangedError, match="by somebody"):
            loser.sync()
    with pytest.raises(StorageChangedError):
        loser.writev((b"again",), 0)
    with pytest.raises(StorageChangedError):
        loser.resize(3)
    loser.close()
    assert stored(client, f"{prefix}/a") == b"winner" + bytes(4)
    winner.writev((b"W",), 0)
    winner.sync()
    assert stored(client, f"{prefix}/a") == b"Winner" + bytes(4)


def _flush_and_sync(disk: underlay.SyncFormatAccess) -> None:
    disk.flush()
    disk.sync()


def test_a_disk_that_lost_says_so_at_every_sync_and_when_it_is_closed(
    seaweed: Server, url: Callable[[str], str]
) -> None:
    options = seaweed.options()
    underlay.create(url("a"), size=MIB, storage_options=options).close()
    descriptors = len(os.listdir("/proc/self/fd"))
    loser = underlay.open_any(url("a"), writable=True, storage_options=options)
    with underlay.open_any(url("a"), writable=True, storage_options=options) as winner:
        winner.write(b"winner", 0)
    loser.write(b"loser", 0)
    for _ in range(2):
        with pytest.raises(StorageChangedError):
            _flush_and_sync(loser)
    with pytest.raises(StorageChangedError):
        loser.close()
    loser.close()
    with underlay.open_any(url("a"), storage_options=options) as disk:
        assert disk.read_bytes(0, 6) == b"winner"
    del loser, winner, disk
    gc.collect()
    # Connections that are kept; others end in a moment.
    until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 8)


@pytest.mark.parametrize("size", [10, 11 * MIB])
def test_a_writer_of_what_was_removed_is_told(
    create: Open, open_: Open, client: ObjectClient, prefix: str, size: int
) -> None:
    create("a", size=size).sync()
    storage = open_("a", writable=True, part_size=5 * MIB)
    storage.writev((b"x" * 5,), 0)
    client.delete([f"{prefix}/a"])
    for _ in range(2):
        with pytest.raises(StorageChangedError):
            storage.sync()
    with pytest.raises(StorageNotFoundError):
        open_("a")


def test_a_server_that_ignores_conditions_is_written_by_one_writer_only(
    rclone: Server, prefix: str, url: Callable[[str], str]
) -> None:
    rclone.client().put(f"{prefix}/b", b"x" * 512, write_id="a test")
    with pytest.raises(UnsupportedOperationError, match="single_writer"):
        underlay.create(url("a"), size=MIB, storage_options=rclone.options())
    with pytest.raises(UnsupportedOperationError, match="single_writer"):
        underlay.open_any(url("b"), writable=True, storage_options=rclone.options())
    alone = rclone.options(single_writer=True)
    with underlay.create(url("a"), size=MIB, storage_options=alone) as disk:
        disk.write(b"hello", 1000)
        _flush_and_sync(disk)
        disk.write(b"again", 70_000)
    with underlay.open_any(url("a"), storage_options=rclone.options()) as disk:
        assert disk.read_bytes(1000, 5) == b"hello"
        assert disk.read_bytes(70_000, 5) == b"again"


# -- reading what changes


def test_a_reader_never_sees_two_versions(open_: Open, client: ObjectClient, prefix: str) -> None:
    client.put(f"{prefix}/a", b"1" * (2 * MIB), write_id="one")
    storage = open_("a")
    client.put(f"{prefix}/a", b"2" * (2 * MIB), write_id="two")
    data = bytearray(4096)
    storage.readv((data,), 0)
    assert data == b"1" * 4096
    for _ in range(2):
        with pytest.raises(StorageChangedError, match="open it again"):
            storage.readv((data,), 2 * MIB - 4096)
    client.delete([f"{prefix}/a"])
    with pytest.raises(StorageChangedError, match="removed"):
        storage.readv((data,), MIB)


def test_what_a_writer_published_itself_is_no_change_under_it(
    open_: Open, client: ObjectClient, prefix: str
) -> None:
    client.put(f"{prefix}/a", b"1" * (3 * MIB), write_id="one")
    storage = open_("a", writable=True)
    storage.writev((b"2" * MIB,), MIB)
    storage.sync()
    expected = b"1" * MIB + b"2" * MIB + b"1" * MIB
    assert content(storage) == expected == stored(client, f"{prefix}/a")


class _Page(http.server.SimpleHTTPRequestHandler):
    """A page of the web without an ETag, given in ranges."""

    content = os.urandom(2 * MIB)
    modified = "Wed, 21 Oct 2015 07:28:00 GMT"

    def do_GET(self) -> None:
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        stop = min(int(last) + 1, len(self.content))
        self.send_response(206)
        self.send_header("Last-Modified", self.modified)
        self.send_header("Content-Length", str(stop - int(first)))
        self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{len(self.content)}")
        self.end_headers()
        self.wfile.write(self.content[int(first) : stop])

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_page_of_the_web_is_one_version_by_its_length_and_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        name = f"http://127.0.0.1:{server.server_address[1]}/a%20folder/disk.raw"
        with underlay.open_any(name) as disk:
            assert disk.read_bytes(MIB, 4096) == _Page.content[MIB : MIB + 4096]
            assert disk.read_bytes(2 * MIB - 5, 5) == _Page.content[-5:]
            monkeypatch.setattr(_Page, "modified", "Wed, 21 Oct 2015 07:28:01 GMT")
            assert disk.read_bytes(MIB, 4096) == _Page.content[MIB : MIB + 4096]
            with pytest.raises(StorageChangedError):
                disk.read_bytes(3 * MIB // 2, 4096)
        server.shutdown()


# -- writing


def test_what_did_not_change_is_copied_by_the_server(
    open_: Open, client: ObjectClient, prefix: str
) -> None:
    part = 5 * MIB
    old = os.urandom(4 * part + 100)
    client.put(f"{prefix}/a", old, write_id="one")
    storage = open_("a", writable=True, part_size=part, parallel=2)
    storage.writev((b"new",), part + 1000)
    storage.write_zeroes(3 * part, 10)
    storage.sync()
    new = bytearray(old)
    new[part + 1000 : part + 1003] = b"new"
    new[3 * part : 3 * part + 10] = bytes(10)
    assert stored(client, f"{prefix}/a") == new == content(storage)
    storage.resize(2 * part)
    storage.sync()
    assert stored(client, f"{prefix}/a") == new[: 2 * part]


def test_what_became_shorter_is_read_to_its_end(
    open_: Open, client: ObjectClient, prefix: str
) -> None:
    old = os.urandom(3 * MIB)
    client.put(f"{prefix}/a", old, write_id="one")
    storage = open_("a", writable=True)
    storage.resize(2 * MIB + 10_000)
    storage.sync()
    data = bytearray(20_000)
    storage.readv((data,), 2 * MIB)
    assert data == old[2 * MIB : 2 * MIB + 10_000] + bytes(10_000)
    assert content(storage) == old[: 2 * MIB + 10_000]


def test_zeroes_and_holes_take_no_room_here(create: Open, tmp_path: Path) -> None:
    storage = create("a", size=1 << 40, staging=str(tmp_path))
    storage.writev((b"x" * (4 * MIB),), 1 << 20)
    storage.write_zeroes(0, 1 << 40)
    storage.discard(1 << 30, 1 << 30)
    storage.writev((b"x" * 4096,), 1 << 39)
    staging = storage._staging
    assert staging is not None
    assert os.fstat(staging._file.fileno()).st_blocks * 512 <= 64 << 10
    assert list(tmp_path.iterdir()) == []
    extent = storage.extent_at(0)
    assert (extent.length, extent.is_data) == (1 << 39, False)
    extent = storage.extent_at(1 << 39)
    assert (extent.length, extent.is_data) == (4096, True)
    storage.close()


def test_a_folder_that_cannot_hold_what_is_written_is_named(create: Open, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="missing"):
        create("a", staging=str(tmp_path / "missing"))


def test_pages_of_the_web_are_read_only() -> None:
    with pytest.raises(ReadOnlyError, match="web"):
        underlay.open_any("https://localhost/x", writable=True)
    with pytest.raises(ReadOnlyError, match="web"):
        underlay.create("http://localhost/x", size=1)


# -- whole images


def test_an_image_goes_there_and_back(
    seaweed: Server, url: Callable[[str], str], tmp_path: Path, qemu_img: Tool, qemu_io: Tool
) -> None:
    here, back = tmp_path / "here.qcow2", tmp_path / "back.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", here, "200M")
    qemu_io("-c", "write -q -P 7 0 9M", "-c", "write -q -P 9 150M 3M", here)
    options = seaweed.options()
    progress: list[float] = []
    underlay.jobs.convert(
        str(here),
        url("there.qcow2"),
        output_format="qcow2",
        target_storage_options=options,
        progress=lambda told: progress.append(told.done),
    )
    with underlay.open_any(url("there.qcow2"), storage_options=options) as disk:
        assert disk.format_name == "qcow2"
        assert disk.size == 200 * MIB
        assert disk.read_bytes(9 * MIB - 2, 4) == b"\7\7\0\0"
    underlay.jobs.convert(
        url("there.qcow2"), str(back), output_format="qcow2", storage_options=options
    )
    qemu_img("compare", here, back)
    qemu_img("check", "-q", back)
    assert progress


@pytest.mark.parametrize("format_name", ["raw", "qcow2"])
def test_any_format_is_created_written_and_opened_again(
    seaweed: Server, url: Callable[[str], str], format_name: str
) -> None:
    options = seaweed.options()
    with underlay.create(
        url("a"), format=format_name, size=3 * MIB, storage_options=options
    ) as disk:
        disk.write(b"hello", 2 * MIB)
    with underlay.open_any(url("a"), writable=True, storage_options=options) as disk:
        assert disk.format_name == format_name
        disk.write(b"there", 2 * MIB + 5)
        disk.flush()
        disk.sync()
    with underlay.open_any(url("a"), storage_options=options) as disk:
        assert disk.read_bytes(2 * MIB, 10) == b"hellothere"


async def _read_asynchronously(name: str, options: dict[str, object]) -> bytes:
    import asyncio

    async with await underlay.aio.open_any(name, storage_options=options) as disk:
        pieces = await asyncio.gather(
            *[disk.read_bytes(at, 4096) for at in range(0, MIB, 64 << 10)]
        )
        return b"".join(pieces)


def test_the_asynchronous_face_reads_the_same(
    seaweed: Server, client: ObjectClient, prefix: str, url: Callable[[str], str]
) -> None:
    import asyncio

    whole = os.urandom(MIB)
    client.put(f"{prefix}/a", whole, write_id="one")
    expected = b"".join(whole[at : at + 4096] for at in range(0, MIB, 64 << 10))
    assert asyncio.run(_read_asynchronously(url("a"), seaweed.options())) == expected


def test_a_backing_image_is_seen_from_the_folder_of_its_overlay(
    seaweed: Server, url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    with underlay.create(url("base.qcow2"), size=MIB) as disk:
        disk.write(b"below", 0)
    underlay.create(url("top.qcow2"), backing_file="base.qcow2", backing_fmt="qcow2").close()
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        underlay.open_any(url("top.qcow2"))
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        underlay.open_any(url("top.qcow2"), gate=underlay.DirectoryGate())
    gate = underlay.PermissiveImplicitOpenGate()
    with underlay.open_any(url("top.qcow2"), gate=gate) as disk:
        assert disk.read_bytes(0, 5) == b"below"


# -- what cannot be


def _run(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "underlay", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("bucket", "changed", "said"),
    [
        (BUCKET, {}, "no such"),
        ("underlay-no-bucket", {}, "Could not read"),
        (BUCKET, {"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "SignatureDoesNotMatch"),
        (BUCKET, {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "AWS_ACCESS_KEY_ID"),
    ],
)
def test_the_command_says_in_one_line_and_in_time_what_is_wrong(
    seaweed: Server, bucket: str, changed: dict[str, str], said: str
) -> None:
    environment = {**seaweed.environment(), **changed}
    before = time.monotonic()
    # Would it try again, it would do so for minutes.
    words = ("info", "--storage-option=deadline=400", f"s3://{bucket}/not-there.qcow2")
    done = _run(*words, environment=environment)
    assert time.monotonic() - before < 60
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert said in done.stderr or "404" in done.stderr, done.stderr
    for secret in (seaweed.environment()["AWS_SECRET_ACCESS_KEY"], "wrong-secret"):
        assert secret not in done.stderr


def test_no_secret_is_in_any_message_or_log(
    seaweed: Server,
    create: Open,
    url: Callable[[str], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = str(seaweed.options()["secret_access_key"])
    caplog.set_level(logging.DEBUG)
    create("a", size=5).sync()
    storage = create("a", size=6, overwrite=True)
    create("a", size=7, overwrite=True).sync()
    texts = [repr(storage), repr(storage._published.settings), repr(storage.reopening())]
    texts += [repr(storage._published.location), repr(storage.describe())]
    failures: list[Callable[[], object]] = [
        storage.sync,
        lambda: create("a"),
        lambda: create("b", unknown="option"),
        lambda: create("b", endpoint="http://127.0.0.1:1", deadline=1),
        lambda: underlay.probe(
            url("c"), storage_options=seaweed.options(access_key_id="nobody", deadline=1)
        ),
    ]
    for fail in failures:
        with pytest.raises(UnderlayError) as caught:
            fail()
        told = io.StringIO()
        traceback.print_exception(caught.value, file=told)
        texts += [str(caught.value), repr(caught.value), told.getvalue()]
    assert all(secret not in text for text in [*texts, caplog.text])


def test_wrong_credentials_are_an_error_of_their_own(seaweed: Server, prefix: str) -> None:
    options = seaweed.options(secret_access_key="another")  # noqa: S106 - and a wrong one
    with pytest.raises(StorageAccessError):
        underlay.probe(f"s3://{BUCKET}/{prefix}/a", storage_options=options)


def test_an_unknown_option_lists_the_known_ones(create: Open) -> None:
    with pytest.raises(OptionError, match="endpoint"):
        create("a", endpiont="http://127.0.0.1:1")


def test_without_obstore_the_error_says_what_to_install() -> None:
    code = """
import sys
sys.modules["obstore"] = sys.modules["botocore"] = None
import underlay
try:
    underlay.probe("s3://bucket/key", storage_options={"anonymous": True})
except underlay.PluginError as error:
    print(error)
try:
    underlay.probe("https://localhost/key")
except underlay.PluginError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.count("pip install 'underlay[s3]'") == 2, done.stdout


def test_finding_the_plug_in_loads_nothing_that_talks_to_servers() -> None:
    code = """
import sys
import underlay_storage.s3
print(sorted({"obstore", "botocore", "concurrent.futures", "tempfile"} & set(sys.modules)))
print(__import__("threading").active_count())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split("\n")[:2] == ["[]", "1"]


def test_memory_is_bounded_whatever_is_read(
    seaweed: Server, client: ObjectClient, prefix: str, url: Callable[[str], str]
) -> None:
    client.put_in_pieces(f"{prefix}/a", lambda: [os.urandom(8 * MIB)] * 12, write_id="a test")
    code = """
import re, sys
import underlay

def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])

disk = underlay.open_image(
    sys.argv[1], format="raw", storage_options={"cache": "8M", "parallel": 2}
)
buffer = bytearray(1 << 20)
disk.read(buffer, 0)
before = peak()
for offset in range(0, disk.size, len(buffer)):
    disk.read(buffer, offset)
disk.close()
print((peak() - before) >> 10)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, url("a")],
        env={**os.environ, **seaweed.environment()},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(done.stdout) < 32, done.stdout
