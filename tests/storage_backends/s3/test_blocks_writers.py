"""Writers never ruin each other's work; nobody removes what is needed: O9-O11, O15, O17, O18."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import attrs
import pytest

from underlay.errors import (
    StorageChangedError,
    StorageError,
    StorageExistsError,
    StorageNotFoundError,
    UnderlayError,
    UnsupportedOperationError,
)
from underlay.storage import StorageCreateOptions, StorageOpenOptions
from underlay_storage.s3.blocks.collecting import collect
from underlay_storage.s3.blocks.layout import NOBODY, Root
from underlay_storage.s3.blocks.objects import Objects
from underlay_storage.s3.blocks.storage import S3Blocks
from underlay_storage.s3.client import Got, ObjectClient

from .memory_bucket import Bucket, MemoryClient
from .proxy import Proxy, Request
from .servers import BUCKET, Server
from .workloads import until

BLOCK = 4096
OPTIONS = {"block_size": BLOCK, "cache": 1 << 20}
PREFIX = "disk"


def _client(bucket: Bucket | None = None, **more: object) -> MemoryClient:
    return MemoryClient(bucket, **{**OPTIONS, **more})


def _content(storage: S3Blocks) -> bytes:
    content = bytearray(storage.size())
    if content:
        storage.readv((content,), 0)
    return bytes(content)


def _read(client: ObjectClient, prefix: str = PREFIX) -> bytes:
    """What whoever opens the disk now reads; all of it is there."""
    reader = S3Blocks.attach(client, prefix)
    assert reader.check_objects(read_all=True).damaged == 0
    content = _content(reader)
    reader.close()
    return content


def _together(works: Sequence[Callable[[], None]]) -> None:
    """Run in as many threads; what one raises is raised."""
    failures: list[BaseException] = []
    ready = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            ready.wait()
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# -- O9, O10: races on a real server


def test_of_sixteen_who_create_one_disk_one_does(seaweed: Server, prefix: str) -> None:
    made: list[int] = []

    def create(number: int) -> None:
        try:
            storage = S3Blocks.create(seaweed.client(), prefix, size=number + 1)
        except StorageExistsError:
            return
        made.append(number)
        storage.close()

    _together([lambda number=number: create(number) for number in range(16)])  # type: ignore[misc]
    assert len(made) == 1
    reader = S3Blocks.attach(seaweed.client(), prefix)
    assert reader.size() == made[0] + 1
    reader.close()


def test_no_root_is_lost_among_eight_who_replace_it(client: ObjectClient, prefix: str) -> None:
    objects = Objects(client, prefix)
    objects.create_root(Root(generation=1, writer=NOBODY, size=0, block_size=BLOCK, segments={}))

    def increment() -> None:
        done = 0
        while done < 15:
            found = objects.read_root()
            root = found.root
            counted = attrs.evolve(root, generation=root.generation + 1, size=root.size + 1)
            try:
                objects.replace_root(counted, found.etag)
            except StorageChangedError:
                continue
            done += 1

    _together([increment] * 8)
    assert objects.read_root().root.size == 120


def test_every_sync_that_was_promised_counts_among_writers_who_shut_each_other_out(
    seaweed: Server, prefix: str
) -> None:
    client = seaweed.client(**OPTIONS)
    S3Blocks.create(client, prefix, size=8).close()
    promised: list[int] = []

    def increment(seed: int) -> None:
        dice = random.Random(seed)
        done = 0
        while done < 4:
            storage = S3Blocks.attach(client, prefix, writable=True)
            try:
                number = int.from_bytes(_content(storage), "big") + 1
                storage.writev((number.to_bytes(8, "big"),), 0)
                storage.sync()
            except StorageChangedError:
                time.sleep(dice.random() / 10)
            else:
                promised.append(number)
                done += 1
            finally:
                storage.close()

    _together([lambda seed=seed: increment(seed) for seed in range(4)])  # type: ignore[misc]
    assert sorted(promised) == list(range(1, 17))
    assert _read(client, prefix) == (16).to_bytes(8, "big")


def test_a_new_writer_shuts_the_old_one_out_at_once(seaweed: Server, prefix: str) -> None:
    options = seaweed.options(**OPTIONS)
    name = f"s3+blocks://{BUCKET}/{prefix}"
    old = S3Blocks.create_open(StorageCreateOptions(name=name, size=BLOCK, options=options))
    old.writev((b"old",), 0)
    old.sync()
    old.writev((b"lost",), 10)
    new = S3Blocks.open(StorageOpenOptions(name=name, writable=True, options=options))
    with pytest.raises(StorageChangedError, match="taken over by another writer since it was"):
        old.sync()
    for again in (
        old.sync,
        lambda: old.writev((b"x",), 0),
        lambda: old.write_zeroes(0, BLOCK),
        lambda: old.resize(1),
    ):
        with pytest.raises(StorageChangedError):
            again()
    assert _content(old)[:14] == b"old".ljust(10, b"\0") + b"lost"
    new.writev((b"new",), 3)
    new.sync()
    old.close()
    new.close()
    assert _read(seaweed.client(), prefix) == b"oldnew".ljust(BLOCK, b"\0")


def test_a_disk_that_was_removed_shuts_its_writer_out() -> None:
    client = _client()
    storage = S3Blocks.create(client, PREFIX)
    storage.writev((b"x",), 0)
    client.bucket.objects.clear()
    with pytest.raises(StorageChangedError, match="was removed since it was opened"):
        storage.sync()
    storage.close()
    assert not [key for key in client.bucket.objects if key.endswith("root")]


def test_who_cannot_keep_two_writers_apart_is_not_written_to(rclone: Server, prefix: str) -> None:
    with pytest.raises(UnsupportedOperationError, match="say single_writer=on"):
        S3Blocks.create(rclone.client(), prefix)
    alone = rclone.client(single_writer=True, **OPTIONS)
    storage = S3Blocks.create(alone, prefix)
    storage.writev((b"mine",), 0)
    storage.sync()
    storage.close()
    with pytest.raises(StorageExistsError):
        S3Blocks.create(alone, prefix)
    assert _read(rclone.client(), prefix) == b"mine"


# -- O11, O17: processes that are stopped, and killed

_WRITER = """
import sys
from underlay.errors import StorageChangedError
from underlay.storage import StorageOpenOptions
from underlay_storage.s3.blocks.storage import S3Blocks

name, endpoint, key, secret, byte = sys.argv[1:]
options = dict(endpoint=endpoint, access_key_id=key, secret_access_key=secret, cache="1M")
storage = S3Blocks.open(StorageOpenOptions(name=name, writable=True, options=options))
try:
    while True:
        storage.writev((byte.encode() * (40 * 4096),), 0)
        storage.sync()
        print("synced", flush=True)
except StorageChangedError:
    print("shut out", flush=True)
storage.close()
"""


@pytest.fixture
def start(
    seaweed: Server, proxy: Proxy, prefix: str
) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """A process that writes one byte over and over, through the proxy, and has synced once."""
    processes: list[subprocess.Popen[str]] = []
    S3Blocks.create(seaweed.client(**OPTIONS), prefix, size=40 * BLOCK).close()

    def writer() -> subprocess.Popen[str]:
        options = seaweed.options()
        arguments = [f"s3+blocks://{BUCKET}/{prefix}", proxy.endpoint]
        arguments += [str(options["access_key_id"]), str(options["secret_access_key"]), "a"]
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_WRITER), *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "synced\n"
        return process

    yield writer
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _stop_at(process: subprocess.Popen[str], wanted: str, how: int) -> Callable[[Request], None]:
    """A script for the proxy: signal the process in the middle of a request."""
    told = False

    def script(request: Request) -> None:
        nonlocal told
        if not told and request.method == "PUT" and wanted in request.path:
            told = True
            os.kill(process.pid, how)

    return script


@pytest.mark.parametrize("wanted", ["/objects/", "/root"])
def test_a_writer_who_was_paused_in_its_flush_is_shut_out(
    wanted: str,
    start: Callable[[], subprocess.Popen[str]],
    proxy: Proxy,
    seaweed: Server,
    prefix: str,
) -> None:
    process = start()
    with proxy.scripted(_stop_at(process, wanted, signal.SIGSTOP)) as requests:
        os.waitpid(process.pid, os.WUNTRACED)
        # What was under way arrives.
        until(lambda: all(request.status is not None for request in requests))
    other = S3Blocks.attach(seaweed.client(**OPTIONS), prefix, writable=True)
    other.writev((b"b" * BLOCK,), BLOCK)
    other.sync()
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "shut out"
    other.writev((b"c" * BLOCK,), 2 * BLOCK)
    other.sync()
    other.close()
    expected = b"a" * BLOCK + b"b" * BLOCK + b"c" * BLOCK + b"a" * (37 * BLOCK)
    assert _read(seaweed.client(), prefix) == expected


@pytest.mark.parametrize("wanted", ["/objects/", "/root"])
def test_a_writer_who_is_killed_leaves_a_disk_that_is_whole(
    wanted: str,
    start: Callable[[], subprocess.Popen[str]],
    proxy: Proxy,
    seaweed: Server,
    prefix: str,
) -> None:
    process = start()
    with proxy.scripted(_stop_at(process, wanted, signal.SIGKILL)):
        process.wait()
        until(lambda: not proxy.connections)
    client = seaweed.client()
    assert _read(client, prefix) == b"a" * (40 * BLOCK)
    left = collect(Objects(client, prefix), grace=0)
    assert left.removed == 0 or left.writers == 0  # its own are kept: it might still be there
    done = collect(Objects(client, prefix), grace=0, take_over=True)
    assert (done.waiting, done.writers) == (0, 0)
    reader = S3Blocks.attach(client, prefix)
    checked = reader.check_objects(read_all=True)
    assert (checked.damaged, checked.unneeded) == (0, 0)
    reader.close()
    following = S3Blocks.attach(seaweed.client(**OPTIONS), prefix, writable=True)
    following.writev((b"b" * BLOCK,), 0)
    following.sync()
    following.close()
    assert _read(client, prefix)[: 2 * BLOCK] == b"b" * BLOCK + b"a" * BLOCK


def test_what_is_left_of_trying_conditions_is_collected() -> None:
    client = MemoryClient(None, **OPTIONS)
    S3Blocks.create(client, PREFIX, size=BLOCK).close()
    for name in (f"{PREFIX}/root.underlay-probe/1", f"{PREFIX}/mine"):
        client.bucket.store(name, b"1")
    collect(Objects(client, PREFIX), grace=60)
    assert f"{PREFIX}/root.underlay-probe/1" in client.bucket.objects
    client.bucket.now += 61
    collect(Objects(client, PREFIX), grace=60)
    assert sorted(client.bucket.objects) == [f"{PREFIX}/mine", f"{PREFIX}/root"]


# -- O15: old answers


class StaleClient(MemoryClient):
    """Answers with a root that is not the newest any more."""

    stale: bytes | None = None

    def get(self, key: str, start: int, length: int, *, etag: str | None = None) -> Got:
        got = super().get(key, start, length, etag=etag)
        if key.endswith("/root") and self.stale is not None:
            facts = attrs.evolve(got.facts, etag='"old"', size=len(self.stale))
            return Got(data=memoryview(self.stale), facts=facts)
        return got


def test_an_old_root_makes_no_writer() -> None:
    client = StaleClient(None, **OPTIONS)
    storage = S3Blocks.create(client, PREFIX, size=BLOCK)
    old = client.bucket.objects[f"{PREFIX}/root"].data
    storage.writev((b"new",), 0)
    storage.sync()
    storage.close()
    client.stale = old
    with pytest.raises(StorageChangedError):
        S3Blocks.attach(client, PREFIX, writable=True)
    # Who only reads gets what was there once, whole.
    assert _read(client) == bytes(BLOCK)
    client.stale = None
    assert _read(client) == b"new".ljust(BLOCK, b"\0")


def test_an_old_root_in_the_place_of_an_acknowledged_one_is_noticed() -> None:
    client = StaleClient(None, **OPTIONS)
    storage = S3Blocks.create(client, PREFIX, size=BLOCK)
    old = client.bucket.objects[f"{PREFIX}/root"].data
    storage.writev((b"1",), 0)
    storage.sync()
    storage.writev((b"2",), 0)
    client.stale = old
    client.bucket.store(f"{PREFIX}/root", client.bucket.objects[f"{PREFIX}/root"].data)
    with pytest.raises(StorageError, match="older than one that it has acknowledged"):
        storage.sync()
    client.stale = None
    storage.sync()
    storage.close()
    assert _read(client)[:1] == b"2"


# -- O18: nothing is removed that is needed


def _written(client: MemoryClient) -> None:
    """A disk with a history."""
    storage = S3Blocks.create(client, PREFIX, size=20 * BLOCK)
    for letter in b"abc":
        storage.writev((bytes([letter]) * (10 * BLOCK),), letter % 8 * BLOCK)
        storage.sync()
    storage.close()


@pytest.mark.parametrize("takes_over", [False, True])
@pytest.mark.parametrize("paused_at", range(12))
def test_a_collector_may_sleep_between_any_two_requests(paused_at: int, takes_over: bool) -> None:
    """Meanwhile a writer takes over, writes and syncs, and is still there when it wakes up."""
    bucket = Bucket()
    _written(_client(bucket))
    collector = _client(bucket, grace=0)
    reached, go_on = threading.Event(), threading.Event()
    seen = 0

    def pause(*_request: str) -> None:
        nonlocal seen
        seen += 1
        if seen == paused_at + 1:
            reached.set()
            assert go_on.wait(60)

    collector.before = pause
    failures: list[UnderlayError] = []

    def run() -> None:
        try:
            collect(Objects(collector, PREFIX), grace=0, take_over=takes_over)
        except StorageChangedError as error:
            failures.append(error)
        finally:
            reached.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert reached.wait(60)
    writer = S3Blocks.attach(_client(bucket, grace=0), PREFIX, writable=True)
    writer.writev((b"d" * (12 * BLOCK),), 0)
    writer.sync()
    writer.writev((b"e" * (3 * BLOCK),), BLOCK)
    writer.sync()
    expected = _content(writer)
    # Uploaded, and named by no root yet.
    writer.writev((b"f" * (300 * BLOCK),), 20 * BLOCK)
    go_on.set()
    thread.join()
    assert _read(_client(bucket)) == expected
    assert takes_over or not failures
    collect(Objects(_client(bucket), PREFIX), grace=0)
    try:
        writer.sync()
        expected = expected + b"f" * (300 * BLOCK)
    except StorageChangedError:
        assert takes_over
    writer.close()
    assert _read(_client(bucket)) == expected


def test_what_a_reader_may_need_is_kept_for_the_grace_period() -> None:
    client = _client()
    _written(client)
    writer = S3Blocks.attach(client, PREFIX, writable=True)
    reader = S3Blocks.attach(client, PREFIX)
    before = _content(reader)
    writer.writev((b"z" * (20 * BLOCK),), 0)
    writer.sync()
    writer.close()
    objects = Objects(_client(client.bucket), PREFIX)
    client.bucket.now += 3599
    kept = collect(objects, grace=3600)
    assert (kept.removed, kept.writers) == (0, 0)
    assert kept.waiting > 10
    reader.invalidate_cache()
    assert _content(reader) == before
    client.bucket.now += 2
    gone = collect(objects, grace=3600)
    assert (gone.removed, gone.waiting) == (kept.waiting, 0)
    reader.invalidate_cache()
    with pytest.raises(StorageChangedError):
        _content(reader)
    reader.close()
    assert _read(client) == b"z" * (20 * BLOCK)
    assert {key.split("/")[1] for key in client.bucket.objects} == {"root", "objects"}


def test_a_disk_that_is_written_all_the_time_is_tidied_up_too() -> None:
    """The root is never old; what was marked an hour ago is."""
    client = _client()
    _written(client)
    objects = Objects(_client(client.bucket), PREFIX)
    writer = S3Blocks.attach(client, PREFIX, writable=True)
    removed: list[int] = []
    for turn in range(6):
        writer.writev((bytes([turn]) * BLOCK,), 0)
        writer.sync()
        removed.append(collect(objects, grace=3600).removed)
        client.bucket.now += 1801
    assert removed[:2] == [0, 0]
    assert removed[2] > 10
    assert not any(removed[3:])  # this writer's own are its own business
    writer.close()
    client.bucket.now += 3601
    collect(objects, grace=3600)
    reader = S3Blocks.attach(client, PREFIX)
    checked = reader.check_objects(read_all=True)
    assert (checked.damaged, checked.unneeded) == (0, 0)
    reader.close()
    assert {key.split("/")[1] for key in client.bucket.objects} == {"root", "objects"}


def test_closing_removes_what_no_reader_can_know_of() -> None:
    client = _client()
    storage = S3Blocks.create(client, PREFIX)
    for letter in b"abcdefgh":
        storage.writev((bytes([letter]) * (300 * BLOCK),), 0)
    storage.sync()
    storage.writev((b"never synced" * (100 * BLOCK),), 0)
    storage.close()
    reader = S3Blocks.attach(client, PREFIX)
    checked = reader.check_objects(read_all=True)
    assert (checked.objects, checked.unneeded) == (301, 0)
    assert _content(reader) == b"h" * (300 * BLOCK)
    reader.close()


class AtOnce:
    """A writer, readers and a collector, who do not wait for each other."""

    def __init__(self) -> None:
        self.bucket = Bucket()
        self.begun = time.monotonic()
        self.written = self.read = self.collected = 0

    def goes_on(self) -> bool:
        """For a moment, and until each has had a turn."""
        passed = time.monotonic() - self.begun
        return passed < (60 if 0 in (self.written, self.read, self.collected) else 3)

    def write(self) -> None:
        while self.goes_on():
            storage = S3Blocks.attach(_client(self.bucket, grace=0), PREFIX, writable=True)
            for letter in b"xyz":
                storage.writev((bytes([letter]) * (20 * BLOCK),), 0)
                storage.sync()
            storage.close()
            self.written += 1

    def look(self) -> None:
        while self.goes_on():
            storage = S3Blocks.attach(_client(self.bucket), PREFIX)
            try:
                content = _content(storage)
            except StorageChangedError:
                continue
            finally:
                storage.close()
            assert content == content[:1] * (20 * BLOCK)
            self.read += 1

    def tidy_up(self) -> None:
        while self.goes_on():
            # A part of the index that it was reading may be replaced, and removed.
            with contextlib.suppress(StorageNotFoundError):
                collect(Objects(_client(self.bucket), PREFIX), grace=0)
                self.collected += 1


def test_writers_readers_and_collectors_at_once() -> None:
    trial = AtOnce()
    storage = S3Blocks.create(_client(trial.bucket), PREFIX)
    storage.writev((b"x" * (20 * BLOCK),), 0)
    storage.sync()
    storage.close()
    _together([trial.write, trial.look, trial.look, trial.tidy_up])
    assert min(trial.written, trial.read, trial.collected) > 0
    assert _read(_client(trial.bucket)) == b"z" * (20 * BLOCK)
