"""What stands before every storage: alignment, waiting, fallbacks."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from underlay.buffers import aligned_buffer
from underlay.errors import ClosedError, StorageError, UnsupportedOperationError
from underlay.face import run_blocking
from underlay.handle import StorageHandle
from underlay.storage import AnyStorage, PreallocateMode, ReadBuffers, WriteBuffers
from underlay.testing import AlignedStorage, AwaitableMemoryStorage, PausedStorage, WrappedStorage
from underlay.testing.faces import FACES, drive
from underlay_storage.memory import MemoryStorage


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def handle_on(storage: AnyStorage, *, owned: bool = True) -> StorageHandle:
    return StorageHandle(storage, owned=owned)


def content_of(storage: MemoryStorage) -> bytes:
    content = bytearray(storage.size())
    storage.readv((content,), 0)
    return bytes(content)


# -- alignment


@pytest.mark.parametrize("request_align", [1, 512, 4096])
@pytest.mark.parametrize("memory_align", [1, 4, 4096])
def test_any_request_becomes_one_of_whole_blocks(
    face: str, request_align: int, memory_align: int
) -> None:
    dice = random.Random(request_align * memory_align)
    model = bytearray(dice.randbytes(20_001))
    inner = MemoryStorage(bytes(model))
    storage = AlignedStorage(inner, request=request_align, memory=memory_align)

    async def check() -> None:
        handle = handle_on(storage)
        for _ in range(60):
            offset, length = dice.randrange(20_000), dice.randrange(1, 6000)
            match dice.randrange(5):
                case 0 | 1:
                    end = offset + length
                    model.extend(bytes(max(end - len(model), 0)))
                    model[offset:end] = data = dice.randbytes(length)
                    cuts = sorted(dice.sample(range(length + 1), min(3, length)))
                    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
                    await handle.writev([piece for piece in pieces if piece], offset)
                case 2:
                    end = min(offset + length, len(model))
                    model[offset:end] = bytes(max(end - offset, 0))
                    await handle.write_zeroes(offset, length, allocate=dice.random() < 0.5)
                case 3:
                    buffers: list[memoryview | bytearray] = [
                        bytearray(length),
                        aligned_buffer(4096),
                        bytearray(3),
                    ]
                    await handle.readv(buffers, offset)
                    wanted = bytes(model[offset : offset + length + 4099]).ljust(
                        length + 4099, b"\0"
                    )
                    assert b"".join(buffers) == wanted
                case _:
                    buffer = aligned_buffer(8192)
                    await handle.read(buffer, offset & -4096)
                    start = offset & -4096
                    assert buffer == bytes(model[start : start + 8192]).ljust(8192, b"\0")
            assert inner.size() == len(model)
        assert content_of(inner) == model

    drive(face, check())


class Recording(AlignedStorage):
    """Remembers how long each request was."""

    def __init__(self, inner: MemoryStorage) -> None:
        super().__init__(inner, request=512)
        self.lengths: list[int] = []

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        self.lengths.append(sum(map(len, buffers)))
        super().readv(buffers, offset)

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        self.lengths.append(sum(map(len, buffers)))
        super().writev(buffers, offset)


def test_a_large_misaligned_request_needs_little_memory(face: str) -> None:
    data = random.Random(1).randbytes(5_000_000)
    storage = Recording(MemoryStorage())

    async def check() -> None:
        handle = handle_on(storage)
        await handle.write(data, 77)
        assert await handle.read_bytes(77, len(data)) == data
        assert max(storage.lengths) <= 1 << 20
        assert storage.size() == 77 + len(data)

    drive(face, check())


def test_aligned_requests_go_straight_through() -> None:
    storage = Recording(MemoryStorage(8192))
    handle = handle_on(storage)
    run_blocking(handle.read(bytearray(1024), 512))
    run_blocking(handle.write(bytes(2048), 512))
    assert storage.lengths == [1024, 2048]
    assert handle.stats.read_bytes == 1024
    assert handle.stats.write_bytes == 2048
    assert handle.inline_readv is None, "the hot path is for storages without alignment only"


class Slow(WrappedStorage):
    """Lets others run between any two calls."""

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        super().readv(buffers, offset)
        time.sleep(0.0001)

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        super().writev(buffers, offset)
        time.sleep(0.0001)


def test_neighbours_in_one_block_do_not_overwrite_each_other() -> None:
    model = random.Random(2).randbytes(4096)
    inner = MemoryStorage(4096)
    handle = handle_on(AlignedStorage(Slow(inner)))

    async def tasks() -> None:
        await asyncio.gather(*(handle.write(model[n : n + 7], n) for n in range(0, 2048, 7)))

    def thread(first: int) -> None:
        for n in range(2048 + first, 4096, 44):
            run_blocking(handle.write(model[n : n + 11], n))

    threads = [threading.Thread(target=thread, args=(first,)) for first in (0, 11, 22, 33)]
    for one in threads:
        one.start()
    asyncio.run(tasks())
    for one in threads:
        one.join()
    run_blocking(handle.write(model[2040:2060], 2040))
    assert content_of(inner) == model


def test_padding_at_the_end_cuts_off_nobody_elses_growth() -> None:
    # Each write makes the object longer and must cut its padding off again.
    model = random.Random(3).randbytes(40 * 700)
    for _ in range(5):
        inner = MemoryStorage()
        handle = handle_on(AlignedStorage(Slow(inner)))
        starts = list(range(0, len(model), 700))
        random.Random(4).shuffle(starts)

        def thread(mine: list[int], handle: StorageHandle = handle) -> None:
            for start in mine:
                run_blocking(handle.write(model[start : start + 700], start))

        threads = [threading.Thread(target=thread, args=(starts[n::4],)) for n in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert content_of(inner) == model


# -- waiting


def test_what_needs_no_waiting_uses_no_worker(face: str) -> None:
    seen: list[int] = []

    class Watching(WrappedStorage):
        def readv(self, buffers: ReadBuffers, offset: int) -> None:
            seen.append(threading.get_ident())
            super().readv(buffers, offset)

        def try_readv(self, buffers: ReadBuffers, offset: int) -> int | None:
            half = len(buffers[0]) // 2
            super().readv((memoryview(buffers[0])[:half],), offset)
            return half if offset else self.inner.try_readv(buffers, offset)

    async def check() -> None:
        handle = handle_on(Watching(MemoryStorage(b"0123456789" * 10)))
        assert await handle.read_bytes(0, 10) == b"0123456789"
        assert seen == ([] if face == "async" else [threading.get_ident()])
        assert await handle.read_bytes(5, 10) == b"5678901234"
        here = threading.get_ident()
        assert (seen[-1] == here) == (face == "blocking")

    drive(face, check())


@pytest.mark.parametrize("align", [1, 512])
@pytest.mark.parametrize("action", ["read", "write"])
def test_cancelling_waits_for_the_call_and_leaves_all_as_it_should_be(
    align: int, action: str
) -> None:
    inner = MemoryStorage(b"old." * 1000)
    paused = PausedStorage(AlignedStorage(inner, request=align))

    async def check() -> None:
        handle = handle_on(paused)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "read": lambda: handle.read_bytes(3, 100),
            "write": lambda: handle.write(b"new" * 100, 3900),
        }
        task = asyncio.ensure_future(calls[action]())
        while not paused.waiting.is_set():
            await asyncio.sleep(0.001)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.005)
            assert not task.done()
        paused.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The lock is free, no padding is left, and the next call works.
        assert inner.size() == (4200 if action == "write" else 4000)
        await asyncio.wait_for(handle.write(b"next", 3901), 10)
        assert await handle.read_bytes(3901, 4) == b"next"

    asyncio.run(check())


def test_a_failed_write_leaves_the_lock_free_and_no_padding(face: str) -> None:
    class Failing(WrappedStorage):
        broken = True

        def writev(self, buffers: WriteBuffers, offset: int) -> None:
            if self.broken:
                super().writev((memoryview(buffers[0])[:512],), offset)
                raise StorageError("no space left")
            super().writev(buffers, offset)

    inner = MemoryStorage(b"x" * 700)
    failing = Failing(AlignedStorage(inner))

    async def check() -> None:
        handle = handle_on(failing)
        with pytest.raises(StorageError):
            await handle.write(b"y" * 10, 695)
        assert inner.size() <= 705
        failing.broken = False
        await handle.write(b"z", 0)
        assert await handle.read_bytes(0, 2) == b"zx"

    drive(face, check())


def test_coroutine_storages_are_served_in_their_loop_from_everywhere(face: str) -> None:
    async def make() -> StorageHandle:
        from underlay.face import home_loop, in_loop

        async def inside() -> AwaitableMemoryStorage:
            return AwaitableMemoryStorage(b"content")

        return handle_on(await in_loop(home_loop(), inside))

    handle = run_blocking(make())  # lives in the background

    async def check() -> None:
        assert await handle.read_bytes(0, 8) == b"content\0"
        await handle.write(b"C", 0)
        await handle.write_zeroes(1, 2)
        await handle.resize(5, PreallocateMode.OFF)
        assert await handle.read_bytes(0, 8) == b"C\0\0te\0\0\0"
        await handle.close()

    drive(face, check())


# -- fallbacks and the end


def test_what_a_storage_cannot_do_is_done_the_plain_way(face: str) -> None:
    class Plain(WrappedStorage):
        def write_zeroes(self, offset: int, length: int, allocate: bool = False) -> None:
            raise UnsupportedOperationError("no")

        def discard(self, offset: int, length: int) -> None:
            raise UnsupportedOperationError("no")

    inner = MemoryStorage(b"x" * 3_000_000)

    async def check() -> None:
        handle = handle_on(Plain(inner))
        await handle.discard(0, 1000)
        await handle.write_zeroes(1, 2_500_000)
        assert content_of(inner) == b"x" + bytes(2_500_000) + b"x" * 499_999

    drive(face, check())


def test_closing_closes_what_is_owned_and_once(face: str) -> None:
    class Closing(WrappedStorage):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    async def check() -> None:
        for owned in (False, True):
            storage = Closing(MemoryStorage(b"x"))
            handle = handle_on(storage, owned=owned)
            await handle.close()
            await handle.close()
            assert storage.closed == owned
            with pytest.raises(ClosedError):
                await handle.read_bytes(0, 1)
            with pytest.raises(ClosedError):
                await handle.write(b"x", 0)
            assert handle.inline_readv is None

    drive(face, check())


def test_a_cancelled_close_closes_all_the_same() -> None:
    class Closing(WrappedStorage):
        closed = False

        def close(self) -> None:
            self.closed = True

    async def check() -> None:
        storage = Closing(MemoryStorage())
        task = asyncio.ensure_future(handle_on(storage).close())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert storage.closed

    asyncio.run(check())
