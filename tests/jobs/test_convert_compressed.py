"""Converting into compressed images: QEMU reads the same bytes, and they are no larger."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay
from underlay.errors import StorageError
from underlay.jobs import convert
from underlay.storage import WriteBuffers
from underlay_storage.file import FileStorage

from .conftest import Make
from .files import same, write_mixed

Tool = Callable[..., str]


def _options(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split(",")) if text else {}


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize(
    "how",
    [
        "",
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
        "extended_l2=on",
        "refcount_bits=1",
        "refcount_bits=8,cluster_size=16k",
        "refcount_bits=64",
    ],
)
def test_qemu_reads_the_same_bytes_and_finds_nothing_wrong(
    kind: str, how: str, mixed: Path, tmp_path: Path, qemu_img: Tool
) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "qemu.qcow2"
    together = f"compression_type={kind}" + (f",{how}" if how else "")
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", together, mixed, theirs)
    options = dict(_options(together))
    convert(mixed, ours, output_format="qcow2", options=options, compress=True)
    qemu_img("check", ours)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", mixed, ours)
    # Each of the two may leave the end of the last cluster unwritten.
    assert ours.stat().st_size <= theirs.stat().st_size * 1.01 + (2 << 20 if "2M" in how else 65536)
    convert(ours, tmp_path / "back.raw")
    assert same(mixed, tmp_path / "back.raw")


def test_v2_images_are_compressed_too(mixed: Path, tmp_path: Path, qemu_img: Tool) -> None:
    ours = tmp_path / "ours.qcow2"
    convert(mixed, ours, output_format="qcow2", options={"compat": "v2"}, compress=True)
    qemu_img("check", ours)
    qemu_img("compare", "-f", "raw", mixed, ours)


@pytest.mark.parametrize(("kind", "most"), [("zlib", 9), ("zstd", 22)])
def test_each_level_works_and_makes_a_difference(
    kind: str, most: int, tmp_path: Path, qemu_img: Tool
) -> None:
    chance = random.Random(3)
    words = [chance.randbytes(4).hex() for _ in range(999)]
    source = tmp_path / "words.raw"
    source.write_text(" ".join(chance.choices(words, k=100_000)))
    sizes: list[int] = []
    for level in (1, 3, 4, most):
        path = tmp_path / f"{level}.qcow2"
        convert(
            source,
            path,
            output_format="qcow2",
            options={"compression_type": kind},
            compress=True,
            level=level,
        )
        qemu_img("check", path)
        convert(path, tmp_path / "back.raw", overwrite=True)
        assert same(source, tmp_path / "back.raw")
        sizes.append(path.stat().st_size)
    assert len(set(sizes)) > 1


@pytest.mark.parametrize(("kind", "level"), [("zlib", 0), ("zlib", 10), ("zstd", 23)])
def test_an_impossible_level_is_refused(kind: str, level: int, mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(underlay.OptionError, match="level"):
        convert(
            mixed,
            tmp_path / "out.qcow2",
            output_format="qcow2",
            options={"compression_type": kind},
            compress=True,
            level=level,
        )
    assert not (tmp_path / "out.qcow2").exists()


def test_a_format_without_compression_is_an_error(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(underlay.UnsupportedOperationError, match="Compression not supported"):
        convert(mixed, tmp_path / "out.raw", compress=True)
    assert not (tmp_path / "out.raw").exists()


def test_an_external_data_file_cannot_be_compressed(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(underlay.UnsupportedOperationError, match="external data file"):
        convert(
            mixed,
            tmp_path / "out.qcow2",
            output_format="qcow2",
            options={"data_file": "data.raw"},
            compress=True,
        )
    assert not (tmp_path / "out.qcow2").exists()
    assert not (tmp_path / "data.raw").exists()


@pytest.mark.parametrize("size", [1, 511, 65536, 65537, 1_000_001])
def test_the_last_cluster_may_be_cut(size: int, tmp_path: Path) -> None:
    (tmp_path / "odd.raw").write_bytes((b"odd %d " % size * size)[:size])
    convert(tmp_path / "odd.raw", tmp_path / "c.qcow2", output_format="qcow2", compress=True)
    with underlay.open_any(tmp_path / "c.qcow2") as disk:
        assert disk.size == size
        assert any(isinstance(e.mapping, underlay.Special) for e in disk.extents())
    convert(tmp_path / "c.qcow2", tmp_path / "back.raw")
    assert same(tmp_path / "odd.raw", tmp_path / "back.raw")


def test_sources_that_meet_inside_a_cluster(tmp_path: Path, qemu_img: Tool) -> None:
    for number, size in enumerate((100_352, 512, 300_032, 65536, 1 << 20)):
        (tmp_path / f"{number}.raw").write_bytes((b"%d source" % number * size)[:size])
    sources = [tmp_path / f"{number}.raw" for number in range(5)]
    qemu_img("convert", "-f", "raw", "-O", "raw", *sources, tmp_path / "qemu.raw")
    convert(sources, tmp_path / "c.qcow2", output_format="qcow2", compress=True)
    qemu_img("check", tmp_path / "c.qcow2")
    qemu_img("compare", "-f", "raw", tmp_path / "qemu.raw", tmp_path / "c.qcow2")


@pytest.mark.parametrize("unit", ["512", "4k", "64k", "2M"])
@pytest.mark.parametrize("source_unit", ["512", "64k", "2M"])
def test_units_of_any_size_become_units_of_another(
    unit: str, source_unit: str, mixed: Path, tmp_path: Path, qemu_img: Tool
) -> None:
    first, second = tmp_path / "first.qcow2", tmp_path / "second.qcow2"
    for source, target, size in ((mixed, first, source_unit), (first, second, unit)):
        convert(
            source,
            target,
            output_format="qcow2",
            options={"cluster_size": size},
            compress=True,
        )
    qemu_img("check", second)
    qemu_img("compare", "-f", "raw", mixed, second)


def test_with_0_zeroes_are_stored_compressed(make: Make, tmp_path: Path, qemu_img: Tool) -> None:
    source = make("some.qcow2", "qcow2", "3M", "write -P 5 1M 100k")
    qemu_img("convert", "-c", "-S", "0", "-O", "qcow2", source, tmp_path / "qemu.qcow2")
    convert(source, tmp_path / "ours.qcow2", output_format="qcow2", compress=True, sparse_size=0)
    qemu_img("check", tmp_path / "ours.qcow2")
    maps = [qemu_img("map", "--output=json", tmp_path / f"{n}.qcow2") for n in ("qemu", "ours")]
    assert maps[0] == maps[1]
    qemu_img("compare", source, tmp_path / "ours.qcow2")


def test_into_an_image_that_exists_everything_is_replaced(
    mixed: Path, make: Make, tmp_path: Path, qemu_img: Tool
) -> None:
    target = make("old.qcow2", "qcow2", "13M", "write -P 7 0 13M")
    convert(mixed, target, output_format="qcow2", compress=True, target_exists=True)
    qemu_img("check", target)
    with underlay.open_any(target) as disk:
        assert disk.read_bytes(0, 12 << 20) == mixed.read_bytes()
        assert disk.read_bytes(12 << 20, 1 << 20) == b"\7" * (1 << 20)
    # What was there before is free again, and used again.
    assert target.stat().st_size < 20 << 20


def test_many_threads_pack_one_image(tmp_path: Path, qemu_img: Tool) -> None:
    source = write_mixed(tmp_path / "big.raw", size=48 << 20, seed=5)
    convert(
        source,
        tmp_path / "c.qcow2",
        output_format="qcow2",
        options={"cluster_size": "4k"},
        compress=True,
        parallel=16,
    )
    qemu_img("check", tmp_path / "c.qcow2")
    qemu_img("compare", "-f", "raw", source, tmp_path / "c.qcow2")


def test_a_write_that_fails_is_told_and_leaves_no_target(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lock, count = FileStorage.writev, threading.Lock(), 0

    def full(self: FileStorage, buffers: WriteBuffers, offset: int) -> None:
        nonlocal count
        with lock:
            count += 1
            if count > 8:
                raise StorageError("No space left on device", errno=28)
        real(self, buffers, offset)

    monkeypatch.setattr(FileStorage, "writev", full)
    with pytest.raises(StorageError, match="No space left"):
        convert(mixed, tmp_path / "out.qcow2", output_format="qcow2", compress=True)
    assert not (tmp_path / "out.qcow2").exists()


def test_in_memory_it_works_too(mixed: Path) -> None:
    convert(mixed, "memory:compressed", output_format="qcow2", compress=True)
    with underlay.open_any("memory:compressed") as disk:
        assert disk.read_bytes(0, disk.size) == mixed.read_bytes()
