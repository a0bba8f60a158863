"""Overlays, rates, salvage, offloading and bitmaps: as qemu-img convert does them."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay
from underlay.jobs import Unreadable, add_bitmap, bitmaps, convert, dirty_ranges
from underlay.storage import ReadBuffers

from .conftest import Make
from .files import same, write_mixed

Tool = Callable[..., str]

PERMISSIVE = underlay.PermissiveImplicitOpenGate()


@pytest.fixture
def chain(make: Make) -> Path:
    """Three images; the top one is longer than what it lies upon."""
    base = make("base.qcow2", "qcow2", "1M", "write -P 1 0 256k")
    middle = make("middle.qcow2", "qcow2", "1M", "write -P 2 64k 64k", backing=base)
    return make(
        "top.qcow2",
        "qcow2",
        "2M",
        "write -P 3 128k 64k",
        "write -z 512k 64k",
        "write -P 0 640k 64k",
        "write -P 5 704k 4k",
        "write -z 1536k 64k",
        "write -P 6 1984k 64k",
        backing=middle,
    )


class TestOverABackingImage:
    @pytest.mark.parametrize("flags", ["", "-c", "-S 0", "-S 64k", "-c -S 0"])
    def test_what_the_top_image_leaves_open_is_left_open(
        self, flags: str, chain: Path, tmp_path: Path, qemu_img: Tool
    ) -> None:
        common = ["-B", "base.qcow2", "-F", "qcow2", chain]
        qemu_img("convert", *flags.split(), "-O", "qcow2", *common, tmp_path / "qemu.qcow2")
        convert(
            chain,
            tmp_path / "ours.qcow2",
            output_format="qcow2",
            options={"backing_file": "base.qcow2", "backing_fmt": "qcow2"},
            compress="-c" in flags,
            sparse_size={"": 4096, "-c": 4096, "-S 64k": 65536}.get(flags, 0),
            gate=PERMISSIVE,
        )
        maps = [qemu_img("map", "--output=json", tmp_path / f"{n}.qcow2") for n in ("qemu", "ours")]
        assert _without_offsets(maps[0]) == _without_offsets(maps[1])
        qemu_img("compare", tmp_path / "qemu.qcow2", tmp_path / "ours.qcow2")
        qemu_img("check", tmp_path / "ours.qcow2")

    def test_an_overlay_that_exists_gets_the_same(
        self, chain: Path, tmp_path: Path, qemu_img: Tool
    ) -> None:
        for name in ("qemu", "ours"):
            qemu_img(
                "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2",
                tmp_path / f"{name}.qcow2", "2M",
            )  # fmt: skip
        qemu_img(
            "convert", "-n", "-B", "base.qcow2", "-F", "qcow2", "-O", "qcow2", chain,
            tmp_path / "qemu.qcow2",
        )  # fmt: skip
        convert(
            chain,
            tmp_path / "ours.qcow2",
            output_format="qcow2",
            target_exists=True,
            over_backing=True,
            gate=PERMISSIVE,
        )
        qemu_img("compare", tmp_path / "qemu.qcow2", tmp_path / "ours.qcow2")

    def test_without_a_word_of_it_the_overlay_gets_everything(
        self, chain: Path, tmp_path: Path, qemu_img: Tool, make: Make
    ) -> None:
        target = make("t.qcow2", "qcow2", "2M", backing=tmp_path / "base.qcow2")
        convert(chain, target, output_format="qcow2", target_exists=True, gate=PERMISSIVE)
        qemu_img("compare", chain, target)

    def test_only_one_source_makes_sense(self, chain: Path, tmp_path: Path) -> None:
        options = {"backing_file": "base.qcow2", "backing_fmt": "qcow2"}
        with pytest.raises(ValueError, match="one source"):
            convert([chain, chain], tmp_path / "o.qcow2", output_format="qcow2", options=options)
        assert not (tmp_path / "o.qcow2").exists()


def _without_offsets(listing: str) -> list[str]:
    return [line.split(', "offset"')[0] for line in listing.splitlines()]


def test_a_target_that_is_zero_is_not_zeroed_again(make: Make, tmp_path: Path) -> None:
    source = make("s.qcow2", "qcow2", "4M", "write -P 1 1M 64k")
    (tmp_path / "t.raw").write_bytes(b"x" * (4 << 20))
    # As told: it is the caller's fault if it is not true.
    convert(source, tmp_path / "t.raw", target_exists=True, target_is_zero=True)
    assert (tmp_path / "t.raw").read_bytes()[:4096] == b"x" * 4096


def test_offloading_copies_what_is_no_hole(mixed: Path, tmp_path: Path) -> None:
    convert(mixed, tmp_path / "out.raw", offload=True)
    assert same(mixed, tmp_path / "out.raw")
    convert(mixed, tmp_path / "out.qcow2", offload=True, output_format="qcow2")
    with underlay.open_any(tmp_path / "out.qcow2") as disk:
        assert disk.read_bytes(0, disk.size) == mixed.read_bytes()


class TestRate:
    def test_takes_its_time(self, tmp_path: Path) -> None:
        (tmp_path / "s.raw").write_bytes(b"r" * (3 << 20))
        started = time.monotonic()
        convert(tmp_path / "s.raw", tmp_path / "t.raw", rate=6 << 20)
        assert time.monotonic() - started > 0.3
        assert same(tmp_path / "s.raw", tmp_path / "t.raw")

    def test_does_not_keep_a_cancelled_job(self, tmp_path: Path) -> None:
        calls: list[object] = []

        def cancel(progress: object) -> None:
            calls.append(progress)
            if len(calls) > 1:
                raise KeyboardInterrupt

        started = time.monotonic()
        with (
            underlay.open_image(_Ones(8 << 30), format="raw") as disk,
            pytest.raises(KeyboardInterrupt),
        ):
            convert(disk, tmp_path / "t.raw", rate=16 << 20, progress=cancel)
        assert time.monotonic() - started < 60  # to its end it would go on for minutes
        assert not (tmp_path / "t.raw").exists()


class _Ones(underlay.BlockingStorage):
    """A disk of ones."""

    def __init__(self, length: int = 1 << 20) -> None:
        self._length = length

    def size(self) -> int:
        return self._length

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        for buffer in buffers:
            buffer[:] = b"\1" * len(buffer)


class _Broken(_Ones):
    """It has two sectors that cannot be read."""

    bad = (5 * 512, 300 * 512)

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        end = offset + sum(map(len, buffers))
        if any(offset < bad + 512 and bad < end for bad in self.bad):
            raise underlay.StorageError(f"Could not read at {offset}: broken", errno=errno.EIO)
        super().readv(buffers, offset)


class TestSalvage:
    def test_of_plain_data_sectors_are_lost(self, tmp_path: Path) -> None:
        lost: list[Unreadable] = []
        with underlay.open_image(_Broken(), format="raw") as disk:
            convert(disk, tmp_path / "out.raw", salvage=lost.append)
        assert sorted((each.start, each.length) for each in lost) == [
            (bad, 512) for bad in _Broken.bad
        ]
        assert not any(each.unmapped for each in lost)
        expected = bytearray(b"\1" * (1 << 20))
        for bad in _Broken.bad:
            expected[bad : bad + 512] = bytes(512)
        assert (tmp_path / "out.raw").read_bytes() == expected

    @pytest.mark.parametrize("compress", [False, True])
    def test_of_compressed_data_a_cluster_is_lost(
        self, compress: bool, tmp_path: Path, qemu_img: Tool
    ) -> None:
        source = write_mixed(tmp_path / "s.raw", size=4 << 20)
        convert(source, tmp_path / "c.qcow2", output_format="qcow2", compress=True)
        with underlay.open_any(tmp_path / "c.qcow2") as disk:
            bad = next(e for e in disk.extents() if isinstance(e.mapping, underlay.Special))
        assert isinstance(bad.mapping, underlay.Special)
        with (tmp_path / "c.qcow2").open("r+b") as file:
            file.seek(bad.mapping.offset)
            file.write(b"\xff" * 200)
        lost: list[Unreadable] = []
        convert(
            tmp_path / "c.qcow2",
            tmp_path / "o.qcow2",
            output_format="qcow2",
            compress=compress,
            salvage=lost.append,
        )
        assert sum(each.length for each in lost) == 65536
        assert {each.start & -65536 for each in lost} == {bad.start & -65536}
        expected = bytearray(source.read_bytes())
        at = bad.start & -65536
        expected[at : at + 65536] = bytes(65536)
        with underlay.open_any(tmp_path / "o.qcow2") as disk:
            assert disk.read_bytes(0, disk.size) == expected

    def test_what_shows_through_within_a_unit_may_be_lost_too(
        self, make: Make, tmp_path: Path
    ) -> None:
        (tmp_path / "base.raw").write_bytes(b"\1" * (1 << 20))
        top = make(
            "top.qcow2",
            "qcow2",
            "1M",
            *(f"write -P 2 {bad & -65536} 512" for bad in _Broken.bad),
            options="cluster_size=512",
            backing=tmp_path / "base.raw",
        )
        lost: list[Unreadable] = []
        with (
            underlay.open_image(_Broken(), format="raw") as below,
            underlay.open_image(top, format="qcow2", backing=below) as disk,
        ):
            convert(
                disk,
                tmp_path / "out.qcow2",
                output_format="qcow2",
                options={"backing_file": "base.raw", "backing_fmt": "raw"},
                compress=True,
                salvage=lost.append,
            )
        assert {each.start for each in lost} == set(_Broken.bad)
        with underlay.open_any(tmp_path / "out.qcow2", gate=PERMISSIVE) as disk:
            for bad in _Broken.bad:
                assert disk.read_bytes(bad, 512) == bytes(512)

    def test_of_damaged_tables_what_they_led_to_is_lost(self, make: Make, tmp_path: Path) -> None:
        path = make("s.qcow2", "qcow2", "1M", "write -P 1 0 1M", options="cluster_size=4k")
        with path.open("r+b") as file:
            file.seek(40)
            l1 = int.from_bytes(file.read(8), "big")
            file.seek(l1)
            l2 = int.from_bytes(file.read(8), "big") & 0x00FFFFFFFFFFFE00
            file.seek(l2 + 10 * 8)
            file.write(b"\x80\0\0\0\0\0\x12\0")
        with pytest.raises(underlay.CorruptImageError):
            convert(path, tmp_path / "none.raw")
        lost: list[Unreadable] = []
        convert(path, tmp_path / "out.raw", salvage=lost.append)
        assert [(each.start, each.unmapped) for each in lost] == [
            (10 * 4096 + at, True) for at in range(0, 4096, 512)
        ]
        content = (tmp_path / "out.raw").read_bytes()
        assert content == b"\1" * 40960 + bytes(4096) + b"\1" * ((1 << 20) - 45056)


class TestBitmaps:
    @pytest.fixture
    def dirty(self, make: Make, qemu_img: Tool, qemu_io: Tool) -> Path:
        path = make("dirty.qcow2", "qcow2", "4M", "write -P 1 0 64k")
        qemu_img("bitmap", "--add", path, "one")
        qemu_img("bitmap", "--add", "-g", "32k", path, "two")
        qemu_io("-c", "write -P 2 1M 100k", path)
        qemu_img("bitmap", "--disable", path, "two")
        return path

    def test_are_copied_with_what_they_say(
        self, dirty: Path, tmp_path: Path, qemu_img: Tool
    ) -> None:
        convert(dirty, tmp_path / "out.qcow2", output_format="qcow2", bitmaps=True)
        assert bitmaps(tmp_path / "out.qcow2") == bitmaps(dirty)
        for name in ("one", "two"):
            assert list(dirty_ranges(tmp_path / "out.qcow2", name)) == list(
                dirty_ranges(dirty, name)
            )
        qemu_img("check", tmp_path / "out.qcow2")

    def test_are_left_where_nobody_asks_for_them(self, dirty: Path, tmp_path: Path) -> None:
        convert(dirty, tmp_path / "out.qcow2", output_format="qcow2")
        assert bitmaps(tmp_path / "out.qcow2") == []

    def test_need_formats_that_have_them(self, dirty: Path, mixed: Path, tmp_path: Path) -> None:
        with pytest.raises(underlay.UnsupportedOperationError, match="'raw'"):
            convert(dirty, tmp_path / "out.raw", bitmaps=True)
        with pytest.raises(underlay.UnsupportedOperationError, match="Source"):
            convert(mixed, tmp_path / "out.qcow2", output_format="qcow2", bitmaps=True)
        with pytest.raises(underlay.UnsupportedOperationError, match="bitmaps"):
            convert(
                dirty,
                tmp_path / "out.qcow2",
                output_format="qcow2",
                options={"compat": "v2"},
                bitmaps=True,
            )
        assert {path.name for path in tmp_path.iterdir()} == {"dirty.qcow2", "mixed.raw"}

    def test_one_that_is_there_already_is_a_conflict(self, dirty: Path, make: Make) -> None:
        target = make("t.qcow2", "qcow2", "4M")
        add_bitmap(target, "two")
        with pytest.raises(underlay.ConflictError, match="two"):
            convert(dirty, target, output_format="qcow2", target_exists=True, bitmaps=True)
