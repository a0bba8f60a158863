"""Fetching what lies in another order on the host than in the guest."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import underlay
from underlay.jobs import Unreadable, convert
from underlay.storage import ReadBuffers
from underlay_storage.memory import MemoryStorage

CLUSTER = 64 << 10
COUNT = 16
CONTENT = b"".join(bytes([number + 1]) * CLUSTER for number in range(COUNT))


class Watched(MemoryStorage):
    """Remembers what was read of it; some of that cannot be."""

    __slots__ = ("broken", "reads")

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reads: list[tuple[int, int]] = []
        self.broken = range(0)

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        length = sum(map(len, buffers))
        self.reads.append((offset, length))
        if offset < self.broken.stop and self.broken.start < offset + length:
            raise underlay.StorageError(f"Could not read at {offset}: broken", errno=errno.EIO)
        super().readv(buffers, offset)


@pytest.fixture
def backwards(tmp_path: Path) -> Watched:
    """An image that has the guest's last cluster first."""
    path = tmp_path / "backwards.qcow2"
    with underlay.create(path, size=len(CONTENT)) as disk:
        for at in reversed(range(0, len(CONTENT), CLUSTER)):
            disk.write(CONTENT[at : at + CLUSTER], at)
    return Watched(path.read_bytes())


def host_offset(image: Watched, guest: int) -> int:
    with underlay.open_image(image, format="qcow2") as disk:
        mapping = disk.get_mapping(guest, CLUSTER)
    assert isinstance(mapping, underlay.Data)
    return mapping.offset


def test_clusters_in_a_row_come_with_one_read(backwards: Watched, tmp_path: Path) -> None:
    first = host_offset(backwards, len(CONTENT) - CLUSTER)
    assert host_offset(backwards, 0) == first + len(CONTENT) - CLUSTER
    backwards.reads.clear()
    with underlay.open_image(backwards, format="qcow2") as disk:
        convert(disk, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == CONTENT
    assert [read for read in backwards.reads if read[0] >= first] == [(first, len(CONTENT))]


def test_what_cannot_be_read_in_a_row_is_named(backwards: Watched, tmp_path: Path) -> None:
    guest = 5 * CLUSTER
    host = host_offset(backwards, guest)
    backwards.broken = range(host + 512, host + 1024)
    with underlay.open_image(backwards, format="qcow2") as disk:
        with pytest.raises(underlay.StorageError, match=rf"guest offset {guest}\b"):
            convert(disk, tmp_path / "out.raw")
        lost: list[Unreadable] = []
        convert(disk, tmp_path / "out.raw", salvage=lost.append)
    assert [(each.start, each.length) for each in lost] == [(guest + 512, 512)]
    rescued = bytearray(CONTENT)
    rescued[guest + 512 : guest + 1024] = bytes(512)
    assert (tmp_path / "out.raw").read_bytes() == rescued
