"""Images that the real QEMU makes, once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .ends import Ends
from .images import Image

Tool = Callable[..., str]
#: Makes an image: ``make(options, size, *writes)``, with the commands of qemu-io.
Maker = Callable[..., Image]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, qemu_img: Tool, qemu_io: Tool) -> Maker:
    """Make an image with QEMU's tools; the same one again is only copied."""
    folder = tmp_path_factory.mktemp("qcow2")
    made: dict[tuple[str, ...], Image] = {}

    def maker(options: str = "compat=1.1", size: str = "4M", *commands: str) -> Image:
        key = (options, size, *commands)
        if key not in made:
            path = folder / f"{len(made)}.qcow2"
            qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, size)
            if commands:
                said = qemu_io("-f", "qcow2", *(f"-c{command}" for command in commands), path)
                assert "failed" not in said, said
            made[key] = Image.load(path)
        return made[key].copy()

    return maker


@pytest.fixture
def plain(make: Maker) -> Image:
    """64 KiB clusters: 0 and 1 hold data, 2 is zero, 3 is compressed, the rest is nowhere."""
    return make(
        "compat=1.1",
        "4M",
        "write -P 0x11 0 64k",
        "write -P 0x22 64k 64k",
        "write -z 128k 64k",
        "write -c -P 0x44 192k 64k",
    )


@pytest.fixture
def extended(make: Maker) -> Image:
    """Subclusters of 2 KiB: some of cluster 0 hold data, some read as zeroes."""
    return make("extended_l2=on", "4M", "write -P 0x11 0 8k", "write -z 16k 4k")


@pytest.fixture
def with_data_file(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Data in a file of its own: cluster 0 and 2."""
    data = tmp_path_factory.getbasetemp() / "data.raw"
    return make(f"data_file={data}", "4M", "write -P 0x11 0 64k", "write -P 0x33 128k 64k")


@pytest.fixture(scope="session")
def snapshots_once(
    tmp_path_factory: pytest.TempPathFactory, qemu_img: Tool, qemu_io: Tool
) -> Image:
    path = tmp_path_factory.mktemp("qcow2") / "snapshots.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io("-f", "qcow2", "-c", "write -P 0x11 0 64k", path)
    qemu_img("snapshot", "-c", "first", path)
    qemu_img("resize", "-q", "-f", "qcow2", path, "2M")
    qemu_io("-f", "qcow2", "-c", "write -P 0x22 0 64k", path)
    qemu_img("snapshot", "-c", "second", path)
    qemu_io("-f", "qcow2", "-c", "write -P 0x33 0 64k", path)
    return Image.load(path)


@pytest.fixture
def snapshotted(snapshots_once: Image) -> Image:
    """A snapshot "first" with 0x11 at 0, then growth, 0x22 there, and a snapshot "second"."""
    return snapshots_once.copy()


@pytest.fixture
def bitmapped(tmp_path_factory: pytest.TempPathFactory, qemu_img: Tool, qemu_io: Tool) -> Image:
    """A bitmap "dirty" in which something is recorded, and an empty one."""
    path = tmp_path_factory.mktemp("qcow2") / "bitmaps.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    qemu_img("bitmap", "--add", path, "dirty")
    qemu_img("bitmap", "--add", "-g", "512", path, "fine")
    qemu_io("-f", "qcow2", "-c", "write -P 0x11 1M 64k", path)
    return Image.load(path)


@pytest.fixture
def ends(tmp_path: Path, qemu_img: Tool, qemu_io: Tool) -> Ends:
    """An image file that QEMU and we change in turn."""
    return Ends(tmp_path, qemu_img, qemu_io)
