"""Raw that was only guessed is not turned into a format that no plug-in here knows either."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import underlay
from underlay import jobs
from underlay.errors import ReadOnlyError
from underlay.probing import VIEW_BYTES, ProbeView
from underlay.recognition import matching_formats
from underlay_storage.memory import MemoryStorage

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
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
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
