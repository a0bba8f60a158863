"""Writes on the blocking face that wait for nobody: they go their own, shorter way."""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest

import underlay
from underlay import SyncFormatAccess
from underlay.capabilities import Checkable
from underlay.errors import StorageError
from underlay.storage import WriteBuffers
from underlay_drivers.qcow2.claims import Claims
from underlay_storage.memory import MemoryStorage

MIB = 1 << 20
CLUSTER = 65536


class Watched(MemoryStorage):
    """Notes writes, and can fail them or hold them up."""

    __slots__ = ("entered", "fails", "gate", "writes")

    def __init__(self, content: bytes = b"") -> None:
        super().__init__(content)
        self.writes: list[tuple[int, int]] = []
        self.fails = False
        self.gate: threading.Event | None = None
        self.entered = threading.Event()

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        length = sum(map(len, buffers))
        self.writes.append((offset, length))
        if self.fails:
            super().writev((b"".join(buffers)[: length // 2],), offset)
            raise StorageError("it fails", errno=errno.EIO)
        gate = self.gate
        if gate is not None:
            self.entered.set()
            assert gate.wait(30)
        super().writev(buffers, offset)


@pytest.fixture
def storage() -> Watched:
    return Watched()


def _open(storage: Watched, size: int = 64 * MIB, **options: Any) -> SyncFormatAccess:
    disk = underlay.create(storage, size=size, **options)
    # Its first table, and being made ready, need the longer way.
    disk.write(b"first", 0)
    storage.writes.clear()
    return disk


def _only_at_once(patch: pytest.MonkeyPatch) -> None:
    async def begin(*_: object) -> None:
        pytest.fail("it went the longer way")

    patch.setattr(Claims, "begin", begin)
    patch.setattr(Claims, "commit", begin)


def _sound(disk: SyncFormatAccess) -> bool:
    result = disk.capability(Checkable).check()
    return not result.corruptions and not result.leaks


@pytest.mark.parametrize("options", [{}, {"extended_l2": True}], ids=str)
@pytest.mark.parametrize(("offset", "length"), [(MIB, 4096), (MIB + 100, 5000), (MIB, MIB)])
def test_room_is_made_without_waiting(
    storage: Watched,
    options: dict[str, Any],
    offset: int,
    length: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = bytes(range(1, 251)) * (length // 250 + 1)
    with _open(storage, **options) as disk:
        with monkeypatch.context() as patch:
            _only_at_once(patch)
            disk.write(data[:length], offset)
        assert disk.read_bytes(offset - 7, length + 14) == bytes(7) + data[:length] + bytes(7)
        disk.flush()
        assert _sound(disk)


def test_many_new_clusters_are_one_write(storage: Watched) -> None:
    with _open(storage) as disk:
        disk.write(bytes([7]) * MIB, 2 * MIB)

        assert [length for _, length in storage.writes] == [MIB]


def test_rewriting_what_lies_in_a_row_is_one_write(storage: Watched) -> None:
    with _open(storage) as disk:
        disk.write(bytes([7]) * MIB, 2 * MIB)
        storage.writes.clear()
        disk.write(bytes([8]) * (MIB - 200), 2 * MIB + 100)

        assert [length for _, length in storage.writes] == [MIB - 200]
        edge = bytes([7]) * 100
        assert disk.read_bytes(2 * MIB, MIB) == edge + bytes([8]) * (MIB - 200) + edge


def test_a_write_goes_on_from_old_clusters_to_new_ones_and_back(storage: Watched) -> None:
    with _open(storage) as disk:
        disk.write(bytes([1]) * CLUSTER, 3 * CLUSTER)
        disk.write(bytes([1]) * CLUSTER, 6 * CLUSTER)
        data = bytes([2]) * (5 * CLUSTER)
        disk.write(data, 2 * CLUSTER + 50)

        assert disk.read_bytes(2 * CLUSTER, 6 * CLUSTER) == (bytes(50) + data + bytes(CLUSTER - 50))
        disk.flush()
        assert _sound(disk)


def test_a_write_that_fails_keeps_no_room_and_no_ticket(storage: Watched) -> None:
    with _open(storage) as disk:
        storage.fails = True
        with pytest.raises(StorageError):
            disk.write(bytes([7]) * MIB, 2 * MIB)
        storage.fails = False
        assert disk.read_bytes(2 * MIB, MIB) == bytes(MIB)
        disk.flush()
        assert _sound(disk)
        # What it left in its clusters shows nowhere, though they are used again.
        disk.write(bytes([8]) * 100, 2 * MIB + 300)

        assert disk.read_bytes(2 * MIB, CLUSTER) == (
            bytes(300) + bytes([8]) * 100 + bytes(CLUSTER - 400)
        )


def test_a_write_across_the_end_writes_nothing(storage: Watched) -> None:
    with _open(storage, size=MIB + 512) as disk:
        with pytest.raises(underlay.OutOfRangeError):
            disk.write(bytes([7]) * 1024, MIB)

        assert not storage.writes
        disk.write(bytes([7]) * 512, MIB)
        assert disk.read_bytes(MIB, 600) == bytes([7]) * 512 + bytes(88)


def test_writers_of_one_cluster_come_one_after_the_other(storage: Watched) -> None:
    with _open(storage) as disk:
        storage.gate = gate = threading.Event()
        first = threading.Thread(target=disk.write, args=(bytes([1]) * 4096, MIB))
        second = threading.Thread(target=disk.write, args=(bytes([2]) * 4096, MIB + 8192))
        first.start()
        assert storage.entered.wait(30)
        second.start()
        second.join(0.05)
        assert second.is_alive()
        assert len(storage.writes) == 1
        gate.set()
        first.join()
        second.join()

        expected = bytes([1]) * 4096 + bytes(4096) + bytes([2]) * 4096
        assert disk.read_bytes(MIB, 3 * 4096) == expected
        storage.gate = None
        disk.flush()
        assert _sound(disk)
