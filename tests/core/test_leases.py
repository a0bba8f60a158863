"""What a lease keeps alive: freed room is used again when nobody can still read it."""

from __future__ import annotations

import random
import threading

import pytest

import underlay
from underlay.errors import UnderlayError
from underlay.lease import Leases
from underlay.storage import ReadBuffers, WriteBuffers
from underlay.testing import WrappedStorage
from underlay_storage.memory import MemoryStorage

from .toy_format import CLUSTER, pack

pytestmark = pytest.mark.usefixtures("toy")

#: Where no cluster is allocated.
_FREE = 2 * CLUSTER
_RANDOM = random.Random(0)
_OLD = _RANDOM.randbytes(_FREE) + bytes(CLUSTER) + _RANDOM.randbytes(3 * CLUSTER)


def test_what_was_freed_waits_for_older_leases_only() -> None:
    leases, done = Leases(), list[str]()
    leases.defer(lambda: done.append("nobody holds one"))
    assert done == ["nobody holds one"]
    first, second = leases.acquire(), leases.acquire()
    leases.defer(lambda: done.append("both"))
    third = leases.acquire()
    leases.release(first)
    assert done == ["nobody holds one"]
    leases.release(second)
    assert done == ["nobody holds one", "both"], "the third is younger than the free"
    leases.defer(lambda: done.append("third"))
    with leases.hold():
        leases.defer(lambda: done.append("fourth"))
        leases.release(third)
        assert done[-1] == "third"
    assert done[-1] == "fourth"


def test_a_failing_action_does_not_hold_up_the_others() -> None:
    leases, done = Leases(), list[str]()

    def fail() -> None:
        raise UnderlayError("oh no")

    lease = leases.acquire()
    leases.defer(fail)
    leases.defer(lambda: done.append("ran"))
    with pytest.raises(UnderlayError, match="oh no"):
        leases.release(lease)
    assert done == ["ran"]


def test_leases_are_thread_safe() -> None:
    leases, done = Leases(), list[int]()

    def work() -> None:
        for _ in range(2000):
            with leases.hold():
                leases.defer(lambda: done.append(1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 8000


class _HoldsThread(WrappedStorage):
    """Stops the thread called "held" before each of its requests."""

    def __init__(self, inner: MemoryStorage) -> None:
        super().__init__(inner)
        self.waiting, self.go_on = threading.Event(), threading.Event()

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        self._hold()
        super().readv(buffers, offset)

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        self._hold()
        super().writev(buffers, offset)

    def _hold(self) -> None:
        if threading.current_thread().name == "held":
            self.waiting.set()
            assert self.go_on.wait(20)


def test_a_read_in_flight_never_sees_what_reuses_its_cluster() -> None:
    """It holds a lease: what is discarded meanwhile is not given to the next write."""
    storage = _HoldsThread(MemoryStorage(pack(_OLD)))
    with underlay.open_image(storage, format="toy", writable=True) as disk:
        found: list[bytes] = []
        reader = threading.Thread(
            target=lambda: found.append(disk.read_bytes(0, CLUSTER)), name="held"
        )
        reader.start()
        assert storage.waiting.wait(10)
        disk.discard_to_zero(0, CLUSTER)
        disk.flush()
        disk.write(b"\xaa" * CLUSTER, _FREE)
        storage.go_on.set()
        reader.join(10)
        assert found == [_OLD[:CLUSTER]]


def test_a_write_in_flight_never_hits_what_reuses_its_cluster() -> None:
    storage = _HoldsThread(MemoryStorage(pack(_OLD)))
    with underlay.open_image(storage, format="toy", writable=True) as disk:
        writer = threading.Thread(target=lambda: disk.write(b"late" * 100, 0), name="held")
        writer.start()
        assert storage.waiting.wait(10)
        disk.discard_to_zero(0, CLUSTER)
        disk.flush()
        disk.write(b"\xaa" * CLUSTER, _FREE)
        storage.go_on.set()
        writer.join(10)
        assert disk.read_bytes(_FREE, CLUSTER) == b"\xaa" * CLUSTER


def test_a_program_holds_a_lease_around_its_own_use() -> None:
    storage = MemoryStorage(pack(_OLD))
    with underlay.open_image(storage, format="toy", writable=True) as disk:
        with disk.lease():
            mapping = disk.get_mapping(0)
            assert isinstance(mapping, underlay.Data)
            disk.discard_to_zero(0, CLUSTER)
            disk.flush()
            disk.write(b"\xaa" * CLUSTER, _FREE)
            assert _at(storage, mapping.offset) == _OLD[:CLUSTER]
        disk.flush()
        disk.write(b"\xbb" * CLUSTER, 0)
        assert _at(storage, mapping.offset) == b"\xbb" * CLUSTER, "now it may be used again"


def _at(storage: MemoryStorage, offset: int) -> bytes:
    buffer = bytearray(CLUSTER)
    storage.readv((buffer,), offset)
    return bytes(buffer)


def test_a_read_only_disk_needs_no_lease() -> None:
    with underlay.open_image(MemoryStorage(pack(_OLD)), format="toy") as disk, disk.lease():
        assert disk.inner.leases() is None
