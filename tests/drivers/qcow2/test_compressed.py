"""Compressed clusters: whatever a stream claims, it fills one cluster or nothing."""

from __future__ import annotations

import contextlib
import random
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from underlay.errors import CorruptImageError
from underlay_drivers.qcow2 import compressed
from underlay_drivers.qcow2.compressed import decompress

from .conftest import Maker, Tool
from .images import Image, open_bytes, read

CLUSTER = 64 << 10
ZLIB, ZSTD = 0, 1


def deflate(data: bytes, *, wbits: int = -12) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, wbits)
    return packer.compress(data) + packer.flush()


def frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(3).compress(data)


def unpack(kind: int, raw: bytes, size: int = CLUSTER) -> bytes:
    out = bytearray(size)
    decompress(kind, memoryview(raw), memoryview(out), name="image")
    return bytes(out)


TEXT = random.Random(1).randbytes(3000) * 30
ONE = TEXT[:CLUSTER]


@pytest.mark.parametrize("padding", [0, 1, 511, 100_000])
def test_a_stream_may_be_followed_by_anything(padding: int) -> None:
    rest = random.Random(2).randbytes(padding)
    assert unpack(ZLIB, deflate(ONE) + rest) == ONE
    assert unpack(ZSTD, frame(ONE) + rest) == ONE


def test_frames_that_do_not_say_their_size() -> None:
    packer = zstandard.ZstdCompressor(3, write_content_size=False, write_checksum=True)
    assert unpack(ZSTD, packer.compress(ONE)) == ONE


def test_any_window_is_read() -> None:
    assert unpack(ZLIB, deflate(ONE, wbits=-15)) == ONE


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        (ZLIB, b""),
        (ZLIB, deflate(ONE[:-1])),
        (ZLIB, deflate(ONE)[:-100]),
        (ZLIB, zlib.compress(ONE)),
        (ZLIB, b"\xff" * 1000),
        (ZLIB, bytes(1000)),
        (ZLIB, frame(ONE)),
        (ZSTD, b""),
        (ZSTD, frame(ONE[:-1])),
        (ZSTD, frame(ONE)[:-100]),
        (ZSTD, frame(TEXT)),
        (ZSTD, b"\xff" * 1000),
        (ZSTD, bytes(1000)),
        (ZSTD, deflate(ONE)),
    ],
)
def test_what_does_not_fill_a_cluster_is_damage(kind: int, raw: bytes) -> None:
    with pytest.raises(CorruptImageError, match="'image': a compressed cluster cannot be read"):
        unpack(kind, raw)


def with_declared_size(size: int, *, single_segment: bool) -> bytes:
    """A zstd frame that lies about how much it holds (RFC 8878, 3.1.1)."""
    descriptor = 0xC0 | (0x20 if single_segment else 0)
    window = b"" if single_segment else b"\x58"
    block = (3 << 3 | 1).to_bytes(3, "little") + b"abc"
    return b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + window + size.to_bytes(8, "little") + block


@pytest.mark.parametrize("single_segment", [False, True])
def test_nothing_is_allocated_by_a_declared_size(single_segment: bool) -> None:
    raw = with_declared_size(1 << 40, single_segment=single_segment)
    assert zstandard.frame_content_size(raw) == 1 << 40
    peak = peak_of(lambda: refused(ZSTD, raw))
    assert peak < 1 << 20


def test_a_bomb_fills_one_cluster_and_no_more() -> None:
    bomb = bytes(64 << 20)
    small = deflate(bomb)
    assert len(small) < 100_000
    peak = peak_of(lambda: unpack(ZLIB, small))
    assert unpack(ZLIB, small) == bytes(CLUSTER)  # as QEMU: what comes after is not looked at
    assert peak < 1 << 20
    packed = frame(bomb)
    peak = peak_of(lambda: refused(ZSTD, packed))
    assert peak < 1 << 20


def refused(kind: int, raw: bytes) -> None:
    with pytest.raises(CorruptImageError):
        unpack(kind, raw)


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that were allocated through Python's allocator at most."""
    work()  # imports, and objects that are kept
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@given(raw=st.binary(max_size=600), kind=st.sampled_from([ZLIB, ZSTD]))
def test_garbage_is_data_or_damage(raw: bytes, kind: int) -> None:
    with contextlib.suppress(CorruptImageError):
        unpack(kind, raw, size=512)


def test_zlib_serves_where_there_is_no_isal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "_deflate_module", lambda: zlib)
    assert unpack(ZLIB, deflate(ONE) + bytes(300)) == ONE
    for raw in (b"", b"\xff" * 100, deflate(ONE[:-1]), zlib.compress(ONE)):
        with pytest.raises(CorruptImageError):
            unpack(ZLIB, raw)


def test_threads_decode_at_the_same_time() -> None:
    wrong: list[int] = []
    contents = [random.Random(seed).randbytes(100) * 700 for seed in range(4)]

    def work(number: int) -> None:
        content = contents[number][:CLUSTER]
        for _ in range(50):
            for kind, raw in ((ZLIB, deflate(content)), (ZSTD, frame(content))):
                if unpack(kind, raw) != content:
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- whole images


@pytest.mark.parametrize("options", [
    "compat=0.10,cluster_size=512",
    "compat=1.1,cluster_size=4k",
    "compression_type=zstd",
    "compression_type=zstd,cluster_size=2M",
    "extended_l2=on,compression_type=zstd",
])  # fmt: skip
def test_what_qemu_compressed_is_read(qemu_img: Tool, tmp_path: Path, options: str) -> None:
    dice = random.Random(3)
    content = b"".join(
        dice.randbytes(dice.randrange(1, 9)) * 2000 if number % 3 else dice.randbytes(5000)
        for number in range(60)
    )
    content = content[: len(content) // 512 * 512]
    (tmp_path / "raw").write_bytes(content)
    convert = ("convert", "-f", "raw", "-O", "qcow2", "-c", "-o", options)
    qemu_img(*convert, tmp_path / "raw", tmp_path / "image")
    with open_bytes((tmp_path / "image").read_bytes()) as disk:
        assert read(disk, 0, len(content)) == content
        for _ in range(100):
            offset, length = dice.randrange(len(content)), dice.randrange(1, 5000)
            assert read(disk, offset, length) == content[offset : offset + length].ljust(
                length, b"\0"
            )


def test_the_last_cluster_may_be_compressed_and_not_whole(make: Maker) -> None:
    image: Image = make("compat=1.1", "100k", "write -c -P 0x44 64k 36k")
    with open_bytes(image.data) as disk:
        assert read(disk, 64 << 10, 64 << 10) == b"\x44" * (36 << 10) + bytes(28 << 10)
