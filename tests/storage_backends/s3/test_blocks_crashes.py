"""No crash leaves a disk that names what is not there, or has lost what was synced (O2, O3, O17).

Nothing orders the requests of an object store but their acknowledgements: what was acknowledged has
happened, and of what was under way any part may have. Each such state is opened and looked through.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import attrs
import pytest

from underlay.errors import StorageError, UnderlayError
from underlay_storage.s3.blocks import flushing
from underlay_storage.s3.blocks.flushing import Writer
from underlay_storage.s3.blocks.layout import Name, Ref, checksum
from underlay_storage.s3.blocks.objects import Objects
from underlay_storage.s3.blocks.storage import S3Blocks
from underlay_storage.s3.client import Condition

from .memory_bucket import Bucket, MemoryClient, lose

BLOCK = 4096
#: Few blocks may wait in memory, so that many go to the server before a sync.
OPTIONS = {"block_size": BLOCK, "cache": 1 << 20, "grace": 0}
PREFIX = "disk"


# -- what happened


@attrs.frozen
class Begun:
    """A request is under way; ``data`` is None for a removal."""

    number: int
    key: str
    data: bytes | None


@attrs.frozen
class Acknowledged:
    number: int


@attrs.frozen
class Synced:
    """The guest calls sync (``done`` is False), or was told that it has worked."""

    model: int
    done: bool


class RecordingClient(MemoryClient):
    """Writes down when requests begin and when they are acknowledged."""

    def __init__(self) -> None:
        super().__init__(None, **OPTIONS)
        self.events: list[Begun | Acknowledged | Synced] = []
        self._numbers = itertools.count()
        self._recording = threading.Lock()
        self._dice = random.Random(1)

    def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        *,
        write_id: str,
        condition: Condition | None = None,
    ) -> str | None:
        with self._recording:
            number = next(self._numbers)
            self.events.append(Begun(number, key, bytes(data)))
            pause = self._dice.random() / 2000
        time.sleep(pause)  # so that others are under way with it
        etag = super().put(key, data, write_id=write_id, condition=condition)
        with self._recording:
            self.events.append(Acknowledged(number))
        return etag

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            number = next(self._numbers)
            self.events.append(Begun(number, key, None))
            super().delete([key])
            self.events.append(Acknowledged(number))


def _run(client: RecordingClient, seed: int) -> list[bytes]:
    """A guest that writes, zeroes, resizes and syncs; what the disk held at each sync."""
    dice = random.Random(seed)
    model = bytearray(40 * BLOCK)
    models = [bytes(model)]
    client.events.append(Synced(0, done=False))
    storage = S3Blocks.create(client, PREFIX, size=len(model))
    client.events.append(Synced(0, done=True))
    for _ in range(60):
        chance = dice.random()
        offset = dice.randrange(40 * BLOCK)
        length = dice.choice((1, 100, BLOCK, 3 * BLOCK + 1))
        if chance < 0.6:
            data = dice.randbytes(length)
            storage.writev((data,), offset)
            model.extend(bytes(max(offset + length - len(model), 0)))
            model[offset : offset + length] = data
        elif chance < 0.75:
            storage.write_zeroes(offset, length)
            end = min(offset + length, len(model))
            model[offset:end] = bytes(max(end - offset, 0))
        elif chance < 0.8:
            storage.resize(offset)
            model = model[:offset].ljust(offset, b"\0")
        else:
            models.append(bytes(model))
            client.events.append(Synced(len(models) - 1, done=False))
            storage.sync()
            client.events.append(Synced(len(models) - 1, done=True))
    storage.close()
    return models


# -- what a crash leaves of it


@attrs.define
class State:
    objects: dict[str, bytes]
    #: The sync that was promised last, and the one that was called last.
    promised: int
    called: int
    story: str


def _states(client: RecordingClient, chance: random.Random) -> Iterator[State]:
    """Each moment, with each part of what was under way (or many of them)."""
    durable: dict[str, bytes] = {}
    pending: dict[int, Begun] = {}
    promised = called = 0
    for number, event in enumerate(client.events):
        match event:
            case Begun():
                pending[event.number] = event
            case Acknowledged():
                _apply(durable, [pending.pop(event.number)])
            case Synced(model, done):
                called = model
                promised = model if done else promised
        for some in _subsets(list(pending.values()), chance):
            objects = dict(durable)
            _apply(objects, some)
            if f"{PREFIX}/root" in objects:
                story = f"after event {number}, with {[one.key for one in some]}"
                yield State(objects, promised, called, story)


def _subsets(pending: list[Begun], chance: random.Random) -> Iterator[list[Begun]]:
    if len(pending) <= 3:
        for count in range(len(pending) + 1):
            yield from map(list, itertools.combinations(pending, count))
        return
    yield []
    yield pending
    for _ in range(4):
        yield [one for one in pending if chance.random() < 0.5]


def _apply(objects: dict[str, bytes], requests: list[Begun]) -> None:
    for request in requests:
        if request.data is None:
            objects.pop(request.key, None)
        else:
            objects[request.key] = request.data


# -- whether that is good


def _problem(state: State, models: list[bytes]) -> str | None:
    """What is wrong with a state, if anything is."""
    client = _client(state.objects)
    try:
        reader = S3Blocks.attach(client, PREFIX)
        checked = reader.check_objects(read_all=True)
        if checked.damaged:
            return f"{state.story}: {checked.damages}"
        found = _content(reader)
        reader.close()
    except UnderlayError as error:
        return f"{state.story}: {error}"
    if found not in models[state.promised : state.called + 1]:
        return f"{state.story}: neither what was promised nor what was to be"
    return None


def _content(storage: S3Blocks) -> bytes:
    content = bytearray(storage.size())
    if content:
        storage.readv((content,), 0)
    return bytes(content)


def _client(objects: Mapping[str, bytes]) -> MemoryClient:
    bucket = Bucket()
    for key, data in objects.items():
        bucket.store(key, data)
    return MemoryClient(bucket, **OPTIONS)


def _collectable(state: State) -> None:
    """Whoever comes next can write, and what the crash left over is removed."""
    client = _client(state.objects)
    reader = S3Blocks.attach(client, PREFIX)
    before = _content(reader)
    reader.collect(grace=0, take_over=True)
    assert _content(reader) == before, state.story
    reader.close()
    checked = S3Blocks.attach(client, PREFIX).check_objects(read_all=True)
    assert (checked.damaged, checked.unneeded) == (0, 0), state.story
    assert len(client.bucket.objects) == checked.objects + 1, state.story
    writer = S3Blocks.attach(client, PREFIX, writable=True)
    writer.writev((b"next",), 0)
    writer.sync()
    writer.close()
    reader = S3Blocks.attach(client, PREFIX)
    assert _content(reader) == b"next" + before[4:], state.story
    reader.close()


@pytest.fixture(autouse=True)
def sweep_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects that are not needed any more are removed as soon as they may be."""
    monkeypatch.setattr(flushing, "_SWEPT_TOGETHER", 1)


@pytest.mark.parametrize("seed", range(6))
def test_a_crash_leaves_a_disk_that_is_whole(seed: int) -> None:
    client = RecordingClient()
    models = _run(client, seed)
    chance = random.Random(seed)
    judged = 0
    for number, state in enumerate(_states(client, chance)):
        assert _problem(state, models) is None
        if number % 10 == 0:
            _collectable(state)
        judged += 1
    assert judged > 300


def _late(monkeypatch: pytest.MonkeyPatch, client: RecordingClient) -> None:
    """Write objects behind the root that names them."""
    waiting: list[tuple[Name, bytes]] = []
    write, replace = Objects.write, Objects.replace_root

    def later(_self: Objects, name: Name, data: bytes | memoryview) -> Ref:
        waiting.append((name, bytes(data)))
        return Ref(name, len(data), checksum(data))

    def first(self: Objects, *arguments: object) -> object:
        done = replace(self, *arguments)  # type: ignore[arg-type]
        while waiting:
            write(self, *waiting.pop())
        return done

    monkeypatch.setattr(Objects, "write", later)
    monkeypatch.setattr(Objects, "replace_root", first)


def _hasty(monkeypatch: pytest.MonkeyPatch, client: RecordingClient) -> None:
    """Remove what the next root will not name while this one still does."""
    write = Writer._write_segment

    def segment(self: Writer, *arguments: object) -> object:
        written, replaced = write(self, *arguments)  # type: ignore[arg-type]
        self._objects.delete(replaced)
        return written, replaced

    monkeypatch.setattr(Writer, "_write_segment", segment)


def _forgetful(monkeypatch: pytest.MonkeyPatch, client: RecordingClient) -> None:
    """Say that all is durable when the blocks are, without a root."""

    def nothing(_self: Writer) -> None:
        """No root is written."""

    monkeypatch.setattr(Writer, "_publish", nothing)


@pytest.mark.parametrize("mutate", [_late, _hasty, _forgetful])
def test_a_wrong_order_would_be_found(
    mutate: Callable[[pytest.MonkeyPatch, RecordingClient], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = RecordingClient()
    mutate(monkeypatch, client)
    models = _run(client, 1)
    monkeypatch.undo()
    assert any(_problem(state, models) for state in _states(client, random.Random(1)))


# -- requests that fail


def _guest(storage: S3Blocks, sync: Callable[[], None]) -> bytes:
    """A short session; what the disk holds at its end."""
    storage.writev((b"1" * (5 * BLOCK),), 0)
    sync()
    storage.writev((b"2" * BLOCK,), BLOCK)
    storage.write_zeroes(3 * BLOCK, BLOCK)
    sync()
    storage.resize(4 * BLOCK)
    storage.writev((b"3" * 10,), 5)
    sync()
    return b"11111" + b"3" * 10 + b"1" * (BLOCK - 15) + b"2" * BLOCK + b"1" * BLOCK + bytes(BLOCK)


@attrs.define
class Failing:
    """Makes requests that change something fail: from one on, so many."""

    first: int
    count: float
    #: How many have been made, and have failed.
    seen: int = 0
    failed: int = 0

    def __call__(self, verb: str, _key: str) -> None:
        if verb not in {"put", "delete"}:
            return
        self.seen += 1
        if self.first < self.seen <= self.first + self.count:
            self.failed += 1
            lose()


def _fail(client: MemoryClient, moment: str, failing: Failing) -> None:
    """Let requests fail ``before`` or ``after`` they come to pass."""
    setattr(client, moment, failing)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("first", range(20))
def test_any_request_may_fail_once_whether_or_not_it_was_made(first: int, moment: str) -> None:
    client = MemoryClient(None, **OPTIONS)
    storage = S3Blocks.create(client, PREFIX)
    _fail(client, moment, Failing(first, 1))

    def sync() -> None:
        try:
            storage.sync()
        except StorageError:
            storage.sync()

    expected = _guest(storage, sync)
    storage.close()
    reader = S3Blocks.attach(MemoryClient(client.bucket, **OPTIONS), PREFIX)
    assert _content(reader) == expected
    assert reader.check_objects(read_all=True).damaged == 0
    reader.collect(grace=0, take_over=True)
    assert _content(reader) == expected
    checked = reader.check_objects()
    assert (checked.damaged, checked.unneeded) == (0, 0)
    reader.close()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("first", range(20))
def test_from_some_request_on_all_fail(first: int, moment: str) -> None:
    """O2: nothing more is promised, and what is there is the last sync (or the next, in time)."""
    client = MemoryClient(None, **OPTIONS)
    storage = S3Blocks.create(client, PREFIX)
    failing = Failing(first, math.inf)
    _fail(client, moment, failing)
    synced = [b""]

    def sync() -> None:
        storage.sync()
        synced.append(_synced(client.bucket))

    try:
        _guest(storage, sync)
    except StorageError:
        assert failing.failed
    else:
        assert first > 10
    storage.close()
    assert moment == "after" or _synced(client.bucket) == synced[-1]


def _synced(bucket: Bucket) -> bytes:
    """What whoever opens the disk now reads; all of it is there."""
    reader = S3Blocks.attach(MemoryClient(bucket, **OPTIONS), PREFIX)
    assert reader.check_objects(read_all=True).damaged == 0
    content = _content(reader)
    reader.close()
    return content
