"""A convert that fails or is cancelled: what is said, and what is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay
from underlay.jobs import Progress, convert
from underlay.storage import ReadBuffers, WriteBuffers
from underlay_storage.file import FileStorage

from .files import write_mixed

Tool = Callable[..., str]


@pytest.fixture
def compressed(mixed: Path, tmp_path: Path, qemu_img: Tool) -> Path:
    """A compressed image of which a cluster in the middle does not decode."""
    path = tmp_path / "damaged.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", mixed, path)
    with underlay.open_any(path) as disk:
        special = next(
            extent
            for extent in disk.extents(4 << 20)
            if isinstance(extent.mapping, underlay.Special)
        )
    assert isinstance(special.mapping, underlay.Special)
    with path.open("r+b") as file:
        file.seek(special.mapping.offset)
        file.write(b"\xff" * 300)
    return path


def test_damage_is_named_by_its_offset_and_leaves_no_target(
    compressed: Path, tmp_path: Path
) -> None:
    with pytest.raises(underlay.CorruptImageError) as caught:
        convert(compressed, tmp_path / "out.raw")
    assert caught.value.offset
    assert f"host offset {caught.value.offset}" in str(caught.value)
    assert "guest offset" in str(caught.value)
    assert not (tmp_path / "out.raw").exists()


def test_damaged_tables_leave_no_target(mixed: Path, tmp_path: Path, qemu_img: Tool) -> None:
    path = tmp_path / "damaged.qcow2"
    qemu_img("convert", "-O", "qcow2", "-o", "cluster_size=4k", mixed, path)
    with path.open("r+b") as file:
        file.seek(40)
        l1 = int.from_bytes(file.read(8), "big")
        file.seek(l1 + 8)
        file.write(b"\x80\0\0\0\0\0\x10\x01")  # not on a cluster's border
    with pytest.raises(underlay.CorruptImageError, match="guest offset"):
        convert(path, tmp_path / "out.raw")
    assert not (tmp_path / "out.raw").exists()


def test_a_target_that_was_there_stays(compressed: Path, tmp_path: Path) -> None:
    for asked in ({"overwrite": True}, {"target_exists": True}):
        (tmp_path / "out.raw").write_bytes(bytes(12 << 20))
        with pytest.raises(underlay.CorruptImageError):
            convert(compressed, tmp_path / "out.raw", **asked)  # type: ignore[arg-type]
        assert (tmp_path / "out.raw").exists()


def test_a_source_that_cannot_be_opened_creates_no_target(tmp_path: Path) -> None:
    with pytest.raises(underlay.StorageNotFoundError):
        convert(tmp_path / "none.qcow2", tmp_path / "out.raw")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_and_leaves_no_target(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    real = FileStorage.writev

    def full(self: FileStorage, buffers: WriteBuffers, offset: int) -> None:
        writes.append(offset)
        if len(writes) > 3:
            raise underlay.StorageError("No space left on device", errno=errno.ENOSPC)
        real(self, buffers, offset)

    monkeypatch.setattr(FileStorage, "writev", full)
    with pytest.raises(underlay.StorageError) as caught:
        convert(mixed, tmp_path / "out.raw")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "out.raw").exists()


class _Failing(underlay.BlockingStorage):
    """A disk that cannot be read from some offset on."""

    def __init__(self, size: int, good: int) -> None:
        self._size = size
        self._good = good

    def size(self) -> int:
        return self._size

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        if offset + sum(map(len, buffers)) > self._good:
            raise underlay.StorageError(f"Could not read at {offset}: broken", errno=errno.EIO)
        for buffer in buffers:
            buffer[:] = b"\1" * len(buffer)


def test_a_read_error_says_at_which_guest_offset(tmp_path: Path) -> None:
    with (
        underlay.open_image(_Failing(4 << 20, 3 << 20), format="raw") as disk,
        pytest.raises(underlay.StorageError, match=rf"guest offset {3 << 20}\b"),
    ):
        convert(disk, tmp_path / "out.raw")
    assert not (tmp_path / "out.raw").exists()


class _Cancel(Exception):  # noqa: N818 - what a program raises is its own business
    pass


def test_an_exception_in_the_callback_stops_everything_and_comes_through(
    tmp_path: Path, qemu_img: Tool
) -> None:
    source = write_mixed(tmp_path / "big.raw", size=64 << 20)
    threads = threading.active_count()
    calls: list[Progress] = []

    def cancel(progress: Progress) -> None:
        calls.append(progress)
        if progress.done:
            raise _Cancel

    with underlay.open_any(source) as disk:
        with pytest.raises(_Cancel):
            convert(disk, tmp_path / "out.raw", progress=cancel)
        assert len(calls) == 2
        assert threading.active_count() == threads
        assert not (tmp_path / "out.raw").exists()
        # The source is as usable as before.
        convert(disk, tmp_path / "out.raw")
    qemu_img("compare", "-f", "raw", "-F", "raw", source, tmp_path / "out.raw")


#: Once it has begun to write, it takes minutes.
_SLOW = """
import sys, time, underlay
from underlay.jobs import convert

def slowly(progress):
    print(progress.done, flush=True)
    if progress.done:
        time.sleep(100)

try:
    convert(sys.argv[1], sys.argv[2], progress=slowly)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write_mixed(tmp_path / "big.raw", size=64 << 20)
    target = tmp_path / "out.raw"
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _SLOW, source, target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        while int(child.stdout.readline()) == 0:
            pass
        assert target.exists()
        os.kill(child.pid, signal.SIGINT)
        output, errors = child.communicate(timeout=60)
    assert output.splitlines()[-1] == "interrupted"
    assert errors == ""
    assert child.returncode == 0
    assert not target.exists()
