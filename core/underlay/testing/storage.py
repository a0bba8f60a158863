"""The storage contract as tests: subclass ``StorageContract``, and say how to make your storage.

::

    class TestMyStorage(StorageContract):
        def make(self, content: bytes) -> MyStorage:
            return MyStorage.from_bytes(content)

For the coroutine rung ``make`` and ``reopen`` are coroutines. The tests run on both faces and go
through ``underlay.handle.StorageHandle``, as all use of a storage does.
"""

from __future__ import annotations

import inspect
import pickle
import random
import threading
import time
import unittest
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar, cast

from underlay.buffers import aligned_buffer
from underlay.errors import ReadOnlyError, UnderlayError, UnsupportedOperationError
from underlay.face import gather, home_loop, in_loop, run_blocking
from underlay.handle import StorageHandle
from underlay.storage import (
    AnyStorage,
    BlockingStorage,
    Extent,
    PreallocateMode,
    is_blocking_storage,
    is_storage,
)
from underlay.testing.faces import Parametrized, both_faces

__all__ = ["StorageContract"]

#: Enough for several blocks of any storage, and no multiple of anything.
_SIZE = 200_003


class StorageContract(Parametrized):
    """What every storage must do. The hooks come first."""

    #: Whether it can be written.
    can_write: ClassVar[bool] = True
    #: Whether a write past its end makes it longer, and ``resize`` works.
    can_resize: ClassVar[bool] = True
    #: Whether it gives back what was written; False for one that reads as zeroes whatever comes.
    keeps_data: ClassVar[bool] = True

    @abstractmethod
    def make(self, content: bytes) -> AnyStorage | Awaitable[AnyStorage]:
        """A new object that holds ``content``, writable if it can be; the suite closes it."""

    def reopen(self, storage: AnyStorage) -> AnyStorage | Awaitable[AnyStorage] | None:
        """A second handle on the same object, read-only; None if there can be none."""
        return None

    def stored(self, storage: AnyStorage) -> bytes | None:
        """What the object holds, got without the storage; None if there is no other way."""
        return None

    # -- facts

    @both_faces
    async def test_facts_are_of_their_kinds(self) -> None:
        """What it says of itself can be relied on."""
        async with self._new(b"x" * _SIZE) as handle:
            storage = handle.storage
            assert is_storage(storage), "it does not subclass Storage or BlockingStorage by name"
            assert storage.size() == _SIZE
            assert isinstance(storage.name(), str)
            assert storage.name()
            assert storage.writable() == self.can_write
            hash(storage.identity())
            assert isinstance(storage.describe(), Mapping)
            for align in (storage.req_align(), storage.mem_align()):
                assert align > 0
                assert align & (align - 1) == 0
            for align in (storage.zero_align(), storage.discard_align()):
                assert align > 0
                assert align % storage.req_align() == 0

    @both_faces
    async def test_identity_is_the_object_and_no_other(self) -> None:
        """Equal for two handles on one object, different for two objects."""
        async with self._new(b"one") as one, self._new(b"one") as other:
            if one.identity() is None:
                raise unittest.SkipTest("it cannot tell objects apart")
            assert one.identity() != other.identity()
            async with self._again(one) as again:
                assert again.identity() == one.identity()

    @both_faces
    async def test_other_processes_can_tell_whether_it_is_the_same(self) -> None:
        """``reopening`` pickles, and is equal where the object is, and holds the same bytes."""
        async with self._new(b"one") as one, self._new(b"one") as other:
            told = one.reopening()
            if told is None:
                raise unittest.SkipTest("other processes cannot reach it")
            assert pickle.loads(pickle.dumps(told)) == told  # noqa: S301 - our own bytes
            assert other.reopening() != told
            async with self._again(one) as again:
                assert again.reopening() == told
            if self.can_write:
                _let_time_pass()
                await one.write(b"two", 0)
                await one.sync()
                assert one.reopening() != told

    @both_faces
    async def test_buffers_can_be_pushed_down_and_dropped(self) -> None:
        """``flush``, ``sync`` and ``invalidate_cache`` may always be called."""
        async with self._new(b"abc") as handle:
            await handle.flush()
            await handle.sync()
            await handle.invalidate_cache()
            assert handle.size() == 3

    # -- reading

    @both_faces
    async def test_any_range_can_be_read(self) -> None:
        """Whatever the alignment of offset, length and memory."""
        content = self._content(_SIZE)
        async with self._new(content) as handle:
            dice = random.Random(1)
            ranges = [(0, _SIZE), (0, 1), (_SIZE - 1, 1), (511, 2), (4095, 4098), (65535, 65538)]
            ranges += [(dice.randrange(_SIZE), dice.randrange(1, 9000)) for _ in range(30)]
            for offset, length in ranges:
                expected = content[offset : offset + length].ljust(length, b"\0")
                assert await handle.read_bytes(offset, length) == expected, (offset, length)

    @both_faces
    async def test_past_the_end_are_zeroes(self) -> None:
        """A read is never short, wherever it begins; and old bytes of the buffer do not stay."""
        content = self._content(1000)
        async with self._new(content) as handle:
            for offset in (0, 999, 1000, 1001, 1 << 20, 1 << 40):
                buffer = bytearray(b"?" * 5000)
                await handle.read(buffer, offset)
                assert buffer == content[offset:].ljust(5000, b"\0"), offset
        async with self._new(b"") as handle:
            assert handle.size() == 0
            assert await handle.read_bytes(0, 100) == bytes(100)

    @both_faces
    async def test_many_buffers_are_filled_in_order(self) -> None:
        """More than the 1,024 that one system call takes, of any length."""
        content = self._content(_SIZE)
        async with self._new(content) as handle:
            buffers = [bytearray(1 + number % 97) for number in range(2500)]
            await handle.readv(buffers, 7)
            whole = b"".join(buffers)
            assert whole == content[7 : 7 + len(whole)]

    def test_what_can_be_read_without_waiting_is_right(self) -> None:
        """``try_readv`` counts what it read, and no more."""
        content = self._content(_SIZE)

        async def check() -> None:
            async with self._new(content) as handle:
                if not is_blocking_storage(handle.storage):
                    raise unittest.SkipTest("the coroutine rung has no such call")
                storage = cast("BlockingStorage", handle.storage)
                whole = content.ljust(_SIZE + 65536, b"\0")
                for offset in (0, 65536, 131072, 196608):
                    buffer = aligned_buffer(65536)
                    buffer[:] = b"?" * 65536
                    count = storage.try_readv((buffer[:16384], buffer[16384:]), offset)
                    if count is not None:
                        assert 0 <= count <= 65536
                        assert buffer[:count] == whole[offset : offset + count]
                    storage.readv((buffer[:16384], buffer[16384:]), offset)
                    assert buffer == whole[offset : offset + 65536]

        run_blocking(check())

    @both_faces
    async def test_extents_cover_the_object_and_holes_are_zeroes(self) -> None:
        """What is called a hole reads as zeroes; data and holes meet without gaps to the end."""
        content = bytes(300_000) + self._content(100_000) + bytes(300_000)
        async with self._new(content) as handle:
            if self.can_resize:
                await handle.resize(2_000_000)
                await handle.write(self._content(70_000), 1_500_000)
            offset = 0
            while offset < handle.size():
                extent = await handle.extent_at(offset)
                assert isinstance(extent, Extent)
                assert 0 < extent.length <= handle.size() - offset, offset
                if not extent.is_data:
                    hole = await handle.read_bytes(offset, extent.length)
                    assert not any(hole), offset
                offset += extent.length
            assert offset == handle.size()
            inside = await handle.extent_at(123_457)
            assert 0 < inside.length <= handle.size() - 123_457

    # -- writing

    @both_faces
    async def test_what_is_written_is_read(self) -> None:
        """Any alignment, one buffer or many, and nothing beside them changes."""
        self._need_write()
        model = bytearray(self._content(_SIZE))
        async with self._new(bytes(model)) as handle:
            dice = random.Random(2)
            for _ in range(30):
                offset = dice.randrange(_SIZE - 9000)
                data = self._content(dice.randrange(1, 9000), seed=dice.random())
                await handle.write(data, offset)
                model[offset : offset + len(data)] = data
            pieces = [self._content(1 + number % 61, seed=number) for number in range(2500)]
            await handle.writev(pieces, 333)
            joined = b"".join(pieces)
            model[333 : 333 + len(joined)] = joined
            await self._check(handle, model)

    @both_faces
    async def test_a_write_makes_it_longer_by_exactly_that(self) -> None:
        """Across the end and beyond it; what lies between reads as zeroes."""
        self._need_resize()
        model = bytearray(self._content(1000))
        async with self._new(bytes(model)) as handle:
            for offset in (990, 1017, 70_001, 300_000):
                data = self._content(29, seed=offset)
                await handle.write(data, offset)
                model.extend(bytes(max(offset + 29 - len(model), 0)))
                model[offset : offset + 29] = data if self.keeps_data else bytes(29)
                await self._check(handle, model)

    @both_faces
    async def test_zeroing_changes_the_range_and_nothing_else(self) -> None:
        """Not the length either, even where the range reaches to the end or past it."""
        self._need_write()
        for allocate in (False, True):
            model = bytearray(self._content(_SIZE))
            async with self._new(bytes(model)) as handle:
                for offset, length in (
                    (1, 100),
                    (4096, 8192),
                    (50_001, 100_000),
                    (_SIZE - 5000, 5000),
                    (_SIZE - 10, 100_000),
                    (_SIZE + 5, 4096),
                ):
                    await handle.write_zeroes(offset, length, allocate=allocate)
                    end = min(offset + length, _SIZE)
                    model[offset:end] = bytes(max(end - offset, 0))
                    await self._check(handle, model)

    @both_faces
    async def test_discarding_touches_nothing_outside(self) -> None:
        """The length stays, as do the bytes before and behind the range."""
        self._need_write()
        content = self._content(_SIZE)
        async with self._new(content) as handle:
            await handle.discard(4097, 100_000)
            await handle.discard(_SIZE - 1000, 1 << 20)
            assert handle.size() == _SIZE
            assert await handle.read_bytes(0, 4097) == content[:4097]
            middle = content[104_097 : _SIZE - 1000]
            assert await handle.read_bytes(104_097, len(middle)) == middle
            await handle.write(b"fresh", 5000)
            assert await handle.read_bytes(5000, 5) == (b"fresh" if self.keeps_data else bytes(5))

    @both_faces
    async def test_growing_shows_zeroes_and_never_what_was_cut(self) -> None:
        """In every preallocation mode that it has."""
        self._need_resize()
        for mode in PreallocateMode:
            content = self._content(10_001)
            async with self._new(content) as handle:
                try:
                    await handle.resize(200_000, mode)
                except UnsupportedOperationError:
                    assert handle.size() == 10_001
                    continue
                await self._check(handle, content.ljust(200_000, b"\0"))
                await handle.resize(777, mode)
                await self._check(handle, content[:777])
                await handle.resize(100_003, mode)
                await self._check(handle, content[:777].ljust(100_003, b"\0"))
                await handle.resize(0)
                assert handle.size() == 0
                await handle.resize(5)
                await self._check(handle, bytes(5))

    @both_faces
    async def test_read_only_stays_as_it_is(self) -> None:
        """A handle that was not opened for writing says so, and changes nothing."""
        content = self._content(5000)
        async with self._new(content) as first, self._again(first) as handle:
            assert not handle.writable()
            await _raises(ReadOnlyError, lambda: handle.write(b"no", 0))
            await _raises(ReadOnlyError, lambda: handle.write(b"no", 1 << 20))
            await _raises(ReadOnlyError, lambda: handle.write_zeroes(0, 4096))
            await _raises((ReadOnlyError, UnsupportedOperationError), lambda: handle.resize(10))
            await self._check(handle, content)

    # -- many at once

    def test_threads_do_not_disturb_each_other(self) -> None:
        """Reads and writes side by side on the blocking face, neighbouring bytes included."""
        self._need_write()
        share, count = 1201, 8

        async def check() -> None:
            async with self._new(bytes(share * count)) as handle:
                failures: list[BaseException] = []

                def work(number: int) -> None:
                    try:
                        for round_ in range(10):
                            data = bytes([1 + number + round_]) * share
                            run_blocking(handle.write(data, number * share))
                            got = run_blocking(handle.read_bytes(number * share, share))
                            assert got == (data if self.keeps_data else bytes(share))
                    except BaseException as error:  # noqa: BLE001 - handed to the test's thread
                        failures.append(error)

                threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert not failures, failures
                assert handle.size() == share * count

        run_blocking(check())

    @both_faces
    async def test_tasks_do_not_disturb_each_other(self) -> None:
        """Writes of neighbouring bytes, many at once on the async face."""
        self._need_write()
        model = self._content(3000)
        async with self._new(bytes(3000)) as handle:

            def write(offset: int) -> Callable[..., object]:
                return lambda: handle.write(model[offset : offset + 30], offset)

            await gather(16, [write(offset) for offset in range(0, 3000, 30)])  # type: ignore[misc]
            await self._check(handle, model)

    def test_a_cancelled_call_has_ended_when_its_task_has(self) -> None:
        """It writes nothing later, and what comes next works as ever."""
        import asyncio

        model = bytearray(self._content(100_000))

        async def check() -> None:
            async with self._new(bytes(model)) as handle:
                dice = random.Random(3)
                for number in range(20):
                    calls: list[Coroutine[Any, Any, object]] = [handle.read_bytes(number, 50_000)]
                    if self.can_write:
                        calls.append(handle.write(b"\xee" * 50_000, number))
                    tasks = [asyncio.ensure_future(call) for call in calls]
                    for _ in range(dice.randrange(4)):
                        await asyncio.sleep(0)
                    for task in tasks:
                        task.cancel()
                    await asyncio.wait(tasks)
                    if self.can_write:
                        fresh = self._content(50_000, seed=number)
                        await handle.write(fresh, number)
                        model[number : number + 50_000] = fresh
                        model[:number] = await handle.read_bytes(0, number)
                        got = await handle.read_bytes(number, 50_000)
                        assert got == model[number : number + 50_000]
                assert handle.size() == 100_000
                end = await handle.read_bytes(50_019, 49_981)
                assert end == model[50_019:]

        asyncio.run(check())

    # -- helpers

    def _content(self, length: int, *, seed: float = 0) -> bytes:
        """Bytes that differ everywhere, or what a storage makes of them that keeps nothing."""
        return random.Random(seed).randbytes(length) if self.keeps_data else bytes(length)

    @asynccontextmanager
    async def _new(self, content: bytes) -> AsyncGenerator[StorageHandle]:
        async with _handle(self.make, content) as handle:
            yield handle

    @asynccontextmanager
    async def _again(self, handle: StorageHandle) -> AsyncGenerator[StorageHandle]:
        async with _handle(self.reopen, handle.storage) as other:
            yield other

    async def _check(self, handle: StorageHandle, content: bytes | bytearray) -> None:
        assert handle.size() == len(content)
        assert await handle.read_bytes(0, len(content)) == content
        await handle.flush()
        stored = self.stored(handle.storage)
        assert stored is None or stored == content

    def _need_write(self) -> None:
        if not self.can_write:
            raise unittest.SkipTest("it cannot be written")

    def _need_resize(self) -> None:
        if not (self.can_write and self.can_resize):
            raise unittest.SkipTest("its length is fixed")


@asynccontextmanager
async def _handle(
    make: Callable[..., AnyStorage | Awaitable[AnyStorage] | None], argument: object
) -> AsyncGenerator[StorageHandle]:
    """A handle on what a hook makes; a coroutine runs in the loop where its storage will live."""
    if inspect.iscoroutinefunction(make):
        made = await in_loop(home_loop(), make, argument)
    else:
        made = make(argument)
    if made is None:
        raise unittest.SkipTest("there is no second handle on one object")
    handle = StorageHandle(cast("AnyStorage", made), owned=True)
    try:
        yield handle
    finally:
        await handle.close()


async def _raises(
    kinds: type[UnderlayError] | tuple[type[UnderlayError], ...],
    call: Callable[[], Awaitable[object]],
) -> None:
    try:
        await call()
    except kinds:
        return
    raise AssertionError(f"it was let through, and should have raised {kinds}")


def _let_time_pass() -> None:
    """For those who tell by a clock that something was changed."""
    time.sleep(0.05)
