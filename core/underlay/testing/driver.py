"""The format contract as tests: subclass ``DriverContract``, and say how to make an image.

::

    class TestTiles(DriverContract):
        format_name = "tiles"

        def make(self, content: bytes, folder: Path) -> Path:
            image = folder / "image.tiles"
            image.write_bytes(pack(content))
            return image

The driver is found as its users find it, so its plug-in has to be installed. Everything runs on
both faces; nothing is mocked. ``WritableDriverContract`` (``underlay.testing.writing``) goes on
from here.
"""

from __future__ import annotations

import array
import asyncio
import io
import os
import pickle
import random
import tempfile
import threading
from abc import abstractmethod
from collections.abc import (
    AsyncGenerator,
    Generator,
    Mapping,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from underlay.access import FormatAccess
from underlay.capabilities import Describable, ImageDescription
from underlay.driver import FormatDriverInstance
from underlay.errors import (
    CorruptImageError,
    InvalidImageError,
    OutOfRangeError,
    ReadOnlyError,
    UnderlayError,
)
from underlay.face import run_blocking
from underlay.gate import DirectoryGate, ImplicitOpenGate
from underlay.limits import Limits
from underlay.mapping import Data, Eof, Special
from underlay.opening import open_image, probe
from underlay.plugins import registry
from underlay.probing import Match, NoMatch
from underlay.storage import AnyStorage, StorageOpenOptions
from underlay.sync import SyncFormatAccess
from underlay.targets import open_with
from underlay.testing.faces import Parametrized, both_faces
from underlay.testing.helping import (
    content_of,
    files,
    nothing_left_open,
    other_storages,
    place,
    raises,
    ranges,
    view,
)

__all__ = ["DriverContract"]

#: Several units of any format, and no multiple of anything.
_SIZE = 400_003


class DriverContract(Parametrized):
    """What every format driver must do. The hooks come first."""

    #: The name under which the format is registered.
    format_name: ClassVar[str]
    #: Options for every open of these images.
    open_options: ClassVar[Mapping[str, Any]] = {}
    #: The sizes of its disks are multiples of this many bytes.
    size_unit: ClassVar[int] = 1
    #: Whether its images can be told from other bytes (raw's cannot).
    has_signature: ClassVar[bool] = True
    #: Whether its images name no others, so that one can be moved to another storage.
    stands_alone: ClassVar[bool] = True

    @abstractmethod
    def make(self, content: bytes, folder: Path) -> Path:
        """An image in ``folder`` whose disk holds ``content``; whatever it names is there too."""

    def gate(self) -> ImplicitOpenGate:
        """The gate for what the image names: by default its own folder."""
        return DirectoryGate()

    # -- recognising

    def test_its_images_are_recognised(self) -> None:
        """By a verdict with a reason, which is what ``probe()`` finds out too."""
        with self._image() as image:
            verdict = self._driver().probe(view(image.read_bytes()))
            result = run_blocking(probe(image))
            if self.has_signature:
                assert isinstance(verdict, Match), verdict
                assert verdict.reason
                assert result.format == self.format_name
                assert not result.guessed
            else:
                assert isinstance(verdict, NoMatch), verdict
                assert self.format_name not in result.matches

    def test_other_bytes_are_not_recognised(self) -> None:
        """Nor does a probe fail on whatever it sees: nothing, zeroes, noise, half a header."""
        dice = random.Random(1)
        for size in (0, 1, 3, 4, 8, 511, 512, 100_000):
            for content in (bytes(size), b"\xff" * size, dice.randbytes(size)):
                verdict = self._driver().probe(view(content))
                assert isinstance(verdict, NoMatch), (size, verdict)
        with self._image() as image:
            whole = image.read_bytes()
            for size in [*range(130), 511, 512, 513, 4096]:
                verdict = self._driver().probe(view(whole[:size]))
                assert isinstance(verdict, Match | NoMatch), (size, verdict)

    @both_faces
    async def test_garbage_is_refused_and_left_alone(self) -> None:
        """With ``InvalidImageError``; every byte stays, and nothing stays open."""
        if not self.has_signature:
            return
        dice = random.Random(2)
        with tempfile.TemporaryDirectory() as name:
            path = Path(name, "garbage")
            for content in (b"", b"\0", bytes(70_000), dice.randbytes(512), dice.randbytes(70_000)):
                path.write_bytes(content)
                with nothing_left_open():
                    await raises(InvalidImageError, lambda: self._open(path))
                assert path.read_bytes() == content

    def test_damage_is_an_error_of_underlays_or_none(self) -> None:
        """A cut image, or one with wrong bytes in its header, never ends in a foreign exception."""
        dice = random.Random(3)
        with self._image() as image:
            whole = image.read_bytes()
            for number in range(200):
                damaged = bytearray(whole)
                if number % 4 == 0:
                    del damaged[dice.randrange(len(whole)) :]
                else:
                    for _ in range(dice.randrange(1, 4)):
                        damaged[dice.randrange(min(len(whole), 512))] = dice.choice((0, 1, 255))
                image.write_bytes(damaged)
                with nothing_left_open():
                    run_blocking(self._read_what_can_be_read(image))

    async def _read_what_can_be_read(self, image: Path) -> None:
        try:
            disk = await self._open(image, limits=Limits(virtual_size=1 << 40, metadata=16 << 20))
        except UnderlayError:
            return
        async with disk:
            for offset in (0, disk.size // 2, max(0, disk.size - 5000)):
                try:
                    await disk.read_bytes(offset, 5000)
                except UnderlayError:
                    continue

    # -- reading

    def test_any_range_reads_as_the_model(self) -> None:
        """On the blocking face, into whatever buffers there are."""
        content = self._content()
        with self._image() as image, self._blocking(image) as disk:
            assert disk.size == len(content)
            assert disk.format_name == self.format_name
            for offset, length in ranges(len(content)):
                buffer = bytearray(b"?" * length)
                disk.read(buffer, offset)
                assert buffer == content[offset : offset + length], (offset, length)
                assert disk.read_bytes(offset, length) == buffer, (offset, length)
            numbers = array.array("H", bytes(2000))
            disk.read(numbers, 333)
            assert numbers.tobytes() == content[333:2333]
            pieces = [bytearray(1 + number % 89) for number in range(2000)]
            disk.readv(pieces, 21)
            assert b"".join(pieces) == content[21 : 21 + sum(map(len, pieces))]

    def test_any_range_reads_as_the_model_when_awaited(self) -> None:
        """On the asynchronous face, many reads at once, each in several parts too."""
        content = self._content()

        async def check(image: Path) -> None:
            async with await self._open(image) as disk:

                async def read(offset: int, length: int) -> None:
                    buffer = bytearray(b"?" * length)
                    await disk.read(buffer, offset)
                    assert buffer == content[offset : offset + length], (offset, length)

                await asyncio.gather(*(read(*at) for at in ranges(len(content))))
                disk.set_async_read_parallelization(8)
                assert await disk.read_bytes(0, len(content)) == content

        with self._image() as image:
            asyncio.run(check(image))

    def test_the_blocking_face_works_inside_a_running_loop(self) -> None:
        """From the first byte on, when nothing is cached yet."""
        content = self._content()

        async def check(image: Path) -> None:
            await asyncio.sleep(0)
            with self._blocking(image) as disk:
                assert disk.read_bytes(0, len(content)) == content

        with self._image() as image:
            asyncio.run(check(image))

    def test_threads_read_side_by_side(self) -> None:
        """One disk, eight threads, and a cold cache."""
        content = self._content()
        failures: list[BaseException] = []

        def work(disk: SyncFormatAccess, seed: int) -> None:
            try:
                for offset, length in ranges(len(content), seed=seed):
                    assert disk.read_bytes(offset, length) == content[offset : offset + length]
            except BaseException as error:  # noqa: BLE001 - handed to the test's thread
                failures.append(error)

        with self._image() as image, self._blocking(image) as disk:
            threads = [threading.Thread(target=work, args=(disk, seed)) for seed in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not failures, failures

    @both_faces
    async def test_past_the_end_are_zeroes(self) -> None:
        """A read is never short, and old bytes of the buffer do not stay."""
        content = self._content()
        async with self._disk() as disk:
            for offset in (len(content) - 10, len(content), len(content) + 1, 1 << 50):
                buffer = bytearray(b"?" * 5000)
                await disk.read(buffer, offset)
                assert buffer == content[offset:].ljust(5000, b"\0"), offset
            await raises(OutOfRangeError, lambda: disk.read_bytes(-1, 1))

    @both_faces
    async def test_what_was_dropped_is_read_anew(self) -> None:
        """``invalidate_cache`` changes nothing that can be read."""
        content = self._content()
        async with self._disk() as disk:
            for _ in range(2):
                assert await disk.read_bytes(0, len(content)) == content
                await disk.invalidate_cache()

    @both_faces
    async def test_it_lies_on_any_kind_of_storage(self) -> None:
        """On coroutines that live in a loop, and on blocks that must be read whole."""
        if not self.stands_alone:
            return
        content = self._content()
        with self._image() as image:
            async for storage in other_storages(image):
                async with await self._open(storage) as disk:
                    assert await disk.read_bytes(0, len(content) + 5) == content + bytes(5)
                    for offset, length in ranges(len(content))[:20]:
                        found = await disk.read_bytes(offset, length)
                        assert found == content[offset : offset + length]

    # -- mapping

    @both_faces
    async def test_mappings_lead_to_the_bytes(self) -> None:
        """``iter_mappings`` covers the disk without gaps; each run is where its bytes are."""
        content = self._content()
        async with self._disk() as disk:
            at = 0
            async for mapping in disk.inner.iter_mappings(0, len(content) + 100):
                assert mapping.length > 0
                assert at + mapping.length <= len(content)
                found = await content_of(mapping)
                assert found == content[at : at + mapping.length], (at, mapping)
                at += mapping.length
            assert at == len(content)

    @both_faces
    async def test_all_ways_to_ask_agree(self) -> None:
        """``get_mapping``, ``iter_mappings`` and ``locate`` say the same of every byte."""
        async with self._disk() as disk:
            driver, size = disk.inner, disk.size
            for offset, length in ranges(size):
                mapping = await driver.get_mapping(offset, length)
                assert 0 < mapping.length <= size - offset
                runs = [run async for run in driver.iter_mappings(offset, length)]
                assert sum(run.length for run in runs) == length
                assert place(runs[0]) == place(mapping)
                located = driver.locate(offset)
                if located is not None:
                    storage, host, run, writable = located
                    assert isinstance(mapping, Data)
                    assert (storage, host, writable) == (
                        mapping.storage,
                        mapping.offset,
                        mapping.writable,
                    )
                    assert 0 < run <= size - offset
            for offset in (size, size + 1, 1 << 62):
                assert isinstance(await driver.get_mapping(offset, 10), Eof)
                assert [run async for run in driver.iter_mappings(offset, 10)] == []
                assert driver.locate(offset) is None
            assert driver.locate(-1) is None

    @both_faces
    async def test_extents_cover_the_disk(self) -> None:
        """In order and without gaps, whole or in part; what is called zero reads as zeroes."""
        content = self._content()
        async with self._disk() as disk:
            depths = range(len(disk.chain()))
            for start, length in [(0, len(content)), (12_345, 100_001), (len(content) - 1, 9)]:
                at, end = start, min(start + length, len(content))
                async for extent in disk.extents(start, length):
                    assert extent.start == at
                    assert extent.length > 0
                    assert extent.depth in depths
                    at += extent.length
                    if extent.is_zero:
                        assert not any(content[extent.start : at]), extent
                    whole = await disk.get_mapping(extent.start, extent.length)
                    assert 0 < whole.length <= extent.length
                assert at == end

    @both_faces
    async def test_decoding_is_pure(self) -> None:
        """Twice the same, its input as it was; damaged input is ``CorruptImageError`` or bytes."""
        async with self._disk() as disk:
            async for mapping in disk.inner.iter_mappings(0, disk.size):
                if not isinstance(mapping, Special):
                    continue
                raw = bytes(await mapping.storage.read_bytes(mapping.offset, mapping.host_length))
                first, second = bytearray(mapping.unit), bytearray(b"?" * (mapping.unit + 8))
                mapping.layer.decode(len(raw), memoryview(raw), memoryview(first))
                mapping.layer.decode(len(raw), memoryview(raw), memoryview(second)[: mapping.unit])
                assert second == first + b"?" * 8
                decoder = mapping.layer.decoder()
                if decoder is not None:
                    twin = pickle.loads(pickle.dumps(decoder))  # noqa: S301 - our own bytes
                    there = bytearray(mapping.unit)
                    twin.decode(len(raw), memoryview(raw), memoryview(there))
                    assert there == first
                for damaged in (bytes(len(raw)), raw[: len(raw) // 2].ljust(len(raw), b"\xaa")):
                    out = memoryview(second)[: mapping.unit]
                    with suppress(CorruptImageError):
                        mapping.layer.decode(len(raw), memoryview(damaged), out)
                    assert second[-8:] == b"?" * 8

    # -- views

    @both_faces
    async def test_a_slice_is_a_part(self) -> None:
        """With an end of its own, past which are zeroes."""
        content = self._content()
        async with self._disk() as disk:
            for offset, length in [*ranges(len(content))[:20], (0, 0), (len(content), 0)]:
                part = disk.slice(offset, length)
                expected = content[offset : offset + length]
                assert part.size == length
                assert await part.read_bytes(0, length + 9) == expected + bytes(9)
                assert sum([run.length async for run in part.extents()]) == length
            for offset, length in [(0, len(content) + 1), (len(content), 1), (-1, 5), (5, -1)]:
                await raises(OutOfRangeError, partial(disk.slice, offset, length))

    def test_it_can_be_read_as_a_file(self) -> None:
        """By parsers that know files only."""
        content = self._content()
        with self._image() as image, self._blocking(image) as disk, disk.as_file() as file:
            # Closing a buffered reader closes what it reads from, so that gets a file of its own.
            with io.BufferedReader(cast("io.RawIOBase", disk.as_file()), 777) as reader:
                assert reader.read() == content
            assert file.seek(-7, os.SEEK_END) == len(content) - 7
            assert file.read(100) == content[-7:]
            assert file.read(1) == b""

    # -- read-only, and the end

    @both_faces
    async def test_read_only_means_it(self) -> None:
        """Every change is refused, and after all kinds of use every byte is as it was."""
        with self._image() as image:
            before = files(image.parent)
            async with await self._open(image) as disk:
                assert not disk.writable
                assert not disk.inner.writable()
                await raises(ReadOnlyError, lambda: disk.write(b"no", 0))
                await raises(ReadOnlyError, lambda: disk.write_zeroes(0, 1))
                await raises(ReadOnlyError, lambda: disk.discard_to_zero(0, 1))
                await raises(ReadOnlyError, lambda: disk.discard_to_any(0, 1))
                await raises(ReadOnlyError, lambda: disk.resize(disk.size + (1 << 20)))
                await raises(ReadOnlyError, lambda: disk.ensure_data_mapping(0, 1))
                await disk.read_bytes(0, disk.size)
                await disk.info()
                await disk.flush()
                await disk.sync()
            assert files(image.parent) == before

    @both_faces
    async def test_it_tells_of_itself(self) -> None:
        """``info()`` has the facts; a driver that describes itself returns a description."""
        async with self._disk() as disk:
            info = await disk.info()
            assert info.format == self.format_name
            assert info.virtual_size == disk.size
            describable: Any = disk.capability(Describable)
            if describable is not None:
                assert isinstance(await describable.describe(), ImageDescription)

    @both_faces
    async def test_closing_closes_what_was_opened(self) -> None:
        """And nothing that the caller gave."""
        with self._image() as image:
            with nothing_left_open():
                disk = await self._open(image)
                await disk.read_bytes(0, 1000)
                await disk.close()
            handle = await open_with(
                registry().backend("file"), StorageOpenOptions(name=os.fspath(image), lock=False)
            )
            try:
                async with await self._open(handle.storage) as given:
                    first = await given.read_bytes(0, 1000)
                assert first == self._content()[:1000]
                assert len(await handle.read_bytes(0, 100)) == 100
            finally:
                await handle.close()

    # -- helpers

    def _driver(self) -> type[FormatDriverInstance]:
        return registry().driver(self.format_name)

    def _content(self, size: int = _SIZE) -> bytes:
        """Noise, text and long zeroes in turn."""
        dice = random.Random(size)
        content = bytearray()
        while len(content) < size:
            length = dice.randrange(1, 50_000)
            kind = dice.randrange(3)
            content += bytes(length) if not kind else dice.randbytes(length if kind == 1 else 5)
            if kind > 1:
                content += b"all work and no play " * (length // 21)
        del content[size:]
        return bytes(content) + bytes(-size % self.size_unit)

    @contextmanager
    def _image(self, size: int = _SIZE) -> Generator[Path]:
        """An image in a folder of its own."""
        with tempfile.TemporaryDirectory() as folder:
            yield self.make(self._content(size), Path(os.path.realpath(folder)))

    async def _open(
        self,
        target: Path | AnyStorage,
        *,
        writable: bool = False,
        limits: Limits | None = None,
    ) -> FormatAccess:
        return await open_image(
            target,
            format=self.format_name,
            writable=writable,
            gate=self.gate(),
            limits=limits,
            **self.open_options,
        )

    def _blocking(self, image: Path, *, writable: bool = False) -> SyncFormatAccess:
        return run_blocking(self._open(image, writable=writable)).blocking()

    @asynccontextmanager
    async def _disk(self) -> AsyncGenerator[FormatAccess]:
        """The disk of a fresh image, read-only."""
        with self._image() as image:
            async with await self._open(image) as disk:
                yield disk
