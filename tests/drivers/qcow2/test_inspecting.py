"""What an image tells of itself: to ``info`` in QEMU's words, to ``inspect`` even if unusable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from underlay.capabilities import Inspection
from underlay.face import run_blocking
from underlay.gate import ReferenceKind
from underlay.handle import StorageHandle
from underlay.limits import DEFAULT_LIMITS, Limits
from underlay.probing import Match, NoMatch, ProbeView
from underlay_drivers.qcow2 import Qcow2, layout
from underlay_storage.memory import MemoryStorage

from .conftest import Maker, Tool
from .images import Image, open_bytes


def described(image: Image) -> Any:
    with open_bytes(image.data) as disk:
        return run_blocking(disk.describe())


def inspected(data: bytes | bytearray, limits: Limits = DEFAULT_LIMITS) -> Inspection:
    handle = StorageHandle(MemoryStorage(bytes(data)), owned=True)
    try:
        return run_blocking(Qcow2.inspect(handle, limits))
    finally:
        run_blocking(handle.close())


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1",
        "lazy_refcounts=on,refcount_bits=1,cluster_size=512",
        "compression_type=zstd,extended_l2=on",
    ],
)
@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_the_details_are_qemus_in_qemus_order(
    make: Maker, qemu_img: Tool, tmp_path: Path, options: str, flags: int
) -> None:
    image = make(options)
    if image.header.version > 2:
        image.put(72, "Q", image.word(72) | flags)
    path = tmp_path / "image"
    path.write_bytes(image.data)
    told = json.loads(qemu_img("info", "--output=json", path))
    description = described(image)
    data = told["format-specific"]["data"]
    assert description.details == data
    assert list(description.details) == list(data)
    assert description.cluster_size == told["cluster-size"]
    assert description.dirty == told["dirty-flag"]
    assert description.corrupt == data.get("corrupt", False)
    assert len(description.warnings) == (flags.bit_count() if image.header.version > 2 else 0)


def test_a_data_file_and_a_backing_image_are_named(qemu_img: Tool, tmp_path: Path) -> None:
    path = tmp_path / "image"
    data = f"data_file={tmp_path / 'data'},data_file_raw=on"
    qemu_img("create", "-q", "-f", "qcow2", "-o", data, path, "1M")
    told = json.loads(qemu_img("info", "--output=json", path))["format-specific"]["data"]
    description = described(Image.load(path))
    assert description.details == told
    assert list(description.details) == list(told)
    assert description.data_file == str(tmp_path / "data")
    names = "backing_file=/etc/passwd,backing_fmt=raw"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-o", names, path, "1M")
    description = described(Image.load(path))
    assert (description.backing_name, description.backing_format) == ("/etc/passwd", "raw")


def test_features_are_told_by_name(plain: Image) -> None:
    plain.put(72, "QQQ", 1, 1 | 1 << 7, 1 << 9)
    plain.extensions((layout.EXTENSION_FEATURE_NAMES, layout.FEATURE_NAME.pack(2, 9, b"future")))
    features = described(plain).features
    assert [(one.name, one.kind, one.bit, one.supported) for one in features] == [
        ("dirty bit", "incompatible", 0, True),
        ("lazy refcounts", "compatible", 0, True),
        ("unknown compatible bit 7", "compatible", 7, False),
        ("future", "autoclear", 9, False),
    ]


def test_a_good_image_has_no_damage(plain: Image, snapshotted: Image, extended: Image) -> None:
    for image in (plain, snapshotted, extended):
        found = inspected(image.data)
        assert found.damage == ()
        assert found.references == ()
        assert found.virtual_size is not None


def test_what_is_wrong_is_listed_and_not_raised(plain: Image) -> None:
    plain.put(24, "Q", 1 << 63)  # more than the L1 table covers
    plain.put(32, "I", 2)  # LUKS
    plain.put(56, "I", 0)  # no refcount table
    plain.put(72, "Q", 1 << 2 | 1 << 40)  # a data file, and something unknown
    plain.extensions((layout.EXTENSION_DATA_FILE, b"/etc/shadow"))
    found = inspected(plain.data)
    assert found.virtual_size == 1 << 63
    assert found.encrypted
    assert [(one.kind, one.name) for one in found.references] == [
        (ReferenceKind.DATA_FILE, "/etc/shadow")
    ]
    assert [one.name for one in found.features if not one.supported] == [
        "unknown incompatible bit 40"
    ]
    assert len(found.damage) == 2


@pytest.mark.parametrize("flag", [0, 1])
def test_a_dirty_or_corrupt_image_is_damaged(plain: Image, flag: int) -> None:
    assert len(inspected(plain.put(72, "Q", 1 << flag).data).damage) == 1


def test_damage_beyond_the_header_is_seen(plain: Image) -> None:
    copy = plain.copy()
    copy.put(copy.l1(), "Q", 1 << 40)
    assert "past the end of the file" in inspected(copy.data).damage[0]
    copy = plain.copy()
    copy.put(60, "IQ", 1, len(copy.data) + -len(copy.data) % copy.cluster)
    assert any("snapshot table" in damage for damage in inspected(copy.data).damage)
    copy = plain.copy()
    copy.put(48, "Q", 0x30000)
    assert any("overlaps" in damage for damage in inspected(copy.data).damage)


@pytest.mark.parametrize("size", [0, 4, 40, 80, 511, 1000])
def test_a_cut_image_is_inspected(plain: Image, size: int) -> None:
    assert inspected(plain.data[:size]).damage


def test_a_backing_name_is_told_to_the_byte(plain: Image) -> None:
    name = b'json:{"file": "\xff\xfe\n"}'
    plain.put(8, "QI", 1024, len(name))
    plain.data[1024 : 1024 + len(name)] = name
    (reference,) = inspected(plain.data).references
    assert reference.name.encode("utf-8", "surrogateescape") == name
    assert reference.kind is ReferenceKind.BACKING


def test_limits_bound_what_is_read(plain: Image) -> None:
    found = inspected(plain.data, Limits(virtual_size=1 << 20))
    assert any("virtual_size" in damage for damage in found.damage)


@pytest.mark.parametrize(
    ("head", "matches"),
    [
        (b"QFI\xfb\0\0\0\2", True),
        (b"QFI\xfb\0\0\0\3", True),
        (b"QFI\xfb\0\0\0\4", True),  # of a later version, and not raw
        (b"QFI\xfb\0\0\0\1", False),
        (b"QFI\xfb\0\0\0", False),
        (b"QFI\xfb", False),
        (b"QED\0\0\0\0\3", False),
        (b"", False),
    ],
)
def test_recognition_takes_signature_and_version(head: bytes, matches: bool) -> None:
    for rest in (b"", bytes(504)) if len(head) == 8 else (b"",):
        view = ProbeView(head + rest, head + rest, len(head + rest))
        assert isinstance(Qcow2.probe(view), Match if matches else NoMatch)
