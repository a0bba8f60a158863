"""What convert writes is what qemu-img writes, to the byte."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import underlay
from underlay.jobs import Progress, convert

from .conftest import Make
from .files import allocated, same, write_mixed

Tool = Callable[..., str]

PERMISSIVE = underlay.PermissiveImplicitOpenGate()


@pytest.mark.parametrize(
    "how",
    [
        "-o cluster_size=64k",
        "-o cluster_size=512",
        "-o cluster_size=2M",
        "-o extended_l2=on",
        "-o compat=0.10",
        "-c",
        "-c -o cluster_size=4k",
        "-c -o cluster_size=2M",
        "-c -W -m 8",
        "-c -o compression_type=zstd",
        "-c -W -m 8 -o compression_type=zstd,cluster_size=16k",
        "-S 0",
    ],
)
def test_each_kind_of_qcow2_becomes_the_same_raw_as_qemu_makes_of_it(
    how: str, mixed: Path, tmp_path: Path, qemu_img: Tool
) -> None:
    image, expected, got = tmp_path / "image.qcow2", tmp_path / "qemu.raw", tmp_path / "ours.raw"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *how.split(), mixed, image)
    qemu_img("convert", "-O", "raw", image, expected)
    copied = convert(image, got)
    assert same(got, mixed)
    assert same(got, expected)
    assert copied.size == mixed.stat().st_size
    # As sparse as QEMU's, and a block or two at the borders of pieces.
    assert allocated(got) <= allocated(expected) * 1.02 + 65536


def test_a_chain_is_read_through(make: Make, tmp_path: Path, qemu_img: Tool) -> None:
    base = write_mixed(tmp_path / "base.raw", size=3 << 20)
    middle = make(
        "middle.qcow2", "qcow2", "5M", "write -P 7 1M 1M", "write -z 2M 64k", backing=base
    )
    top = make("top.qcow2", "qcow2", "6M", "write -P 9 3M 100k", backing=middle)
    qemu_img("convert", "-O", "raw", top, tmp_path / "qemu.raw")
    convert(top, tmp_path / "ours.raw", gate=underlay.DirectoryGate())
    assert same(tmp_path / "ours.raw", tmp_path / "qemu.raw")


@pytest.mark.parametrize("size", [0, 1, 511, 513, 4097, 1_000_001])
def test_a_size_that_is_no_multiple_of_a_sector_is_kept(size: int, tmp_path: Path) -> None:
    (tmp_path / "odd.raw").write_bytes(b"\xa5" * size)
    convert(tmp_path / "odd.raw", tmp_path / "out.raw")
    assert same(tmp_path / "odd.raw", tmp_path / "out.raw")


def test_sources_follow_each_other_in_whole_sectors(
    make: Make, tmp_path: Path, qemu_img: Tool
) -> None:
    (tmp_path / "a.raw").write_bytes(b"a" * 1000)
    second = make("b.qcow2", "qcow2", "1M", "write -P 2 100k 100k")
    (tmp_path / "c.raw").write_bytes(b"c" * 2048)
    sources = [tmp_path / "a.raw", second, tmp_path / "c.raw"]
    qemu_img("convert", "-O", "raw", *sources, tmp_path / "qemu.raw")
    convert(sources, tmp_path / "ours.raw")
    assert same(tmp_path / "ours.raw", tmp_path / "qemu.raw")


@pytest.mark.parametrize("sparse_size", [0, 512, 3072, 4096, 65536, 16 << 20])
def test_zeroes_are_left_out_from_the_size_that_is_asked_for(
    sparse_size: int, tmp_path: Path, qemu_img: Tool
) -> None:
    source = tmp_path / "source.raw"
    block = b"\x01" * 4096
    source.write_bytes(
        block + bytes(4096) + block + bytes(65536) + block + bytes(1 << 20) + block + bytes(12288)
    )
    qemu_img("convert", "-f", "raw", "-O", "raw", "-S", sparse_size, source, tmp_path / "qemu.raw")
    convert(source, tmp_path / "ours.raw", sparse_size=sparse_size)
    assert same(tmp_path / "ours.raw", source)
    assert abs(allocated(tmp_path / "ours.raw") - allocated(tmp_path / "qemu.raw")) <= 16384


def test_with_0_a_hole_is_allocated_too(make: Make, tmp_path: Path) -> None:
    hole = make("hole.qcow2", "qcow2", "2M")
    convert(hole, tmp_path / "full.raw", sparse_size=0)
    assert allocated(tmp_path / "full.raw") >= 2 << 20
    convert(hole, tmp_path / "sparse.raw")
    assert allocated(tmp_path / "sparse.raw") == 0


@pytest.mark.parametrize("sparse_size", [1, 1000, -512, (16 << 20) + 512])
def test_an_impossible_sparse_size_is_refused(
    sparse_size: int, mixed: Path, tmp_path: Path
) -> None:
    with pytest.raises(underlay.OptionError, match="sparse_size"):
        convert(mixed, tmp_path / "out.raw", sparse_size=sparse_size)
    assert not (tmp_path / "out.raw").exists()


@pytest.mark.parametrize("parallel", [0, 17])
def test_an_impossible_number_of_threads_is_refused(
    parallel: int, mixed: Path, tmp_path: Path
) -> None:
    with pytest.raises(underlay.OptionError, match="parallel"):
        convert(mixed, tmp_path / "out.raw", parallel=parallel)
    assert not (tmp_path / "out.raw").exists()


def test_zeroes_that_are_written_make_progress(make: Make, tmp_path: Path) -> None:
    seen: list[Progress] = []
    hole = make("hole.qcow2", "qcow2", "32M")
    convert(hole, tmp_path / "full.raw", sparse_size=0, progress=seen.append)
    assert len(seen) > 4


def test_no_source_at_all_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source"):
        convert([], tmp_path / "out.raw")
    assert not (tmp_path / "out.raw").exists()


class TestIntoAnImageThatExists:
    @pytest.mark.parametrize("sparse_size", [0, 4096])
    def test_zeroes_replace_what_was_there(
        self, sparse_size: int, mixed: Path, tmp_path: Path, qemu_img: Tool
    ) -> None:
        for name in ("qemu.raw", "ours.raw"):
            (tmp_path / name).write_bytes(b"old!" * (13 << 18))
        common = ["convert", "-n", "-f", "raw", "-O", "raw", "-S", sparse_size]
        qemu_img(*common, mixed, tmp_path / "qemu.raw")
        convert(mixed, tmp_path / "ours.raw", target_exists=True, sparse_size=sparse_size)
        assert same(tmp_path / "ours.raw", tmp_path / "qemu.raw")
        assert (tmp_path / "ours.raw").read_bytes()[12 << 20 :] == b"old!" * (1 << 18)

    def test_an_open_disk_is_written_and_stays_open(self, mixed: Path, tmp_path: Path) -> None:
        with underlay.create(tmp_path / "t.raw", format="raw", size="12M") as target:
            target.write(b"old" * 1000, 4 << 20)
            convert(mixed, target)
            assert target.read_bytes(0, 12 << 20) == mixed.read_bytes()

    def test_a_half_sector_at_the_end_of_a_source_is_filled_with_zeroes(
        self, tmp_path: Path, qemu_img: Tool
    ) -> None:
        (tmp_path / "s.raw").write_bytes(b"s" * 700)
        for name in ("qemu.raw", "ours.raw"):
            (tmp_path / name).write_bytes(b"o" * 4096)
        qemu_img(
            "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "s.raw", tmp_path / "qemu.raw"
        )
        convert(tmp_path / "s.raw", tmp_path / "ours.raw", target_exists=True)
        assert same(tmp_path / "ours.raw", tmp_path / "qemu.raw")

    def test_one_that_is_too_small_is_refused_untouched(self, mixed: Path, tmp_path: Path) -> None:
        (tmp_path / "small.raw").write_bytes(b"keep" * 1024)
        with pytest.raises(underlay.OutOfRangeError, match="too few"):
            convert(mixed, tmp_path / "small.raw", target_exists=True)
        assert (tmp_path / "small.raw").read_bytes() == b"keep" * 1024

    def test_one_that_does_not_exist_is_an_error(self, mixed: Path, tmp_path: Path) -> None:
        with pytest.raises(underlay.StorageNotFoundError):
            convert(mixed, tmp_path / "none.raw", target_exists=True)


class TestOverwriting:
    def test_has_to_be_asked_for(self, mixed: Path, tmp_path: Path) -> None:
        (tmp_path / "there.raw").write_bytes(b"precious")
        with pytest.raises(underlay.StorageExistsError):
            convert(mixed, tmp_path / "there.raw")
        assert (tmp_path / "there.raw").read_bytes() == b"precious"

    def test_leaves_nothing_of_the_old_content(self, mixed: Path, tmp_path: Path) -> None:
        (tmp_path / "there.raw").write_bytes(b"old" * (4 << 20))
        convert(mixed, tmp_path / "there.raw", overwrite=True)
        assert same(tmp_path / "there.raw", mixed)

    @pytest.mark.parametrize("exists", [False, True])
    def test_a_source_is_never_the_data_file_of_its_target(
        self, exists: bool, mixed: Path, tmp_path: Path
    ) -> None:
        source, target = tmp_path / "source.raw", tmp_path / "target.qcow2"
        convert(mixed, source)
        before = source.read_bytes()
        asked: dict[str, Any] = {"overwrite": True, "options": {"data_file": "source.raw"}}
        if exists:
            make = f"qemu-img create -q -f qcow2 -o data_file={target}.data {target} {len(before)}"
            rename = f"qemu-img amend -f qcow2 -o data_file={source} {target}"
            for command in (make, rename):
                subprocess.run(command.split(), check=True)
            gate = underlay.DirectoryGate(tmp_path)
            asked = {"target_exists": True, "gate": gate}
        with pytest.raises(underlay.ConflictError, match="is read and would be overwritten"):
            convert(source, target, output_format="qcow2", lock=False, **asked)
        assert source.read_bytes() == before

    @pytest.mark.parametrize("asked", [{"overwrite": True}, {"target_exists": True}])
    def test_a_source_is_never_its_own_target(
        self, asked: dict[str, bool], mixed: Path, tmp_path: Path
    ) -> None:
        before = mixed.read_bytes()
        (tmp_path / "link.raw").symlink_to(mixed)
        with pytest.raises(underlay.ConflictError, match="is read and would be overwritten"):
            convert(mixed, tmp_path / "link.raw", lock=False, **asked)  # type: ignore[arg-type]
        assert mixed.read_bytes() == before

    def test_nor_is_an_image_below_a_source(self, make: Make, mixed: Path) -> None:
        before = mixed.read_bytes()
        top = make("top.qcow2", "qcow2", "8M", backing=mixed)
        with pytest.raises(underlay.ConflictError):
            convert(top, mixed, overwrite=True, gate=PERMISSIVE, lock=False)
        assert mixed.read_bytes() == before


def test_any_storage_is_source_and_target(mixed: Path) -> None:
    convert(mixed, "memory:convert-test")
    convert("memory:convert-test", "memory:convert-test-2")
    with underlay.open_image("memory:convert-test-2", format="raw") as disk:
        assert disk.read_bytes(0, disk.size) == mixed.read_bytes()


def test_part_of_a_disk_is_a_source_too(mixed: Path, tmp_path: Path) -> None:
    with underlay.open_any(mixed) as disk:
        convert(disk.slice(100_000, 3_000_000), tmp_path / "part.raw")
        assert disk.read_bytes(0, 1) == mixed.read_bytes()[:1]
    assert (tmp_path / "part.raw").read_bytes() == mixed.read_bytes()[100_000:3_100_000]


def test_progress_rises_from_nothing_to_all_in_the_callers_thread(
    mixed: Path, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    threads: set[int] = set()

    def note(progress: Progress) -> None:
        seen.append(progress)
        threads.add(threading.get_ident())

    convert(mixed, tmp_path / "out.raw", progress=note)
    total = mixed.stat().st_size
    assert seen[0] == Progress(0, total)
    assert seen[-1] == Progress(total, total)
    assert [each.done for each in seen] == sorted(each.done for each in seen)
    assert threads == {threading.get_ident()}


def test_an_executor_of_the_callers_is_used_and_stays_usable(mixed: Path, tmp_path: Path) -> None:
    submitted: list[object] = []

    class Watched(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            submitted.append(fn)
            return super().submit(fn, *args, **kwargs)

    with Watched(2) as executor:
        convert(mixed, tmp_path / "out.raw", executor=executor)
        assert submitted
        assert executor.submit(len, "abc").result() == 3
    assert same(mixed, tmp_path / "out.raw")
