"""Raw that was only guessed: whatever a guest writes, and by whichever way, it stays raw."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay
from underlay import jobs
from underlay.errors import ReadOnlyError, UnderlayError
from underlay.probing import Match, NoMatch, ProbeVerdict, ProbeView
from underlay.storage import WriteBuffers
from underlay.testing import WrappedStorage
from underlay_storage.memory import MemoryStorage

from .formats import Formats, ends, starts


@pytest.fixture
def guessed(formats: Formats) -> MemoryStorage:
    """Something that no format claims, while one looks at its beginning and another at its end."""
    formats.add("head", starts(b"HEAD"))
    formats.add("tail", ends(b"TAIL"))
    return MemoryStorage(bytes(500_000))


def test_a_guessed_raw_disk_is_not_turned_into_another_format(guessed: MemoryStorage) -> None:
    with underlay.open_any(guessed, writable=True) as disk:
        size = disk.size
        changes: list[Callable[[], None]] = [
            lambda: disk.write(b"HEAD", 0),
            lambda: disk.write(b"HEAD" + bytes(100_000), 0),
            lambda: disk.writev([b"HE", b"AD"], 0),
            lambda: disk.write(b"TAIL", size - 4),
            lambda: disk.write(bytes(100_000) + b"TAIL", size - 100_004),
            lambda: disk.slice(0, 100).write(b"HEAD", 0),
            lambda: disk.slice(size - 10, 10).write(b"TAIL", 6),
            lambda: disk.slice(5, size - 5).slice(0, size - 5).write(b"TAIL", size - 9),
        ]
        for change in changes:
            with pytest.raises(underlay.ReadOnlyError, match=r"guessed to be raw.*format='raw'"):
                change()
        disk.write(b"HEA", 0)
        with pytest.raises(underlay.ReadOnlyError):
            disk.write(b"D", 3)
        disk.write(b"TAI", size - 4)
        with pytest.raises(underlay.ReadOnlyError):
            disk.write(b"L", size - 1)
        disk.write(b"HEAD", 1)
        disk.write(b"TAIL" * 1000, 100_000)
        assert disk.read_bytes(0, 5) == b"HHEAD"
    assert underlay.probe(guessed).guessed


def test_nor_by_zeroing_discarding_or_resizing(formats: Formats) -> None:
    formats.add("zero", lambda v: Match("") if v.head[:8] == b"A" + bytes(7) else NoMatch())
    formats.add("tail", ends(b"TAIL"))
    formats.add("size", lambda v: Match("") if v.size == 777_777 else NoMatch())
    content = bytearray(b"A" * 500_000)
    content[300_000:300_004] = b"TAIL"
    storage = MemoryStorage(bytes(content))
    with underlay.open_any(storage, writable=True) as disk:
        for change in (
            lambda: disk.write_zeroes(1, 7),
            lambda: disk.discard_to_zero(1, 200_000),
            lambda: disk.discard_to_any(1, 499_999),
            lambda: disk.discard_to_backing(1, 7),
            lambda: disk.resize(300_004),
            lambda: disk.resize_shrink(300_004),
            lambda: disk.resize(777_777),
            lambda: disk.resize_grow(777_777),
            lambda: disk.ensure_data_mapping(250_000, 10),
        ):
            with pytest.raises(underlay.ReadOnlyError):
                change()
        assert disk.read_bytes(0, disk.size) == content
        disk.resize(300_005)
        disk.resize(300_003)
        disk.resize(777_776)
        disk.write_zeroes(2, 7)
    assert storage.size() == 777_776


def test_what_was_called_raw_is_not_guarded(guessed: MemoryStorage) -> None:
    with underlay.open_image(guessed, format="raw", writable=True) as disk:
        disk.write(b"HEAD", 0)
        disk.write(b"TAIL", disk.size - 4)
        assert disk.ensure_data_mapping(0, 10).length == 10
    assert set(underlay.probe(guessed).matches) == {"head", "tail"}


def test_a_guessed_part_is_guarded_as_part_of_the_whole(guessed: MemoryStorage) -> None:
    with underlay.open_any(guessed, writable=True, offset=2, size=1000) as disk:
        disk.write(b"HEAD", 0)
        disk.write(bytes(4), 0)
    with underlay.open_any(guessed, writable=True, offset=500_000 - 10) as disk:
        with pytest.raises(underlay.ReadOnlyError):
            disk.write(b"TAIL", 6)
        with pytest.raises(underlay.ReadOnlyError):
            disk.slice(4, 6).write(b"TAIL", 2)


def test_two_harmless_writes_do_not_become_a_harmful_one(guessed: MemoryStorage) -> None:
    async def check() -> None:
        async with await underlay.aio.open_any(guessed, writable=True) as disk:
            for _ in range(20):
                await disk.write(bytes(4), 0)
                done = await asyncio.gather(
                    disk.write(b"HE", 0), disk.write(b"AD", 2), return_exceptions=True
                )
                assert any(isinstance(error, UnderlayError) for error in done)
                assert await disk.read_bytes(0, 4) != b"HEAD"

    asyncio.run(check())


def test_the_real_qcow2_magic_is_refused(tmp_path: Path) -> None:
    """What a guest would do: write a header that names a file of the host."""
    image = tmp_path / "guest.raw"
    image.write_bytes(bytes(1 << 20))
    header = bytearray(512)
    header[:8] = b"QFI\xfb\0\0\0\3"
    with underlay.open_any(image, writable=True) as disk:
        with pytest.raises(underlay.ReadOnlyError, match="qcow2"):
            disk.write(header, 0)
        with disk.as_file() as file, pytest.raises(underlay.ReadOnlyError):
            file.write(header)
    assert image.read_bytes() == bytes(1 << 20)


# -- ways around the disk itself


def test_a_guess_that_another_disk_lies_upon_is_guarded(guessed: MemoryStorage) -> None:
    """As when an overlay is committed into it."""
    overlay = MemoryStorage()
    with (
        underlay.open_any(guessed, writable=True) as base,
        underlay.create(overlay, size=base.size) as made,
    ):
        made.close()
        with underlay.open_image(overlay, format="qcow2", backing=base, writable=True) as disk:
            assert disk.backing is not None
            with pytest.raises(ReadOnlyError, match="guessed"):
                disk.backing.write(b"HEAD", 0)
            disk.write(b"HEAD", 0)
            with pytest.raises(ReadOnlyError, match="guessed"):
                jobs.commit(disk)
            assert disk.read_bytes(0, 4) == b"HEAD", "the overlay keeps what it has"
    assert underlay.probe(guessed).guessed


def test_nobody_gets_a_way_past_the_guard(guessed: MemoryStorage) -> None:
    with underlay.open_any(guessed, writable=True) as disk:
        assert [extent.mapping.writable for extent in disk.extents()] == [False]  # type: ignore[union-attr]
        assert not disk.get_mapping(0).writable  # type: ignore[union-attr]
        assert not disk.get_shallow_mapping(9).writable  # type: ignore[union-attr]
        with pytest.raises(ReadOnlyError, match="past it"):
            disk.slice(1000, 10).ensure_data_mapping(0, 10)
        with (
            underlay.FormatAccess(disk.inner).blocking() as again,
            pytest.raises(ReadOnlyError, match="guessed"),
        ):
            again.write(b"HEAD", 0)
    with underlay.open_image(guessed, format="raw", writable=True) as disk:
        assert disk.get_mapping(0).writable  # type: ignore[union-attr]


@pytest.mark.parametrize("offload", [False, True])
def test_nor_does_a_job(tmp_path: Path, offload: bool) -> None:
    header = tmp_path / "header"
    header.write_bytes(b"QFI\xfb\0\0\0\3".ljust(1 << 20, b"x"))
    image = tmp_path / "disk"
    image.write_bytes(bytes(2 << 20))
    with (
        underlay.open_image(header, format="raw") as source,
        underlay.open_any(image, writable=True) as target,
    ):
        with pytest.raises(ReadOnlyError, match="qcow2"):
            jobs.convert(source, target, offload=offload)
        jobs.bench(target, write=True, pattern=0x51, count=20, buffer_size=4)
    assert underlay.probe(image).guessed


def test_memory_that_changes_while_it_is_looked_at_changes_nothing(formats: Formats) -> None:
    """The guest may go on writing to the buffers that it handed over."""
    data = bytearray(300_000)

    def look(view: ProbeView) -> ProbeVerdict:
        data[:4], data[-4:] = b"HEAD", b"TAIL"
        return NoMatch()

    storage = MemoryStorage(bytes(len(data)))
    with underlay.open_any(storage, writable=True) as disk:
        formats.add("look", look)
        disk.write(data, 0)
        assert data.startswith(b"HEAD")
        assert disk.read_bytes(0, 4) == bytes(4)
        assert disk.read_bytes(len(data) - 4, 4) == bytes(4)


def test_no_resize_comes_between_the_look_and_the_write(formats: Formats) -> None:
    """A harmless write in the middle, after which a harmless cut would make it the end."""
    formats.add("tail", ends(b"TAIL"))
    writing, go_on = threading.Event(), threading.Event()

    class Slow(WrappedStorage):
        def writev(self, buffers: WriteBuffers, offset: int) -> None:
            writing.set()
            assert go_on.wait(10)
            super().writev(buffers, offset)

    storage = Slow(MemoryStorage(bytes(500_000)))
    refused: list[UnderlayError] = []

    def cut() -> None:
        try:
            disk.resize(250_000)
        except UnderlayError as error:
            refused.append(error)

    with underlay.open_any(storage, writable=True) as disk:
        write = threading.Thread(target=disk.write, args=(b"TAIL", 249_996))
        write.start()
        assert writing.wait(10)
        resize = threading.Thread(target=cut)
        resize.start()
        resize.join(0.2)
        go_on.set()
        write.join()
        resize.join()
        assert refused
        assert disk.size == 500_000


def test_many_buffers_are_one_write(guessed: MemoryStorage) -> None:
    with underlay.open_any(guessed, writable=True) as disk:
        with pytest.raises(ReadOnlyError):
            disk.writev([b"H", b"EA", b"D", *[b"x"] * 3000], 0)
        disk.writev([b"x"] * 3000, 0)
        assert disk.read_bytes(0, 3001) == b"x" * 3000 + b"\0"
