"""Faults of the writing side that were found by reading it: rare moments, each made to happen."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

import underlay
from underlay import SyncFormatAccess, aio
from underlay.capabilities import Amendable, CompressedWriter, Snapshottable
from underlay.errors import CorruptImageError, StorageError
from underlay.jobs.check import check
from underlay.lease import Leases
from underlay.storage import ReadBuffers, WriteBuffers
from underlay.testing.wrappers import WrappedStorage
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Header
from underlay_storage.memory import MemoryStorage

CLUSTER = 4096
SIZE = 1 << 20


class Watched(WrappedStorage):
    """Tells somebody before each call, who may raise."""

    def __init__(self, inner: MemoryStorage) -> None:
        super().__init__(inner)
        self.watch: Callable[[str], None] = lambda _: None

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """Told first."""
        self.watch("read")
        super().readv(buffers, offset)

    def try_readv(self, buffers: ReadBuffers, offset: int) -> int | None:
        """Nothing is at hand: every read takes a worker on the asynchronous face."""
        return None

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """Told first."""
        self.watch("write")
        super().writev(buffers, offset)

    def sync(self) -> None:
        """Told first."""
        self.watch("sync")
        super().sync()


def flaws(storage: Any) -> tuple[int, int, int]:
    """What a check counts: corruptions, leaks, errors of its own."""
    result = check(storage)
    return result.corruptions, result.leaks, result.check_errors


def snapshots(disk: SyncFormatAccess) -> Any:
    return disk.capability(Snapshottable)


# -- snapshots


@attrs.define
class Canceller:
    """Cancels a task while the storage is in its k-th call, which then goes on."""

    storage: Watched
    at: int
    calls: int = 0
    task: asyncio.Task[Any] | None = None

    async def run(self, work: Any) -> bool:
        """Run it; whether it was cancelled."""
        loop = asyncio.get_running_loop()

        def watch(_: str) -> None:
            self.calls += 1
            if self.calls == self.at and self.task is not None:
                done = threading.Event()
                loop.call_soon_threadsafe(self.task.cancel)
                # The cancelled task runs first, and waits for this call to end.
                loop.call_soon_threadsafe(loop.call_soon, done.set)
                done.wait(60)

        self.storage.watch = watch
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self.task = task
        try:
            await task
        except asyncio.CancelledError:
            return True
        finally:
            self.storage.watch = lambda _: None
        return False


@pytest.mark.parametrize("change", ["create", "apply", "delete"])
def test_a_snapshot_that_is_cancelled_is_there_or_not(change: str) -> None:
    """Whatever the cancelled task was at, the disk goes on from what the image says."""

    async def attempt(at: int) -> bool:
        storage = Watched(MemoryStorage(0))
        disk = await aio.create(storage, size=SIZE, cluster_size=CLUSTER)
        old, new = b"A" * 10 * CLUSTER, b"C" * 6000
        await disk.write(old, 0)
        able: Any = disk.capability(Snapshottable)
        if change != "create":
            await able.create_snapshot("one")
            await disk.write(b"B" * 5 * CLUSTER, 0)
        await disk.flush()
        await disk.sync()
        work = {
            "create": lambda: able.create_snapshot("one"),
            "apply": lambda: able.apply_snapshot("one"),
            "delete": lambda: able.delete_snapshot("one"),
        }[change]()
        cancelled = await Canceller(storage, at).run(work)
        left = [snapshot.name for snapshot in await able.snapshots()]
        wanted = bytearray(await disk.read_bytes(0, SIZE))
        await disk.write(new, 3000)
        wanted[3000 : 3000 + len(new)] = new
        assert await disk.read_bytes(0, SIZE) == wanted
        await disk.close()

        assert flaws(storage) == (0, 0, 0), at
        with underlay.open_any(storage) as again:
            assert again.read_bytes(0, SIZE) == wanted, at
        if left:
            with underlay.open_image(storage, format="qcow2", snapshot="one") as snapshot:
                assert snapshot.read_bytes(0, len(old)) == old, at
        return cancelled

    at = 1
    while asyncio.run(attempt(at)):
        at += 1
    assert at > 5, "it was cancelled at several of its calls"


def test_a_refcount_table_that_has_to_grow_just_as_a_snapshot_moves_it() -> None:
    """With blocks of 64 counts and a table of 64 entries, one of these is the moment."""
    for clusters in range(3876, 3940):
        storage = MemoryStorage(0)
        with underlay.create(storage, size=4 << 20, cluster_size=512, refcount_bits=64) as disk:
            disk.write(b"a" * (clusters * 512), 0)
            snapshots(disk).create_snapshot("one")
            disk.write(b"b" * 1536, 2560)
        assert flaws(storage) == (0, 0, 0), clusters


def test_a_lease_does_not_make_what_is_the_disks_alone_look_shared() -> None:
    """What a lease keeps from being freed is counted, until others turn out to use it too."""
    storage = MemoryStorage(0)
    with underlay.create(storage, size=SIZE, cluster_size=CLUSTER) as disk:
        disk.write(b"A" * 4 * CLUSTER, 0)
        snapshots(disk).create_snapshot("one")
        with disk.lease():
            disk.write(b"B" * 4 * CLUSTER, 0)
            snapshots(disk).apply_snapshot("one")
            snapshots(disk).delete_snapshot("one")
    assert flaws(storage) == (0, 0, 0)
    with underlay.open_any(storage) as disk:
        assert disk.read_bytes(0, 4 * CLUSTER) == b"A" * 4 * CLUSTER


# -- what is known only in part


def test_a_snapshot_that_fails_and_cannot_be_undone_ends_writing() -> None:
    storage = Watched(MemoryStorage(0))
    disk = underlay.create(storage, size=SIZE, cluster_size=CLUSTER)
    disk.write(b"A" * 4 * CLUSTER, 0)
    disk.flush()
    disk.sync()
    failed: list[str] = []

    def watch(kind: str) -> None:
        # The first write, and then every read, until the caller is told.
        if kind == "write" or failed:
            failed.append(kind)
            raise StorageError("the wire is cut", errno=5, filename="it")

    storage.watch = watch
    with pytest.raises(StorageError):
        snapshots(disk).create_snapshot("one")
    storage.watch = lambda _: None
    assert "read" in failed
    with pytest.raises(StorageError, match="can no longer be written"):
        disk.write(b"B" * CLUSTER, 8 * CLUSTER)
    with pytest.raises(StorageError, match="can no longer be written"):
        disk.close()
    assert flaws(storage)[::2] == (0, 0)


def test_forgetting_what_was_written_ends_writing_if_the_image_cannot_be_read() -> None:
    """A link to a table that was never written must not get to the disk with the next one."""
    storage = Watched(MemoryStorage(0))
    disk = underlay.create(storage, size=64 << 20, cluster_size=CLUSTER)
    disk.write(b"A" * CLUSTER, 0)

    def watch(kind: str) -> None:
        raise StorageError("the wire is cut", errno=5, filename="it")

    storage.watch = watch
    with pytest.raises(StorageError):
        disk.invalidate_cache()
    storage.watch = lambda _: None
    with pytest.raises(StorageError, match="can no longer be written"):
        disk.write(b"B" * CLUSTER, 4 << 20)
    with pytest.raises(StorageError, match="can no longer be written"):
        disk.close()
    assert flaws(storage)[::2] == (0, 0)


# -- entries that lead where there is metadata

#: What can be done to guest cluster 5.
CHANGES: dict[str, Callable[[SyncFormatAccess], object]] = {
    "write": lambda disk: disk.write(b"x" * CLUSTER, 5 * CLUSTER),
    "write a part": lambda disk: disk.write(b"x" * 600, 5 * CLUSTER + 3),
    "discard": lambda disk: disk.discard_to_zero(4 * CLUSTER, 3 * CLUSTER),
    "shrink": lambda disk: disk.resize(4 * CLUSTER),
    "snapshot": lambda disk: snapshots(disk).create_snapshot("one"),
    "compressed": lambda disk: disk.capability(CompressedWriter).write_encoded(
        5 * CLUSTER, b"encoded"
    ),
}
#: Entries for it, made of the host offset of the L2 table.
ENTRIES: dict[str, Callable[[int], int]] = {
    "zero, in the refcount block": lambda _: layout.ZERO | 2 * CLUSTER,
    "data, in the refcount block": lambda _: 2 * CLUSTER,
    "zero and its own, in the refcount block": lambda _: layout.COPIED | layout.ZERO | 2 * CLUSTER,
    "compressed, in the refcount table": lambda _: layout.COMPRESSED | CLUSTER,
    "zero, in the L2 table": lambda table: layout.ZERO | table,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_metadata_that_an_entry_leads_to_is_not_freed(entry: str, change: str) -> None:
    storage = MemoryStorage(0)
    with underlay.create(storage, size=SIZE, cluster_size=CLUSTER) as disk:
        disk.write(b"A" * 3 * CLUSTER, 0)
    whole = bytearray(storage.size())
    storage.readv((whole,), 0)
    header = Header.unpack(bytes(whole[:CLUSTER]))
    (first,) = struct.unpack_from(">Q", whole, header.l1_table_offset)
    table = first & layout.HOST_OFFSET
    storage.writev((struct.pack(">Q", ENTRIES[entry](table)),), table + 5 * 8)

    disk = underlay.open_any(storage, writable=True)
    with pytest.raises(CorruptImageError):
        CHANGES[change](disk)
    with contextlib.suppress(CorruptImageError):  # most of them end writing altogether
        disk.close()
    for kept in (CLUSTER, 2 * CLUSTER, table):
        found = bytearray(CLUSTER)
        storage.readv((found,), kept)
        assert any(found), hex(kept)
    with underlay.open_any(storage) as disk:
        assert disk.read_bytes(0, 3 * CLUSTER) == b"A" * 3 * CLUSTER


# -- memory


def test_memory_does_not_grow_with_what_is_freed() -> None:
    """32,768 clusters, of which each would take a hundred bytes were it remembered by itself."""
    storage = MemoryStorage(0)
    underlay.create(storage, size=16 << 20, cluster_size=512, preallocation="metadata").close()
    cut_at = 1 << 20
    with underlay.open_any(storage, writable=True, cache_size=1 << 20) as disk:
        disk.write(b"x", 0)
        tracemalloc.start()
        try:
            disk.discard_to_zero(cut_at, disk.size - cut_at)
            disk.flush()
            disk.sync()
            disk.flush()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 2 << 20
    assert flaws(storage) == (0, 0, 0)


# -- sizes


@pytest.mark.parametrize(
    ("size", "preallocation"), [(3 << 20, "off"), (1 << 19, "metadata"), (20 * CLUSTER, "off")]
)
def test_a_disk_whose_resizing_is_cancelled_has_one_size_or_the_other(
    size: int, preallocation: str
) -> None:
    old = 1 << 18

    async def attempt(at: int) -> bool:
        storage = Watched(MemoryStorage(0))
        disk = await aio.create(storage, size=old, cluster_size=512)
        await disk.write(b"A" * old, 0)
        await disk.flush()
        await disk.sync()
        cancelled = await Canceller(storage, at).run(disk.resize(size, preallocation))
        assert disk.size in {old, size}
        kept = min(disk.size, old)
        await disk.write(b"B" * 1000, disk.size - 1000)
        wanted = (b"A" * kept + bytes(disk.size - kept))[:-1000] + b"B" * 1000
        assert await disk.read_bytes(0, disk.size) == wanted
        await disk.close()

        assert flaws(storage) == (0, 0, 0), at
        with underlay.open_any(storage) as again:
            assert again.read_bytes(0, again.size) == wanted, at
        return cancelled

    at = 1
    while asyncio.run(attempt(at)):
        at += 1
    assert at > 5, "it was cancelled at several of its calls"


@pytest.mark.parametrize("change", ["zero", "discard", "grow"])
def test_zeroes_stay_when_a_backing_image_that_was_declined_comes_back(
    change: str, tmp_path: Path
) -> None:
    """Nothing showed through at the time, but an entry that says nothing is no zero."""
    (tmp_path / "base.raw").write_bytes(b"\xaa" * SIZE)
    path = tmp_path / "disk.qcow2"
    underlay.create(
        path, size=SIZE // 2, backing_file=str(tmp_path / "base.raw"), backing_fmt="raw"
    ).close()
    with underlay.open_image(path, format="qcow2", backing=None, writable=True) as disk:
        if change == "zero":
            disk.write_zeroes(0, 65536)
        elif change == "discard":
            disk.discard_to_zero(0, 65536)
        else:
            disk.resize(SIZE)
    with underlay.open_any(path, gate=underlay.PermissiveImplicitOpenGate()) as disk:
        place = SIZE // 2 if change == "grow" else 0
        assert disk.read_bytes(place, 65536) == bytes(65536)


def test_tables_that_are_said_to_be_huge_take_no_memory(
    tmp_path: Path, qemu_img: Callable[..., str]
) -> None:
    """Bitmap tables far behind the file's end: not one of their clusters is remembered."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    for number in range(3):
        qemu_img("bitmap", "--add", "-g", "64k", path, f"bitmap{number}")
    image = bytearray(path.read_bytes())
    extension = struct.pack(">II", layout.EXTENSION_BITMAPS, layout.BITMAPS.size)
    count, _, _, at = layout.BITMAPS.unpack_from(image, image.index(extension) + 8)
    for number in range(count):
        _, _, flags, kind, bits, name, extra = layout.BITMAP.unpack_from(image, at)
        place, entries = (1 << 40) + (number << 26), layout.L1_BYTES_MAX // 8
        layout.BITMAP.pack_into(image, at, place, entries, flags, kind, bits, name, extra)
        at += -(-(layout.BITMAP.size + extra + name) // 8) * 8
    path.write_bytes(image)

    with underlay.open_any(path, writable=True) as disk:
        tracemalloc.start()
        try:
            disk.write(b"x" * 512, 0)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 4 << 20


# -- leases


class ExchangedLeases(Leases):
    """Leases whose quick ones are exchanged, and ended, just when somebody has looked for them."""

    def __init__(self) -> None:
        self.race = False
        super().__init__()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name == "hot" and self.race:
            self.race = False
            found.append(None)
            self.defer(lambda: None)
            found.pop()
            self.settle()
        return found


@pytest.mark.parametrize("call", ["read", "write"])
def test_a_quick_lease_counts_however_late_it_is_taken(call: str) -> None:
    storage = Watched(MemoryStorage(0))
    with underlay.create(storage, size=SIZE, cluster_size=CLUSTER) as disk:
        disk.write(b"A" * CLUSTER, 0)
        leases = ExchangedLeases()
        disk._leases = leases
        freed: list[str] = []
        seen: list[bool] = []

        def watch(_: str) -> None:
            leases.defer(lambda: freed.append("it"))
            seen.append(bool(freed))

        storage.watch = watch
        leases.race = True
        if call == "read":
            disk.read(bytearray(512), 0)
        else:
            disk.write(bytes(512), 0)
        storage.watch = lambda _: None
        assert seen == [False]
        leases.settle()
        assert freed == ["it"]


# -- amending

AMENDMENTS: dict[str, tuple[dict[str, Any], dict[str, object]]] = {
    "wider refcounts": ({}, {"refcount_bits": 64}),
    "up": ({"compat": "v2"}, {"compat": "v3"}),
    "down": ({}, {"compat": "v2"}),
}


@pytest.mark.parametrize("amendment", AMENDMENTS)
def test_an_amendment_that_is_cancelled_leaves_an_image_that_can_be_written(
    amendment: str,
) -> None:
    made, wanted = AMENDMENTS[amendment]

    async def attempt(at: int) -> bool:
        storage = Watched(MemoryStorage(0))
        disk = await aio.create(storage, size=SIZE, cluster_size=CLUSTER, **made)
        await disk.write(b"A" * 10 * CLUSTER, 0)
        able: Any = disk.capability(Snapshottable)
        await able.create_snapshot("one")
        if amendment == "down":
            await disk.write_zeroes(2 * CLUSTER, 4 * CLUSTER)
        await disk.flush()
        await disk.sync()
        content = bytearray(await disk.read_bytes(0, SIZE))
        amender: Any = disk.capability(Amendable)
        cancelled = await Canceller(storage, at).run(amender.amend(wanted))
        assert await disk.read_bytes(0, SIZE) == content
        content[5000:8000] = b"B" * 3000
        content[99 * CLUSTER : 140 * CLUSTER] = b"C" * 41 * CLUSTER
        await disk.write(b"B" * 3000, 5000)
        await disk.write(b"C" * 41 * CLUSTER, 99 * CLUSTER)
        await able.create_snapshot("two")
        await disk.close()

        assert flaws(storage) == (0, 0, 0), at
        with underlay.open_any(storage) as again:
            assert again.read_bytes(0, SIZE) == content, at
        return cancelled

    at = 1
    while asyncio.run(attempt(at)):
        at += 1
    assert at > 3, "it was cancelled at several of its calls"
