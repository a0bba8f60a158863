"""The header: what QEMU writes survives us byte for byte, known or not."""

from __future__ import annotations

import string
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from underlay.errors import InvalidImageError, LimitExceededError, UnsupportedFeatureError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Extension, Header, IncompleteHeaderError

from .conftest import Maker, Tool
from .images import Image


def complete(data: bytes) -> Header:
    header, problem = Header.unpack(data).with_extensions(data)
    assert problem is None
    return header.with_backing_name(data)


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1",
        "compat=1.1,lazy_refcounts=on,refcount_bits=64",
        "compression_type=zstd,cluster_size=2M",
        "extended_l2=on,cluster_size=16k",
        "cluster_size=512,refcount_bits=1",
    ],
)
def test_what_qemu_wrote_is_written_back_byte_for_byte(make: Maker, options: str) -> None:
    data = bytes(make(options).data)
    packed = complete(data).to_bytes()
    assert packed == data[: len(packed)]
    assert not any(data[len(packed) : 512])


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_names_are_read_and_written_back(qemu_img: Tool, tmp_path: Path, compat: str) -> None:
    path = tmp_path / "overlay"
    options = f"compat={compat},backing_file=nowhere/báse,backing_fmt=raw"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-o", options, path, "1M")
    data = path.read_bytes()
    header = complete(data)
    assert header.backing_file == "nowhere/báse"
    assert header.backing_format == "raw"  # version 2 has extensions, too
    packed = header.to_bytes()
    assert packed == data[: len(packed)]


def test_a_data_file_and_bitmaps_are_written_back(qemu_img: Tool, tmp_path: Path) -> None:
    path = tmp_path / "image"
    options = f"data_file={tmp_path / 'data'},data_file_raw=on"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
    qemu_img("bitmap", "--add", path, "one")
    data = path.read_bytes()
    header = complete(data)
    assert header.data_file == str(tmp_path / "data")
    assert header.bitmaps is not None
    assert header.bitmaps.nb_bitmaps == 1
    assert header.bitmaps.pack() == header.extension(layout.EXTENSION_BITMAPS)
    packed = header.to_bytes()
    assert packed == data[: len(packed)]


def test_what_is_unknown_is_kept(plain: Image) -> None:
    plain.put(100, "I", 120).put(104, "QQ", 0, 0xABCDEF)
    plain.header = Header.unpack(bytes(plain.data))
    plain.extensions((0x12345678, b"unknown"), (0x12345678, b"again"), (0xFFFFFFFF, b""))
    data = bytes(plain.data)
    header = complete(data)
    assert header.additional == bytes(8) + b"\0\0\0\0\0\xab\xcd\xef"
    assert header.extensions == (
        Extension(0x12345678, b"unknown"),
        Extension(0x12345678, b"again"),
        Extension(0xFFFFFFFF, b""),
    )
    packed = header.to_bytes()
    assert packed == data[: len(packed)]


def test_the_images_own_names_for_features_are_read(plain: Image) -> None:
    data = bytes(plain.data)
    names = complete(data).feature_names()
    assert names["incompatible", 0] == "dirty bit"
    assert names["autoclear", 1] == "raw external data"


@pytest.mark.parametrize("size", [0, 3, 4, 40, 71])
def test_too_few_bytes_are_no_header(plain: Image, size: int) -> None:
    with pytest.raises(InvalidImageError):
        Header.unpack(bytes(plain.data[:size]))


def test_version_3_needs_its_fields(plain: Image) -> None:
    with pytest.raises(InvalidImageError):
        Header.unpack(bytes(plain.data[:80]))


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_other_versions_are_named(plain: Image, version: int) -> None:
    with pytest.raises(UnsupportedFeatureError, match=f"version {version}"):
        Header.unpack(bytes(plain.put(4, "I", version).data))


def test_a_header_area_that_goes_on_says_how_far(make: Maker) -> None:
    image = make("cluster_size=2M")
    image.extensions((0x12345678, bytes(70_000)))
    with pytest.raises(IncompleteHeaderError) as caught:
        Header.unpack(bytes(image.data)).with_extensions(bytes(image.data[: 64 << 10]))
    assert caught.value.needed == 2 << 20
    assert len(complete(bytes(image.data)).extensions[0].data) == 70_000


def test_a_header_that_outgrows_its_cluster_is_refused(make: Maker) -> None:
    data = bytes(make("cluster_size=512").data)
    header = complete(data)
    huge = attrs.evolve(header, extensions=(Extension(1, bytes(500)),))
    with pytest.raises(LimitExceededError):
        huge.to_bytes()


u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)


@given(
    fields=st.fixed_dictionaries(
        {
            "size": u64,
            "crypt_method": u32,
            "l1_size": u32,
            "l1_table_offset": u64,
            "refcount_table_offset": u64,
            "refcount_table_clusters": u32,
            "nb_snapshots": u32,
            "snapshots_offset": u64,
            "incompatible_features": u64,
            "compatible_features": u64,
            "autoclear_features": u64,
            "refcount_order": u32,
        }
    ),
    additional=st.binary(max_size=8).map(lambda data: data.ljust(8, b"\0")),
    extensions=st.lists(
        st.builds(Extension, st.integers(1, 2**32 - 1), st.binary(max_size=40)), max_size=6
    ),
    name=st.text(string.printable, max_size=30),
)
def test_every_header_survives_the_way_to_bytes_and_back(
    fields: dict[str, int], additional: bytes, extensions: list[Extension], name: str
) -> None:
    header = Header(
        version=3,
        cluster_bits=16,
        header_length=112,
        additional=additional,
        extensions=tuple(extensions),
        backing_name=name.encode(),
        **fields,
    )
    again = complete(header.to_bytes().ljust(65536, b"\0"))
    assert again.to_bytes() == header.to_bytes()
    for field, value in fields.items():
        assert getattr(again, field) == value
    assert again.extensions == header.extensions
    assert again.backing_name == header.backing_name
