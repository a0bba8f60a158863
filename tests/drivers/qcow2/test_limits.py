"""Every number in an image that decides about memory or time: at its limit, and one past it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

import underlay
from underlay import jobs
from underlay.errors import LimitExceededError
from underlay.face import run_blocking
from underlay.limits import Limits
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.snapshots import SnapshotEntry
from underlay_storage.memory import MemoryStorage

from .conftest import Maker
from .images import Image, open_bytes, read

Tool = Callable[..., str]
Use = Callable[[Image, Limits], object]


def _opened(image: Image, limits: Limits) -> None:
    with open_bytes(image.data, limits=limits):
        pass


def _checked(image: Image, limits: Limits) -> None:
    jobs.check(MemoryStorage(bytes(image.data)), limits=limits)


def _written(image: Image, limits: Limits) -> None:
    with underlay.open_any(MemoryStorage(bytes(image.data)), writable=True, limits=limits) as disk:
        disk.write(b"x", (2 << 20) + (16 << 10))
        disk.flush()


def _snapshots(image: Image, limits: Limits) -> None:
    with open_bytes(image.data, limits=limits) as disk:
        run_blocking(disk.snapshots())


def _at_snapshot(image: Image, limits: Limits) -> None:
    storage = MemoryStorage(bytes(image.data))
    underlay.open_image(storage, format="qcow2", snapshot="first", limits=limits).close()


def _bitmaps(image: Image, limits: Limits) -> None:
    jobs.bitmaps(MemoryStorage(bytes(image.data)), limits=limits)


def _compressed_read(image: Image, limits: Limits) -> None:
    with open_bytes(image.data, limits=limits) as disk:
        read(disk, 192 << 10, 1)


@attrs.frozen
class Case:
    """``value`` of ``limit`` is what ``use`` of the image takes, and not a byte less."""

    image: str
    limit: str
    value: int | Callable[[Image], int]
    use: Use
    #: In the error's message.
    about: str
    #: So that nothing else which the same attribute limits takes as much.
    edit: Callable[[Image], Any] | None = None


def _more_extensions(image: Image) -> None:
    image.extensions(*[(0x7000 + number, b"") for number in range(9)])


def _name_a_data_file(image: Image) -> None:
    image.extensions((layout.EXTENSION_DATA_FILE, b"data.raw"))


def _move_table(image: Image, pointer: int, clusters: int) -> None:
    """Let a table that is described at ``pointer`` (offset, entries) have so many clusters."""
    offset, entries = struct.unpack_from(">QI", image.data, pointer)
    table = image.add_cluster(bytes(image.data[offset : offset + 8 * entries]))
    for _ in range(clusters - 1):
        image.add_cluster()
    image.put(pointer, "QI", table, clusters * image.cluster // 8)


def _long_l1(image: Image) -> None:
    offset = image.header.l1_table_offset
    table = image.add_cluster(bytes(image.data[offset : offset + 8 * image.header.l1_size]))
    image.add_cluster()
    image.put(36, "IQ", 2 * image.cluster // 8, table)


def _long_snapshot_l1(image: Image) -> None:
    _move_table(image, image.header.snapshots_offset, 3)


def _long_bitmap_table(image: Image) -> None:
    _move_table(image, _directory(image)[0], 6)


def _directory(image: Image) -> tuple[int, int]:
    """Where the bitmap directory is, and its bytes."""
    place = image.header.with_extensions(bytes(image.data))[0].bitmaps
    assert place is not None
    return place.directory_offset, place.directory_size


def _many_snapshots(image: Image) -> None:
    at = image.header.snapshots_offset
    entry, _ = SnapshotEntry.unpack(bytes(image.data), at)
    assert entry is not None
    image.put(60, "IQ", 3000, image.add_cluster(entry.pack() * 3000))


def _snapshot_table_size(image: Image) -> int:
    count, at = (int(word) for word in struct.unpack_from(">IQ", image.data, 60))
    _, end = SnapshotEntry.unpack(bytes(image.data), at)
    return count * (end - at)


def _clusters(image: Image) -> int:
    return -(-len(image.data) // image.cluster)


def _count_beyond_a_byte(image: Image) -> None:
    last = _clusters(image) - 1
    block = image.word(image.header.refcount_table_offset + last // 256 * 8)
    image.put(block + last % 256 * 2, "H", 300)


CASES = {
    "virtual size": Case("plain", "virtual_size", 4 << 20, _opened, "virtual size"),
    "L1 table": Case("plain", "metadata", 128 << 10, _opened, "L1 table", _long_l1),
    "refcount table": Case("plain", "metadata", 64 << 10, _opened, "refcount table"),
    "header extensions": Case("plain", "entries", 9, _opened, "extensions", _more_extensions),
    "backing file's name": Case("overlaid", "name", 10, _opened, "name in the header"),
    "data file's name": Case("plain", "name", 8, _opened, "name in the header", _name_a_data_file),
    "snapshots": Case("snapshotted", "entries", 2, _opened, "snapshots"),
    "snapshot table": Case(
        "snapshotted", "metadata", _snapshot_table_size, _snapshots, "table", _many_snapshots
    ),
    "snapshot's name": Case("snapshotted", "name", 6, _snapshots, "snapshot 1"),
    "snapshot's L1 table": Case(
        "snapshotted", "metadata", 192 << 10, _at_snapshot, "L1 table", _long_snapshot_l1
    ),
    "snapshot's L1 table, checked": Case(
        "snapshotted", "metadata", 192 << 10, _checked, "L1 table", _long_snapshot_l1
    ),
    "bitmaps": Case("marked", "entries", 3, _opened, "bitmaps"),
    "bitmap directory": Case("marked", "metadata", lambda it: _directory(it)[1], _bitmaps, "dir"),
    "bitmap's name": Case("marked", "name", 900, _bitmaps, "bitmap 2"),
    "bitmap's table": Case(
        "marked", "metadata", 3 << 10, _checked, "bitmap table", _long_bitmap_table
    ),
    "decoded unit": Case("plain", "decoded_unit", 64 << 10, _compressed_read, "compressed"),
    "counting clusters": Case("filled", "metadata", _clusters, _checked, "counting its clusters"),
    "counting to 300": Case(
        "filled",
        "metadata",
        lambda image: 2 * _clusters(image),
        _checked,
        "counting its clusters",
        _count_beyond_a_byte,
    ),
    "counting L2 tables": Case("scattered", "metadata", 16 * 128, _checked, "counting its L2"),
    "remembering L2 tables": Case("scattered", "metadata", 96 * 128, _written, "remembered"),
}


@pytest.fixture
def marked(make: Maker, qemu_img: Tool, tmp_path: Path) -> Image:
    """Three bitmaps, whose names take more than any table."""
    path = tmp_path / "marked.qcow2"
    path.write_bytes(make("cluster_size=512", "1M").data)
    for name in ("a" * 800, "b" * 800, "c" * 900):
        qemu_img("bitmap", "--add", path, name)
    return Image.load(path)


@pytest.fixture
def filled(make: Maker) -> Image:
    """More clusters than any table has bytes."""
    return make("cluster_size=512", "4M", "write -P 1 0 1M")


@pytest.fixture
def scattered(make: Maker) -> Image:
    """A little in each of 128 L2 tables."""
    writes = [f"write -P 1 {at} 4k" for at in range(0, 4 << 20, 32 << 10)]
    return make("cluster_size=512", "4M", *writes)


@pytest.fixture
def overlaid(qemu_img: Tool, tmp_path: Path) -> Image:
    """An overlay of ``below.qcow`` (which is none)."""
    path = tmp_path / "top.qcow2"
    options = "backing_file=below.qcow,backing_fmt=raw"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-o", options, path, "4M")
    return Image.load(path)


@pytest.mark.parametrize("name", CASES)
def test_at_the_limit_and_one_past_it(name: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    image: Image = request.getfixturevalue(case.image).copy()
    if case.edit is not None:
        case.edit(image)
    value = case.value if isinstance(case.value, int) else case.value(image)
    case.use(image, Limits(**{case.limit: value}))
    with pytest.raises(LimitExceededError, match=case.about) as found:
        case.use(image, Limits(**{case.limit: value - 1}))
    error = found.value
    assert (error.limit, error.value, error.allowed) == (case.limit, value, value - 1)
    assert f"Limits({case.limit}=" in str(error)
