"""Raw that was only guessed: whatever a guest writes, and by whichever way, it stays raw."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import underlay
from underlay import jobs
from underlay.errors import ReadOnlyError, UnderlayError
from underlay.probing import VIEW_BYTES, Match, NoMatch, ProbeVerdict, ProbeView
from underlay.recognition import matching_formats
from underlay.storage import WriteBuffers
from underlay.testing import WrappedStorage
from underlay_storage.memory import MemoryStorage

from .formats import Formats, ends, starts

if TYPE_CHECKING:
    from tests.conftest import Tool

#: The least that makes the real qemu-img take a raw disk for an image: where, and what.
HEADS = {
    "qcow": [(0, b"QFI\xfb\0\0\0\1")],
    "qcow2": [(0, b"QFI\xfb\0\0\0\3")],
    "qcow2 of the future": [(0, b"QFI\xfb\0\0\0\x09")],
    "qed": [(0, b"QED\0")],
    "vmdk": [(0, b"KDMV")],
    "vmdk of old": [(0, b"COWD")],
    "vmdk descriptor": [(0, b"# Disk DescriptorFile\nversion=1\n")],
    "vmdk descriptor, bare": [(0, b"version=1\n")],
    "vmdk descriptor, with comments": [(0, b"#\n  \r\n# x\nversion=3\r\n")],
    "vhdx": [(0, b"vhdxfile")],
    "vhd": [(0, b"conectix")],
    "vdi": [(64, b"\x7f\x10\xda\xbe")],
    "luks": [(0, b"LUKS\xba\xbe\0\1")],
    "parallels": [(0, b"WithoutFreeSpace\2\0\0\0")],
    "parallels of 64 bits": [(0, b"WithouFreSpacExt\2\0\0\0")],
    "bochs": [
        (0, b"Bochs Virtual HD Image\0"),
        (32, b"Redolog\0"),
        (48, b"Growing\0"),
        (64, b"\0\0\2\0"),
    ],
    "cloop": [
        (0, b"#!/bin/sh\n#V2.0 Format\n"),
        (23, b"modprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"),
    ],
}
_SIZE = 200_000


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


# -- formats that no plug-in knows


@pytest.mark.parametrize("name", HEADS)
def test_it_is_guarded_against_formats_that_others_act_on(
    tmp_path: Path, qemu: Callable[[str], str], name: str
) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    parts = HEADS[name]
    with underlay.open_any(image, writable=True) as disk:
        halves = [half for at, data in parts for half in _halves(at, data)]
        for writes in (parts, halves):
            with pytest.raises(ReadOnlyError, match="guessed to be raw"):
                _write_all(disk, writes)
    assert _qemus_word(qemu("qemu-img"), image) == "raw"
    content = bytearray(1 << 20)
    for at, data in parts:
        content[at : at + len(data)] = data
    image.write_bytes(content)
    assert _qemus_word(qemu("qemu-img"), image) != "raw", "the attack is none"


@pytest.mark.parametrize("magic", [b"conectix", b"koly"])
def test_it_is_guarded_against_footers(magic: bytes) -> None:
    storage = MemoryStorage(bytes(1000) + magic.ljust(512, b"\0") + bytes(1 << 20))
    with underlay.open_any(storage, writable=True) as disk:
        with pytest.raises(ReadOnlyError, match="guessed"):
            disk.resize(1512)
        with pytest.raises(ReadOnlyError, match="guessed"):
            disk.write(magic, disk.size - 512)
        disk.write(magic, disk.size - 511)
        disk.write(magic, disk.size - 700_000)
        with pytest.raises(ReadOnlyError, match="guessed"):
            disk.resize(disk.size - 700_000 + 512)


@pytest.mark.parametrize("format_name", ["vmdk", "vdi", "vhdx", "vpc", "qed", "parallels", "qcow"])
def test_an_image_of_such_a_format_is_never_written_to_as_raw(
    tmp_path: Path, qemu_img: Tool, format_name: str
) -> None:
    image = tmp_path / "strange.img"
    qemu_img("create", "-q", "-f", format_name, image, "1M")
    before = image.read_bytes()
    assert underlay.inspect(image).verdict == "unknown"
    with underlay.open_any(image) as disk:
        assert disk.read_bytes(0, disk.size) == before
    with pytest.raises(underlay.PluginError, match=r"bears the signature .* format='raw'"):
        underlay.open_any(image, writable=True)
    with pytest.raises(underlay.PluginError, match="bears the signature"):
        jobs.resize(image, "2M")
    assert image.read_bytes() == before
    with underlay.open_image(image, format="raw", writable=True) as disk:
        disk.write(b"as told", 0)


# -- a guest at play

_PIECES = [data for parts in HEADS.values() for _, data in parts] + [b"conectix", b"koly", b"\n"]
_FRAGMENTS = st.one_of(
    st.sampled_from(_PIECES),
    st.sampled_from(_PIECES).flatmap(
        lambda piece: st.tuples(st.integers(0, len(piece)), st.integers(0, len(piece))).map(
            lambda ends: piece[min(ends) : max(ends)]
        )
    ),
    st.binary(max_size=8),
)
_PLACES = st.one_of(
    st.integers(0, 80),
    st.integers(_SIZE - 520, _SIZE - 500),
    st.sampled_from([VIEW_BYTES - 4, _SIZE - VIEW_BYTES - 4, _SIZE // 2]),
)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), _PLACES, st.lists(_FRAGMENTS, min_size=1, max_size=4)),
        st.tuples(st.just("zero"), _PLACES, st.integers(0, 100_000)),
        st.tuples(st.just("discard"), _PLACES, st.integers(0, 100_000)),
        st.tuples(st.just("resize"), st.integers(-600, 600), st.none()),
    ),
    max_size=12,
)


@given(steps=_STEPS)
@example(steps=[("write", 1, [b"FI\xfb\0\0\0\3"]), ("write", 0, [b"Q"])])
@example(steps=[("write", 0, [b"\n#\nversion=1\n"]), ("write", 0, [b" "])])
@example(steps=[("write", _SIZE - 512, [b"conecti"]), ("write", _SIZE - 505, [b"x"])])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_a_guest_does_nobody_takes_its_disk_for_an_image(
    tmp_path: Path, qemu: Callable[[str], str], steps: list[tuple[str, int, object]]
) -> None:
    image = tmp_path / "disk"
    model = bytearray(b"\xa5" * _SIZE)
    image.write_bytes(model)
    with underlay.open_any(image, writable=True) as disk:
        for what, where, how in steps:
            after = _after(model, what, where, how)
            if after is None:
                continue
            view = ProbeView(bytes(after[:VIEW_BYTES]), bytes(after[-VIEW_BYTES:]), len(after))
            refused = False
            try:
                if what == "write":
                    disk.writev(how, where)  # type: ignore[arg-type]
                elif what == "zero":
                    disk.write_zeroes(where, how)  # type: ignore[arg-type]
                elif what == "discard":
                    disk.discard_to_zero(where, how)  # type: ignore[arg-type]
                else:
                    disk.resize(len(after))
            except ReadOnlyError:
                refused = True
            assert refused == bool(matching_formats(view))
            model = model if refused else after
            assert image.read_bytes() == model
    assert _qemus_word(qemu("qemu-img"), image) == "raw"


def _after(model: bytearray, what: str, where: int, how: object) -> bytearray | None:
    """What the disk holds then; None where that cannot be asked for."""
    after = bytearray(model)
    if what == "resize":
        size = _SIZE + where
        return after[:size] + bytes(max(0, size - len(after)))
    data = bytes(how) if isinstance(how, int) else b"".join(how)  # type: ignore[arg-type]
    if where + len(data) > len(model):
        return None
    after[where : where + len(data)] = data
    return after


def _halves(at: int, data: bytes) -> list[tuple[int, bytes]]:
    cut = len(data) // 2
    return [(at, data[:cut]), (at + cut, data[cut:])]


def _write_all(disk: underlay.SyncFormatAccess, writes: list[tuple[int, bytes]]) -> None:
    for at, data in writes:
        disk.write(data, at)


def _qemus_word(qemu_img: str, image: Path) -> str:
    """The format that the real qemu-img finds; "none" if it finds one and fails to open it."""
    done = subprocess.run(
        [qemu_img, "info", str(image)], capture_output=True, text=True, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith("file format: "):
            return line.removeprefix("file format: ")
    return "none"
