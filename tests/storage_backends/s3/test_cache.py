"""The cache by itself: what is fetched, by whom and how often, and how much of it is kept."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable

import pytest

from underlay.errors import StorageError
from underlay_storage.s3.cache import PAGE, Cache
from underlay_storage.s3.workers import Workers

MIB = 1 << 20
SIZE = 40 * MIB + 12_345


@functools.cache
def _content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


class Object:
    """An object that keeps account; what runs beside its readers runs when a test says so."""

    def __init__(self, size: int = SIZE, *, capacity: int = 64 * MIB) -> None:
        self.content = _content(size)
        self.fetched: list[tuple[int, int]] = []
        self.waiting: list[Callable[[], None]] = []
        self.before: Callable[[], object] = lambda: None
        self.cache = Cache(self.fetch, size=size, capacity=capacity, submit=self.waiting.append)

    def fetch(self, offset: int, length: int) -> memoryview:
        self.before()
        assert length > 0
        assert offset + length <= len(self.content)
        self.fetched.append((offset, length))
        return memoryview(self.content)[offset : offset + length]

    def read(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The requests that a read made, by itself and beside it."""
        before = len(self.fetched)
        got = b"".join(self.cache.read(offset, length))
        assert got == self.content[offset : offset + length]
        return self.fetched[before:]

    def run_waiting(self) -> list[tuple[int, int]]:
        """What was fetched beside the readers."""
        before = len(self.fetched)
        while self.waiting:
            self.waiting.pop(0)()
        return self.fetched[before:]


def test_a_small_read_is_one_small_request_and_the_next_one_none() -> None:
    it = Object()
    assert it.read(5 * MIB + 100, 4096) == [(5 * MIB, PAGE)]
    assert it.read(5 * MIB + 50, 5000) == []
    assert it.waiting == []


def test_what_is_missing_between_two_pieces_is_one_request() -> None:
    it = Object()
    it.read(0, 100)
    it.read(8 * PAGE, 100)
    assert it.read(10, 12 * PAGE) == [(PAGE, 7 * PAGE), (9 * PAGE, 4 * PAGE)]
    assert it.read(0, 13 * PAGE) == []


def test_the_last_page_ends_where_the_object_does() -> None:
    it = Object()
    assert it.read(SIZE - 10, 10) == [(SIZE & -PAGE, SIZE % PAGE)]


def test_a_large_read_is_made_side_by_side() -> None:
    it = Object()
    it.before = it.run_waiting  # the other threads are quicker than the reader
    assert sorted(it.read(MIB, 10 * MIB)) == [
        (MIB, 4 * MIB),
        (5 * MIB, 4 * MIB),
        (9 * MIB, 2 * MIB),
    ]


def test_what_waits_for_a_thread_is_fetched_by_the_reader_itself() -> None:
    it = Object()
    assert len(it.read(0, 10 * MIB)) == 3
    assert it.run_waiting() == []


def test_who_goes_on_finds_what_follows_fetched_already() -> None:
    it = Object()
    own, beside = 0, 0
    for offset in range(0, SIZE - 8192, 8192):
        own += len(it.read(offset, 8192))
        beside += len(it.run_waiting())
    assert own <= 2
    assert beside <= 20
    assert sum(length for _, length in it.fetched) <= SIZE


def test_the_window_grows() -> None:
    it = Object()
    windows: list[int] = []
    for offset in range(0, 4 * MIB, 64 << 10):
        it.read(offset, 64 << 10)
        windows += [length for _, length in it.run_waiting()]
    assert max(windows[:2]) <= 256 << 10
    assert max(windows) > MIB
    assert it.cache._ahead <= 32 * MIB


def test_two_readers_side_by_side_are_both_noticed() -> None:
    it = Object()
    own = 0
    for offset in range(0, 16 * MIB, 128 << 10):
        own += len(it.read(offset, 128 << 10)) + len(it.read(20 * MIB + offset, 128 << 10))
        it.run_waiting()
    assert own <= 4


def test_who_reads_here_and_there_gets_nothing_more() -> None:
    it = Object()
    dice = random.Random(1)
    for _ in range(200):
        it.read(dice.randrange(SIZE - 4096) & -4096, 4096)
    assert it.waiting == []
    assert {length for _, length in it.fetched} <= {PAGE, SIZE % PAGE}


def test_no_more_is_kept_than_there_is_room_for() -> None:
    it = Object(capacity=2 * MIB)
    dice = random.Random(2)
    for _ in range(300):
        offset = dice.randrange(SIZE - 300_000)
        it.read(offset, dice.randrange(1, 300_000))
        it.run_waiting()
        held = [piece for piece in it.cache._pieces.values() if piece.data is not None]
        assert sum(piece.length for piece in held) == it.cache._held <= 2 * MIB
        assert it.cache._starts == sorted(it.cache._pieces)
    for offset in range(0, SIZE - MIB, 100_000):
        it.read(offset, 100_000)
        it.run_waiting()
    assert it.cache._held <= 2 * MIB
    assert it.cache._ahead == sum(p.length for p in it.cache._pieces.values() if p.window)


def test_what_was_used_last_stays() -> None:
    it = Object(capacity=MIB)
    for offset in range(0, 4 * MIB, 2 * PAGE):
        it.read(offset, 1)
        assert it.read(0, 1) == [] or not offset


def test_what_is_here_is_had_without_waiting() -> None:
    it = Object()
    it.read(PAGE, 2 * PAGE)
    views = it.cache.ready(2 * PAGE, 10 * PAGE)
    assert b"".join(views) == it.content[2 * PAGE : 3 * PAGE]
    assert it.cache.ready(0, 2 * PAGE) == []
    assert len(it.fetched) == 1


def test_what_came_at_the_open_is_not_fetched_again() -> None:
    it = Object()
    it.cache.put(memoryview(it.content)[: MIB // 2])
    assert it.read(0, MIB // 2) == []
    it.cache.clear()
    assert it.read(0, 1) == [(0, PAGE)]


def test_many_who_wait_for_one_thing_have_it_fetched_once() -> None:
    it = Object()
    begun, go = threading.Event(), threading.Event()

    def before() -> None:
        begun.set()
        assert go.wait(10)

    it.before = before
    got: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: got.append(b"".join(it.cache.read(PAGE, 1000))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    go.set()
    for thread in threads:
        thread.join()
    assert got == [it.content[PAGE : PAGE + 1000]] * 8
    assert it.fetched == [(PAGE, PAGE)]


def test_a_failure_reaches_the_reader_and_is_not_kept() -> None:
    it = Object()

    def before() -> None:
        raise StorageError("no answer")

    it.before = before
    with pytest.raises(StorageError, match="no answer"):
        it.read(0, 9 * MIB)
    it.run_waiting()
    with pytest.raises(StorageError, match="no answer"):
        it.read(0, 1)
    it.before = lambda: None
    it.waiting.clear()
    assert it.read(0, 1) == [(0, PAGE)]


def test_a_failure_ahead_of_the_readers_is_nobodys() -> None:
    it = Object()
    it.read(0, PAGE)
    it.read(PAGE, PAGE)
    assert it.waiting

    def before() -> None:
        raise StorageError("no answer")

    it.before = before
    it.run_waiting()
    it.before = lambda: None
    assert it.read(2 * PAGE, PAGE) == [(2 * PAGE, PAGE)]
    assert it.cache._ahead >= 0


def test_who_is_interrupted_leaves_nobody_waiting() -> None:
    it = Object()
    begun, go = threading.Event(), threading.Event()

    def before() -> None:
        begun.set()
        assert go.wait(10)
        it.before = lambda: None
        raise KeyboardInterrupt

    it.before = before
    ended: list[str] = []

    def interrupted() -> None:
        try:
            it.cache.read(0, 10)
        except KeyboardInterrupt:
            ended.append("interrupted")

    def other() -> None:
        ended.append(b"".join(it.cache.read(0, 10)).hex())

    threads = [threading.Thread(target=interrupted)]
    threads[0].start()
    assert begun.wait(10)
    threads.append(threading.Thread(target=other))
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(10)
    assert sorted(ended) == sorted(["interrupted", it.content[:10].hex()])


def test_threads_of_all_kinds_read_what_is_there() -> None:
    it = Object(8 * MIB, capacity=MIB)
    workers = Workers(3)
    it.cache = Cache(it.fetch, size=8 * MIB, capacity=MIB, submit=workers.submit)
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        dice = random.Random(seed)
        try:
            offset = 0
            for _ in range(150):
                length = dice.randrange(1, 400_000)
                if seed % 2 or offset + length > 8 * MIB:
                    offset = dice.randrange(8 * MIB - length)
                got = b"".join(it.cache.read(offset, length))
                assert got == it.content[offset : offset + length]
                offset += length
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    workers.close()
    assert not failures, failures
