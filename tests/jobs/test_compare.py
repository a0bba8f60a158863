"""compare's verdicts are qemu-img's, in exit status and words."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay
from underlay.jobs import ComparisonResult, Difference, Progress, compare
from underlay.storage import ReadBuffers

from .conftest import Make

Tool = Callable[..., str]

PERMISSIVE = underlay.PermissiveImplicitOpenGate()
FULL, ENDS = "write -P 1 0 1M", ("write -P 1 0 64k", "write -P 2 512k 64k")


def ours(first: Path, second: Path, *, strict: bool = False) -> ComparisonResult:
    formats = [path.suffix[1:] for path in (first, second)]
    with (
        underlay.open_image(first, format=formats[0], gate=PERMISSIVE) as one,
        underlay.open_image(second, format=formats[1], gate=PERMISSIVE) as other,
    ):
        return compare(one, other, strict=strict)


def qemus(first: Path, second: Path, *, strict: bool = False) -> tuple[int, list[str]]:
    formats = ["-f", first.suffix[1:], "-F", second.suffix[1:]]
    done = subprocess.run(
        ["qemu-img", "compare", "-U", *(["-s"] if strict else []), *formats, first, second],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


def test_every_pair_of_many_images_gets_qemus_verdict(make: Make, qemu_img: Tool) -> None:
    images = [
        make("empty.raw", "raw", "1M"),
        make("full.raw", "raw", "1M", FULL),
        make("ends.raw", "raw", "1M", *ENDS),
        make("small.raw", "raw", "1M", "write -P 1 0 4k"),
        make("empty.qcow2", "qcow2", "1M"),
        make("full.qcow2", "qcow2", "1M", FULL),
        make("torn.qcow2", "qcow2", "1M", "write -P 1 512k 512k", "write -P 1 0 512k"),
        make("ends.qcow2", "qcow2", "1M", *ENDS),
        make("zero.qcow2", "qcow2", "1M", "write -z 0 1M"),
        make("mixed.qcow2", "qcow2", "1M", *ENDS, "write -z 64k 64k"),
        make("fine.qcow2", "qcow2", "1M", *ENDS, options="cluster_size=4k"),
        make("longer.qcow2", "qcow2", "1500k", *ENDS),
        make("tail.qcow2", "qcow2", "1500k", *ENDS, "write -P 1 1400k 4k"),
        make("prepared.qcow2", "qcow2", "1M", options="preallocation=metadata"),
    ]
    images.append(images[0].with_name("packed.qcow2"))
    qemu_img("convert", "-c", "-O", "qcow2", images[2], images[-1])
    images.append(make("overlay.qcow2", "qcow2", "1M", "write -P 3 1000k 1k", backing=images[7]))
    pairs = list(itertools.combinations(images, 2)) + [(image, image) for image in images[:4]]
    for number, pair in enumerate(pairs):
        # Both orders and both modes, but not all four of each pair.
        first, second = reversed(pair) if number % 2 else pair
        strict = number % 4 < 2
        status, lines = qemus(first, second, strict=strict)
        got = ours(first, second, strict=strict)
        assert (int(not got.identical), list(got.lines)) == (status, lines), (first, second, strict)


@pytest.mark.parametrize("at", [0, 5, 511, 512, 66049, 700_000, (1 << 20) - 1])
def test_the_offset_is_that_of_the_sector(at: int, tmp_path: Path, qemu_img: Tool) -> None:
    content = bytes(range(256)) * 4096
    changed = bytearray(content)
    changed[at] ^= 1
    (tmp_path / "a.raw").write_bytes(content)
    (tmp_path / "b.raw").write_bytes(changed)
    assert qemus(tmp_path / "a.raw", tmp_path / "b.raw")[0] == 1
    result = ours(tmp_path / "a.raw", tmp_path / "b.raw")
    assert (result.difference, result.offset) == (Difference.CONTENT, at & -512)
    assert list(result.lines) == qemus(tmp_path / "a.raw", tmp_path / "b.raw")[1]


def test_the_first_of_many_differences_is_found(tmp_path: Path, qemu_img: Tool) -> None:
    size = 32 << 20
    (tmp_path / "a.raw").write_bytes(b"\1" * size)
    with (tmp_path / "b.raw").open("wb") as file:
        file.write(b"\1" * size)
        for at in range(10_000_000, size, 100_000):
            file.seek(at)
            file.write(b"\2")
    for _ in range(5):
        assert ours(tmp_path / "a.raw", tmp_path / "b.raw").offset == 10_000_000 & -512


@pytest.mark.parametrize(("short", "long"), [(900, 1000), (900, 1024), (1000, 1025), (0, 1)])
def test_sizes_count_in_sectors(short: int, long: int, tmp_path: Path, qemu_img: Tool) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(short))
    (tmp_path / "b.raw").write_bytes(bytes(long))
    for strict in (False, True):
        status, lines = qemus(tmp_path / "a.raw", tmp_path / "b.raw", strict=strict)
        result = ours(tmp_path / "a.raw", tmp_path / "b.raw", strict=strict)
        assert (int(not result.identical), list(result.lines)) == (status, lines)


class _Counting(underlay.BlockingStorage):
    def __init__(self, content: bytes, broken: int | None = None) -> None:
        self._content = content
        self._broken = len(content) if broken is None else broken
        self.bytes_read = 0

    def size(self) -> int:
        return len(self._content)

    def identity(self) -> int:
        return id(self)

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        for buffer in buffers:
            if offset + len(buffer) > self._broken:
                raise underlay.StorageError(f"cannot read {len(buffer)} at {offset}")
            self.bytes_read += len(buffer)
            buffer[:] = self._content[offset : offset + len(buffer)]
            offset += len(buffer)


def test_what_lies_at_the_same_place_is_not_read() -> None:
    storage = _Counting(b"\5" * (1 << 20))
    with (
        underlay.open_image(storage, format="raw") as first,
        underlay.open_image(storage, format="raw") as second,
    ):
        assert compare(first, second).identical
    assert storage.bytes_read == 0


def test_errors_tell_which_step_failed(tmp_path: Path, make: Make) -> None:
    good = make("good.raw", "raw", "4M", "write -P 5 0 4M")
    with underlay.open_image(good, format="raw") as disk:
        broken = _Counting(b"\5" * (4 << 20), broken=3 << 20)
        with underlay.open_image(broken, format="raw") as other:
            with pytest.raises(underlay.StorageError) as caught:
                compare(disk, other)
            assert caught.value.step == "read"
            # The disks stay usable.
            assert other.read_bytes(0, 1) == b"\5"
    damaged = make("damaged.qcow2", "qcow2", "4M", "write -P 5 0 4M", options="cluster_size=4k")
    with damaged.open("r+b") as file:
        file.seek(40)
        l1 = int.from_bytes(file.read(8), "big")
        file.seek(l1 + 8)
        file.write(b"\x80\0\0\0\0\0\x10\x01")
    with (
        underlay.open_image(good, format="raw") as disk,
        underlay.open_any(damaged) as other,
        pytest.raises(underlay.CorruptImageError) as damage,
    ):
        compare(disk, other)
    assert damage.value.step == "map"


def test_a_difference_before_an_unreadable_place_is_the_verdict() -> None:
    storages = _Counting(b"\5" * (4 << 20), broken=3 << 20), _Counting(b"\6" * (4 << 20))
    with (
        underlay.open_image(storages[0], format="raw") as first,
        underlay.open_image(storages[1], format="raw") as second,
    ):
        assert compare(first, second).offset == 0


def test_progress_ends_at_the_longer_size(make: Make) -> None:
    seen: list[Progress] = []
    with (
        underlay.open_any(make("a.qcow2", "qcow2", "1M", "write -P 1 0 1M")) as first,
        underlay.open_any(make("b.qcow2", "qcow2", "3M", "write -P 1 0 1M")) as second,
    ):
        compare(first, second, progress=seen.append)
    assert seen[0] == Progress(0, 3 << 20)
    assert seen[-1] == Progress(3 << 20, 3 << 20)


def test_a_callback_can_cancel(make: Make) -> None:
    def cancel(progress: Progress) -> None:
        raise ZeroDivisionError

    with (
        underlay.open_any(make("a.raw", "raw", "1M", FULL), writable=True) as first,
        underlay.open_any(make("b.raw", "raw", "1M", FULL)) as second,
    ):
        with pytest.raises(ZeroDivisionError):
            compare(first, second, progress=cancel)
        assert compare(first, second).identical
