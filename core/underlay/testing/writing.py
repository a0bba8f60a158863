"""The format contract as tests, for drivers that write: ``WritableDriverContract``.

Each test has a model beside the disk, compares the two, and once more after the image was closed
and opened again; and with what somebody else reads there, where ``read_by_others`` can tell.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from underlay.access import FormatAccess
from underlay.buffers import total
from underlay.errors import (
    OutOfRangeError,
    StorageError,
    UnderlayError,
    UnsupportedOperationError,
)
from underlay.face import run_blocking
from underlay.handle import StorageHandle
from underlay.mapping import Data
from underlay.plugins import registry
from underlay.storage import StorageOpenOptions, WriteBuffers
from underlay.targets import open_with
from underlay.testing.driver import DriverContract
from underlay.testing.faces import both_faces
from underlay.testing.helping import other_storages, raises
from underlay.testing.wrappers import WrappedStorage

__all__ = ["WritableDriverContract"]

_SIZE = 400_003


class WritableDriverContract(DriverContract):
    """What every driver that writes must do, besides reading."""

    #: Whether ``resize_grow`` and ``resize_shrink`` work.
    can_resize: ClassVar[bool] = True
    #: Guest bytes have one place for ever: what changes them shows through older mappings.
    places_are_fixed: ClassVar[bool] = False

    def read_by_others(self, image: Path) -> bytes | None:
        """The disk's bytes as another program reads them from the closed image, if one can."""
        return None

    # -- writing

    @both_faces
    async def test_what_is_written_is_read(self) -> None:
        """Any offset and length, one buffer or many, one part at a time or several."""
        async with self._writing() as (disk, model):
            dice = random.Random(1)
            for number in range(60):
                offset = dice.randrange(len(model))
                data = dice.randbytes(dice.randrange(1, min(len(model) - offset, 60_000) + 1))
                if number == 40:
                    disk.set_async_write_parallelization(4)
                await disk.write(data, offset)
                model[offset : offset + len(data)] = data
                assert await disk.read_bytes(offset, len(data)) == data
            pieces = [dice.randbytes(1 + number % 61) for number in range(2000)]
            await disk.writev(pieces, 77)
            model[77 : 77 + total(pieces)] = b"".join(pieces)

    def test_what_is_written_on_the_blocking_face_is_read(self) -> None:
        """The same through ``SyncFormatAccess``, whose rewrites take a way of their own."""
        model = bytearray(self._content())
        dice = random.Random(2)
        with self._image() as image:
            with self._blocking(image, writable=True) as disk:
                for _ in range(60):
                    offset = dice.randrange(len(model))
                    data = dice.randbytes(dice.randrange(1, min(len(model) - offset, 9000) + 1))
                    for _ in range(2):
                        disk.write(data, offset)
                    model[offset : offset + len(data)] = data
                assert disk.read_bytes(0, len(model)) == model
            run_blocking(self._compare(image, model))

    @both_faces
    async def test_it_writes_to_any_kind_of_storage(self) -> None:
        """On coroutines that live in a loop, and on blocks that must be written whole."""
        if not self.stands_alone:
            return
        with self._image() as image:
            async for storage in other_storages(image, writable=True):
                model, dice = bytearray(self._content()), random.Random(9)
                async with await self._open(storage, writable=True) as disk:
                    for _ in range(20):
                        offset = dice.randrange(len(model) - 9000)
                        data = dice.randbytes(dice.randrange(1, 9000))
                        await disk.write(data, offset)
                        model[offset : offset + len(data)] = data
                        await disk.write_zeroes(offset // 2, 3000)
                        model[offset // 2 : offset // 2 + 3000] = bytes(3000)
                    assert await disk.read_bytes(0, len(model)) == model
                async with await self._open(storage) as disk:
                    assert await disk.read_bytes(0, len(model)) == model

    @both_faces
    async def test_zeroing_is_exact(self) -> None:
        """``write_zeroes`` and ``discard_to_zero`` zero the range, unaligned ends and all."""
        for discard in (False, True):
            async with self._writing() as (disk, model):
                dice = random.Random(3)
                for _ in range(30):
                    offset = dice.randrange(len(model))
                    length = dice.randrange(min(len(model) - offset, 150_000) + 1)
                    zero = disk.discard_to_zero if discard else disk.write_zeroes
                    await zero(offset, length)
                    model[offset : offset + length] = bytes(length)
                    assert await disk.read_bytes(0, len(model)) == model, (offset, length)
                    data = dice.randbytes(min(3000, len(model) - offset))
                    await disk.write(data, offset)
                    model[offset : offset + len(data)] = data
                await disk.write_zeroes(0, len(model))
                model[:] = bytes(len(model))

    @both_faces
    async def test_a_discarded_byte_is_as_it_was_or_zero(self) -> None:
        """Nothing outside the range changes, and the range can be written again."""
        async with self._writing() as (disk, model):
            dice = random.Random(4)
            for _ in range(20):
                offset = dice.randrange(len(model))
                length = dice.randrange(min(len(model) - offset, 150_000) + 1)
                try:
                    await disk.discard_to_any(offset, length)
                except UnsupportedOperationError:
                    return
                found = await disk.read_bytes(0, len(model))
                assert found[:offset] == model[:offset]
                assert found[offset + length :] == model[offset + length :]
                for old, new in zip(
                    model[offset : offset + length], found[offset : offset + length], strict=True
                ):
                    assert new in (0, old)
                model[:] = found
                data = dice.randbytes(min(3000, len(model) - offset))
                await disk.write(data, offset)
                model[offset : offset + len(data)] = data

    @both_faces
    async def test_discarding_to_the_backing_image_touches_nothing_outside(self) -> None:
        """Where the format can do that at all."""
        async with self._writing() as (disk, model):
            offset, length = 70_001, 200_000
            try:
                await disk.discard_to_backing(offset, length)
            except UnsupportedOperationError:
                return
            found = await disk.read_bytes(0, len(model))
            assert found[:offset] == model[:offset]
            assert found[offset + length :] == model[offset + length :]
            model[:] = found

    @both_faces
    async def test_a_write_across_the_end_fails_whole(self) -> None:
        """So do zeroing and discarding there; not a byte changes, nor the size."""
        async with self._writing() as (disk, model):
            size = len(model)
            for offset, length in ((size - 1, 2), (size, 1), (size + 5, 1), (0, size + 1)):
                data = b"\xee" * length
                await raises(OutOfRangeError, partial(disk.write, data, offset))
                for change in (disk.write_zeroes, disk.discard_to_zero, disk.discard_to_any):
                    await raises(OutOfRangeError, partial(change, offset, length))
            await raises(OutOfRangeError, lambda: disk.write(b"x", -1))
            await disk.write(b"", size)
            assert disk.size == size

    @both_faces
    async def test_a_data_mapping_can_be_written_through(self) -> None:
        """What ``ensure_data_mapping`` answers is the disk's own bytes."""
        async with self._writing() as (disk, model):
            for offset in (0, 70_001, len(model) - 10):
                with disk.lease():
                    try:
                        mapping = await disk.ensure_data_mapping(offset, 10)
                    except UnsupportedOperationError:
                        return
                    assert mapping.writable
                    assert 0 < mapping.length <= 10
                    data = b"\xd1" * mapping.length
                    writev: Any = mapping.storage.writev
                    done = writev((data,), mapping.offset)
                    if isinstance(done, Awaitable):
                        await done
                model[offset : offset + len(data)] = data
                assert await disk.read_bytes(offset, len(data)) == data

    @both_faces
    async def test_a_mapping_is_good_while_its_lease_lasts(self) -> None:
        """Whatever is discarded and written meanwhile, its host bytes are not used for others."""
        async with self._writing() as (disk, model):
            if self.places_are_fixed or disk.inner.leases() is None:
                return
            await disk.write(b"\xa1" * 70_000, 0)
            model[:70_000] = b"\xa1" * 70_000
            with disk.lease():
                found: Data[StorageHandle] | None = None
                async for mapping in disk.inner.iter_mappings(0, len(model)):
                    if isinstance(mapping, Data):
                        found = mapping
                        break
                assert found is not None
                before = await found.storage.read_bytes(found.offset, found.length)
                with suppress(UnsupportedOperationError):
                    await disk.discard_to_any(0, len(model))
                    await disk.flush()
                    await disk.write(b"\x5a" * len(model), 0)
                    host = await found.storage.read_bytes(found.offset, found.length)
                    assert host == before
            model[:] = await disk.read_bytes(0, len(model))

    # -- size

    @both_faces
    async def test_growth_is_zeroes_and_what_was_cut_never_returns(self) -> None:
        """Both ways, through ``resize`` and through its two halves."""
        if not self.can_resize:
            return
        unit = self.size_unit
        async with self._writing() as (disk, model):
            dice = random.Random(5)
            for number in range(12):
                size = dice.randrange(1, 900_000 // unit) * unit
                if number % 3:
                    await disk.resize(size)
                elif size >= disk.size:
                    await disk.resize_grow(size)
                else:
                    await disk.resize_shrink(size)
                del model[size:]
                model.extend(bytes(size - len(model)))
                assert disk.size == size
                assert await disk.read_bytes(0, size + 10) == model + bytes(10)
                data = dice.randbytes(min(size, 5000))
                await disk.write(data, size - len(data))
                model[size - len(data) :] = data
            await disk.resize_grow(len(model) // 2 // unit * unit)
            await disk.resize_shrink(len(model) * 2)
            assert disk.size == len(model)

    # -- many at once, and what goes wrong

    def test_threads_write_side_by_side(self) -> None:
        """Neighbouring bytes, each thread its own; none of them is lost."""
        share, count = 3001, 8
        failures: list[BaseException] = []

        def work(disk: Any, number: int) -> None:
            try:
                for round_ in range(12):
                    for at in range(number * share, share * count * 12, share * count):
                        disk.write(bytes([1 + number + round_]) * share, at)
            except BaseException as error:  # noqa: BLE001 - handed to the test's thread
                failures.append(error)

        with self._image() as image:
            model = bytearray(self._content())
            with self._blocking(image, writable=True) as disk:
                threads = [threading.Thread(target=work, args=(disk, n)) for n in range(count)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            assert not failures, failures
            for at in range(0, share * count * 12, share):
                model[at : at + share] = bytes([12 + at // share % count]) * share
            run_blocking(self._compare(image, model))

    def test_tasks_write_side_by_side(self) -> None:
        """The same on the asynchronous face, all at once."""

        async def check() -> None:
            async with self._writing() as (disk, model):
                dice = random.Random(6)
                data = dice.randbytes(len(model))
                steps = [(at, min(997, len(model) - at)) for at in range(0, len(model), 997)]
                dice.shuffle(steps)
                await asyncio.gather(*(disk.write(data[o : o + n], o) for o, n in steps))
                model[:] = data

        asyncio.run(check())

    def test_a_cancelled_write_ends_before_its_task(self) -> None:
        """Its range has old or new bytes, nothing else changes, and the disk goes on working."""

        async def check() -> None:
            async with self._writing() as (disk, model):
                dice = random.Random(7)
                for _ in range(30):
                    offset = dice.randrange(len(model) - 50_000)
                    data = dice.randbytes(50_000)
                    task = asyncio.ensure_future(disk.write(data, offset))
                    for _ in range(dice.randrange(12)):
                        await asyncio.sleep(0)
                    task.cancel()
                    await asyncio.wait([task])
                    found = await disk.read_bytes(0, len(model))
                    _old_or_new(model, found, data, offset)
                    model[:] = found

        asyncio.run(check())

    def test_a_failing_storage_shows_nobody_elses_bytes(self) -> None:
        """Whichever request fails: an error of underlay's, old or new bytes, and it goes on."""
        if not self.stands_alone:
            return
        for face in ("blocking", "async"):
            failed = True
            fail_at = 0
            while failed and fail_at < 40:
                check = self._write_with_failure(fail_at)
                failed = run_blocking(check) if face == "blocking" else asyncio.run(check)
                fail_at += 1

    async def _write_with_failure(self, fail_at: int) -> bool:
        """Some writes, of which the ``fail_at``-th request to the storage fails."""
        model = bytearray(self._content())
        with self._image() as image:
            options = StorageOpenOptions(name=os.fspath(image), writable=True)
            handle = await open_with(registry().backend("file"), options)
            storage: Any = handle.storage
            failing = _FailingStorage(storage)
            try:
                async with await self._open(failing, writable=True) as disk:
                    failing.countdown = fail_at
                    try:
                        await self._some_writes(disk, model)
                    finally:
                        failing.countdown = None
                    await disk.write(b"fine again", 100_000)
                    model[100_000:100_010] = b"fine again"
                    assert await disk.read_bytes(0, len(model)) == model
            finally:
                await handle.close()
            await self._compare(image, model)
        return failing.failed

    async def _some_writes(self, disk: FormatAccess, model: bytearray) -> None:
        dice = random.Random(8)
        for _ in range(6):
            offset = dice.randrange(len(model) - 40_000)
            data = dice.randbytes(dice.randrange(1, 40_000))
            try:
                await disk.write(data, offset)
            except UnderlayError:
                found = await disk.read_bytes(0, len(model))
                _old_or_new(model, found, data, offset)
                await disk.write(data, offset)
            model[offset : offset + len(data)] = data

    # -- helpers

    @asynccontextmanager
    async def _writing(self) -> AsyncGenerator[tuple[FormatAccess, bytearray], None]:
        """A writable disk and its model, which are equal at the end, also to whoever comes next."""
        model = bytearray(self._content(_SIZE))
        with self._image(_SIZE) as image:
            async with await self._open(image, writable=True) as disk:
                assert disk.writable
                yield disk, model
                assert await disk.read_bytes(0, disk.size) == model
            await self._compare(image, model)

    async def _compare(self, image: Path, model: bytearray) -> None:
        async with await self._open(image) as disk:
            assert await disk.read_bytes(0, disk.size) == model
        seen = self.read_by_others(image)
        assert seen is None or seen == model


class _FailingStorage(WrappedStorage):
    """Fails one write or sync: the one at which ``countdown`` has come to zero."""

    countdown: int | None = None
    failed = False

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """Counted, and half done where it fails."""
        if self._is_over():
            half = memoryview(b"".join(buffers))[: total(buffers) // 2]
            if half:
                super().writev((half,), offset)
            raise StorageError("no space left on this pretended device", errno=28)
        super().writev(buffers, offset)

    def sync(self) -> None:
        """Counted."""
        if self._is_over():
            raise StorageError("this pretended device does not answer", errno=5)
        super().sync()

    def _is_over(self) -> bool:
        if self.countdown is None:
            return False
        self.countdown -= 1
        over = self.countdown < 0 and not self.failed
        self.failed = self.failed or over
        return over


def _old_or_new(model: bytearray, found: bytes, data: bytes, offset: int) -> None:
    """Insist that only the written range differs, and there byte for byte is old or new."""
    end = offset + len(data)
    assert found[:offset] == model[:offset]
    assert found[end:] == model[end:]
    if found[offset:end] in (data, model[offset:end]):
        return
    for old, new, now in zip(model[offset:end], data, found[offset:end], strict=True):
        assert now in (old, new)
