"""Memory does not grow with the image."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Tool = Callable[..., str]

_BAR = 160 << 20

# Not getrusage(): what it tells is no less than the parent had before the child was started.
_PEAK = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""

_CONVERT = """
import sys
from underlay.jobs import convert
convert(sys.argv[1], sys.argv[2], parallel=int(sys.argv[3]))
"""
_COMPRESS = """
import sys
from underlay.jobs import convert
convert(
    sys.argv[1],
    sys.argv[2],
    output_format="qcow2",
    options={"cluster_size": "2M"},
    compress=True,
    parallel=int(sys.argv[3]),
    overwrite=True,
)
"""
_DIGEST = """
import sys, underlay
from underlay.jobs import digest
with underlay.open_any(sys.argv[1]) as disk:
    digest(disk, parallel=int(sys.argv[3]))
"""
_COMPARE = """
import sys, underlay
from underlay.jobs import compare
with underlay.open_any(sys.argv[1]) as first, underlay.open_any(sys.argv[2]) as second:
    assert compare(first, second, parallel=int(sys.argv[3])).identical
"""


def _peak(program: str, first: Path, second: Path, parallel: int) -> int:
    """The peak resident memory of a child that does it, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", program + _PEAK, first, second, str(parallel)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) * 1024


def _write(path: Path, size: int) -> None:
    """A sixth of it data, half of which compresses, in runs of 1 MiB."""
    block = bytes(range(256)) * 4096
    with path.open("wb") as file:
        file.truncate(size)
        for number, at in enumerate(range(0, size, 6 << 20)):
            file.seek(at)
            file.write(block if number % 2 else (b"%08d" % number) * (1 << 17))


@pytest.mark.slow
def test_convert_and_compare_need_the_same_memory_for_a_large_image_as_for_a_small_one(
    tmp_path: Path, qemu_img: Tool
) -> None:
    peaks: dict[tuple[str, str], int] = {}
    for size, name in ((64 << 20, "small"), (1 << 30, "large")):
        raw = tmp_path / f"{name}.raw"
        _write(raw, size)
        for kind, how in (("plain", []), ("zstd", ["-c", "-o", "compression_type=zstd"])):
            image, out = tmp_path / f"{name}.{kind}.qcow2", tmp_path / "out.raw"
            qemu_img("convert", "-O", "qcow2", *how, raw, image)
            peaks[kind, name] = _peak(_CONVERT, image, out, 4)
            peaks[kind + " compare", name] = _peak(_COMPARE, image, raw, 4)
            out.unlink()
    for (kind, name), peak in peaks.items():
        assert peak < _BAR, (kind, name)
        if name == "large":
            # numpy, which is for large images, is part of it.
            assert peak - peaks[kind, "small"] < 48 << 20, kind


def test_the_largest_clusters_and_the_most_threads_stay_below_the_bar(
    tmp_path: Path, qemu_img: Tool
) -> None:
    _write(tmp_path / "a.raw", 128 << 20)
    how = ["-c", "-o", "cluster_size=2M"]
    qemu_img("convert", "-O", "qcow2", *how, tmp_path / "a.raw", tmp_path / "a.qcow2")
    assert _peak(_CONVERT, tmp_path / "a.qcow2", tmp_path / "out.raw", 16) < _BAR
    assert _peak(_COMPARE, tmp_path / "a.qcow2", tmp_path / "a.raw", 16) < _BAR
    assert _peak(_COMPRESS, tmp_path / "a.qcow2", tmp_path / "b.qcow2", 16) < _BAR
    assert _peak(_COMPRESS, tmp_path / "a.raw", tmp_path / "b.qcow2", 16) < _BAR
    assert _peak(_DIGEST, tmp_path / "a.qcow2", tmp_path / "b.qcow2", 16) < _BAR
