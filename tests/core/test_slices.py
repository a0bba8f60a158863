"""A part of a disk as a disk of its own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

import underlay
from underlay.gate import DirectoryGate
from underlay_storage.memory import MemoryStorage

from .toy_format import CLUSTER, pack

pytestmark = pytest.mark.usefixtures("toy")


@pytest.mark.parametrize(
    ("offset", "length", "fits"),
    [
        (0, 10_000, True),
        (0, 0, True),
        (10_000, 0, True),
        (9_999, 1, True),
        (9_999, 2, False),
        (10_001, 0, False),
        (-1, 1, False),
        (0, -1, False),
        (0, 10_001, False),
    ],
)
def test_it_must_lie_inside(offset: int, length: int, fits: bool) -> None:
    with underlay.open_any(MemoryStorage(10_000)) as disk:
        if fits:
            assert disk.slice(offset, length).size == length
        else:
            with pytest.raises(underlay.OutOfRangeError):
                disk.slice(offset, length)


def test_writes_stay_inside_and_allocate_as_the_whole_does(tmp_path: Path) -> None:
    content = os.urandom(5 * CLUSTER)
    (tmp_path / "base").write_bytes(pack(content))
    (tmp_path / "top").write_bytes(pack(b"", size=5 * CLUSTER, backing="base"))
    model = bytearray(content)
    gate = DirectoryGate()
    with underlay.open_any(tmp_path / "top", writable=True, gate=gate) as disk:
        part = disk.slice(CLUSTER // 2, 3 * CLUSTER)
        inner = part.slice(100, 2 * CLUSTER)
        inner.write(b"w" * 10, 0)
        inner.write(b"e" * 10, inner.size - 10)
        at = CLUSTER // 2 + 100
        model[at : at + 10] = b"w" * 10
        model[at + 2 * CLUSTER - 10 : at + 2 * CLUSTER] = b"e" * 10
        part.write_zeroes(0, 7)
        model[CLUSTER // 2 : CLUSTER // 2 + 7] = bytes(7)
        part.discard_to_zero(CLUSTER // 2, CLUSTER + 3)
        model[CLUSTER : 2 * CLUSTER + 3] = bytes(CLUSTER + 3)
        for offset, length in ((part.size, 1), (part.size - 1, 2), (-1, 1)):
            with pytest.raises(underlay.OutOfRangeError):
                part.write(bytes(length), offset)
        with pytest.raises(underlay.UnsupportedOperationError):
            part.resize(5)
        assert disk.read_bytes(0, disk.size) == model
        assert part.read_bytes(0, part.size) == model[CLUSTER // 2 : CLUSTER // 2 + part.size]
    with underlay.open_any(tmp_path / "top", gate=gate) as disk:
        assert disk.read_bytes(0, disk.size) == model


def test_its_mappings_end_with_it(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(pack(b"b" * 3 * CLUSTER))
    (tmp_path / "top").write_bytes(pack(b"t" * CLUSTER, size=4 * CLUSTER, backing="base"))
    with underlay.open_any(tmp_path / "top", gate=DirectoryGate()) as disk:
        part = disk.slice(1000, 3 * CLUSTER)
        extents = list(part.extents())
        assert [extent.depth for extent in extents] == [0, 1, 1, 1]
        assert [extent.length for extent in extents] == [CLUSTER - 1000, CLUSTER, CLUSTER, 1000]
        assert isinstance(part.get_mapping(part.size), underlay.Eof)
        assert len(part.collect_storage_dependencies()) == 2
        assert part.backing is None


def test_nothing_behind_it_is_read_or_written() -> None:
    """Through the short ways of both faces, too."""
    with underlay.open_image(MemoryStorage(b"x" * 1000), format="raw", writable=True) as disk:
        part = disk.slice(100, 200)
        buffer = bytearray(b"?" * 20)
        part.read(buffer, 190)
        assert buffer == b"x" * 10 + bytes(10)

        async def check() -> None:
            buffer = bytearray(b"?" * 20)
            await part.awaitable().read(buffer, 190)
            assert buffer == b"x" * 10 + bytes(10)

        asyncio.run(check())
        with pytest.raises(underlay.OutOfRangeError):
            part.write(b"y" * 20, 190)
        assert disk.read_bytes(0, 1000) == b"x" * 1000


def test_it_ends_with_its_disk() -> None:
    disk = underlay.open_any(MemoryStorage(10_000))
    part = disk.slice(0, 10)
    part.close()
    assert part.read_bytes(0, 1) == b"\0", "closing a part alone does nothing"
    with part:
        pass
    disk.close()
    assert part.closed
    with pytest.raises(underlay.ClosedError):
        part.read(bytearray(1), 0)
    with pytest.raises(underlay.ClosedError):
        disk.slice(0, 1)


def test_it_shrinks_with_its_disk() -> None:
    with underlay.open_image(MemoryStorage(b"x" * 1000), format="raw", writable=True) as disk:
        part = disk.slice(500, 500)
        disk.resize(600)
        assert part.size == 100
        assert part.read_bytes(90, 20) == b"x" * 10 + bytes(10)
        disk.resize(100)
        assert part.size == 0
        assert part.read_bytes(0, 5) == bytes(5)
