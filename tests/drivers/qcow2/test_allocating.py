"""Reference counts of every width: how they grow, end, and are never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import underlay
from underlay import SyncFormatAccess
from underlay.capabilities import Snapshottable
from underlay.errors import CorruptImageError, LimitExceededError
from underlay.storage import WriteBuffers
from underlay_drivers.qcow2.counts import Counts
from underlay_storage.memory import MemoryStorage

from .ends import Ends, pattern

WIDTHS = [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "theirs"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_blocks_are_added_and_the_table_grows(ends: Ends, bits: int, *, theirs: bool) -> None:
    """Counts of 64 bits in 512-byte clusters: 64 a block, 4096 a table; the others need less."""
    size = 6 << 20 if bits == 64 else 1 << 20
    ends.create(size, theirs=theirs, cluster_size=512, refcount_bits=bits)
    clusters = ends.header.refcount_table_clusters
    offset = ends.header.refcount_table_offset

    with ends.open() as disk:
        ends.write(disk, 0, pattern(size))
        assert disk.read_bytes(0, size) == ends.model

    if bits == 64:
        assert ends.header.refcount_table_clusters > clusters
        assert ends.header.refcount_table_offset != offset
    ends.agree()
    with ends.open() as disk:
        disk.discard_to_zero(0, size)
        ends.put(0, bytes(size))
        ends.write(disk, 0, b"once more")
    ends.agree()


@pytest.mark.parametrize("bits", [1, 16, 64])
def test_qemu_goes_on_where_we_let_tables_grow_and_the_other_way_round(
    ends: Ends, bits: int
) -> None:
    step = 1 << 20
    ends.create(8 << 20, cluster_size=512, refcount_bits=bits)
    for number in range(4):
        if number % 2:
            ends.they_write(number * step, step, number)
        else:
            with ends.open() as disk:
                ends.write(disk, number * step, pattern(step, number))
    ends.agree()


@pytest.mark.parametrize("bits", WIDTHS)
def test_counts_are_read_and_searched_as_they_stand_on_disk(bits: int) -> None:
    counts = Counts(refcount_bits=bits, cluster_size=512)
    block = bytearray(512)
    model = [0] * counts.per_block
    for index in range(0, counts.per_block, 3):
        model[index] = index * 7 % counts.maximum + 1 if bits > 1 else 1
        counts.set(block, index, model[index])
    assert [counts.get(block, index) for index in range(counts.per_block)] == model
    # Several share a byte from its low bits on; wider ones are big-endian.
    whole = int.from_bytes(block, "little" if bits < 8 else "big")
    for index in range(counts.per_block):
        shift = index * bits if bits < 8 else (counts.per_block - 1 - index) * bits
        assert whole >> shift & counts.maximum == model[index]
    counts.fill(block, 0, counts.per_block - 1)
    assert counts.find_free(block, 0) == (counts.per_block - 1 if not model[-1] else -1)


# -- the end of what can be counted


def _content(storage: MemoryStorage) -> bytes:
    content = bytearray(storage.size())
    storage.readv((content,), 0)
    return bytes(content)


@pytest.mark.parametrize(("bits", "snapshots"), [(1, 0), (2, 2), (4, 14)])
def test_a_count_that_would_overflow_is_an_error_and_harms_nothing(
    ends: Ends, bits: int, snapshots: int
) -> None:
    ends.create(refcount_bits=bits)
    with ends.open() as disk:
        ends.write(disk, 0, pattern(200_000))
        able = disk.capability(Snapshottable)
        for number in range(snapshots):
            able.create_snapshot(f"s{number}")
        disk.flush()
        disk.sync()
        before = ends.path.read_bytes()

        with pytest.raises(LimitExceededError, match="refcount_bits") as caught:
            able.create_snapshot("one too many")
        assert caught.value.limit == "refcount_bits"
        assert caught.value.allowed == (1 << bits) - 1

        assert len(able.snapshots()) == snapshots
        # What is not referred to may differ; what QEMU sees does not.
        assert ends.path.read_bytes()[:65536] == before[:65536]
        ends.write(disk, 65536 - 5, pattern(70_000, 2))
        if snapshots:
            able.delete_snapshot("s0")
            able.create_snapshot("now there is room")
    ends.agree()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_full_count_in_a_shared_cluster_only_ends_the_sharing(ends: Ends, bits: int) -> None:
    """The image says 255 (65535) of a cluster; another reference to it cannot be counted."""
    ends.create(refcount_bits=bits, theirs=True)
    ends.they_write(0, 65536, 1, "-c")
    offset = (ends.l2_entry(0)[1] & (1 << 54) - 1) & -65536
    block = ends.word(ends.header.refcount_table_offset)
    width = bits // 8
    ends.poke(block + offset // 65536 * width, "B" if width == 1 else "H", (1 << bits) - 1)
    with ends.open() as disk:
        with pytest.raises(LimitExceededError, match="refcount_bits"):
            disk.capability(Snapshottable).create_snapshot("s")
        ends.write(disk, 65536, pattern(100))
        assert disk.read_bytes(0, disk.size) == ends.model
    assert not ends.checked().get("corruptions")


# -- every cluster that is taken is used or given back


class Failing(MemoryStorage):
    """Fails every so many writes."""

    __slots__ = ("every", "left")

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.every = 0
        self.left = 0

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        if self.every:
            self.left -= 1
            if self.left <= 0:
                self.left = self.every
                raise underlay.StorageError("no space", filename="memory")
        super().writev(buffers, offset)


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "options",
    [{}, {"cluster_size": 512, "refcount_bits": 64}, {"extended_l2": True}],
    ids=["plain", "small", "subclusters"],
)
def test_failed_writes_leak_nothing_when_the_disk_is_closed(
    ends: Ends, every: int, options: dict[str, Any]
) -> None:
    ends.create(below=pattern(300_000), **options)
    storage = Failing(ends.path.read_bytes())
    base = underlay.open_image(ends.folder / "base.raw", format="raw")
    opened = underlay.open_image(storage, format="qcow2", writable=True, backing=base)
    with base, opened as disk:
        ends.write(disk, 900_000, b"prepared")
        disk.flush()
        storage.every = every
        failed = 0
        for number in range(40):
            offset, data = number * 20_011, pattern(3000, number)
            try:
                disk.write(data, offset)
            except underlay.StorageError:
                failed += 1
                # Of a write that failed each byte may be old or new.
                data = disk.read_bytes(offset, len(data))
            ends.put(offset, data)
        storage.every = 0
        assert failed >= 8
        assert disk.read_bytes(0, disk.size) == ends.model
    ends.path.write_bytes(_content(storage))
    ends.agree()


@pytest.mark.parametrize("cluster", [512, 65536])
def test_cancelled_writes_leak_nothing(ends: Ends, cluster: int) -> None:
    import asyncio

    ends.create(below=pattern(500_000), cluster_size=cluster)

    async def write() -> None:
        gate = underlay.DirectoryGate()
        opened = underlay.aio.open_image(ends.path, format="qcow2", writable=True, gate=gate)
        async with await opened as disk:
            for number in range(60):
                task = asyncio.create_task(disk.write(pattern(30_000, number), number * 9_973))
                for _ in range(number % 11):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            ends.model[:] = await disk.read_bytes(0, disk.size)

    asyncio.run(write())
    ends.agree()


def test_freed_clusters_are_found_again_wherever_they_are(ends: Ends) -> None:
    ends.create(4 << 20, cluster_size=4096)
    with ends.open() as disk:
        ends.write(disk, 0, pattern(2 << 20))
    size = ends.path.stat().st_size
    with ends.open() as disk:
        for number in range(0, 512, 2):
            disk.discard_to_zero(number * 4096, 4096)
            ends.put(number * 4096, bytes(4096))
        disk.flush()
        disk.sync()
        ends.write(disk, 3 << 20, pattern(256 * 4096))
    # One more L2 table than before, at most.
    assert ends.path.stat().st_size <= size + 3 * 4096
    ends.agree()


def test_metadata_that_is_said_to_be_free_is_never_handed_out(ends: Ends) -> None:
    ends.create(theirs=True)
    ends.they_write(0, 65536, 1)
    header = ends.header
    block = ends.word(header.refcount_table_offset)
    l2 = ends.word(header.l1_table_offset) & 0x00FF_FFFF_FFFF_FE00
    for what in (header.refcount_table_offset, block, header.l1_table_offset, l2):
        before = ends.path.read_bytes()
        ends.poke(block + what // 65536 * 2, "H", 0)
        with ends.open() as disk:
            with pytest.raises(CorruptImageError, match="says that it is free"):
                disk.write(b"x", 65536)
            disk.abandon()
        ends.path.write_bytes(before)


WORK: dict[str, Callable[[SyncFormatAccess], object]] = {
    "one write": lambda disk: disk.write(pattern(1 << 20), 0),
    "vectors": lambda disk: disk.writev([b"x" * 5, b"y" * 65_536] * 14, 65_530),
    "snapshot": lambda disk: disk.capability(Snapshottable).create_snapshot("s"),
}


@pytest.mark.parametrize("work", WORK)
def test_leaked_clusters_of_others_do_no_harm(ends: Ends, work: str) -> None:
    """What a crash has left counted stays counted, and is used by nobody."""
    ends.create(theirs=True)
    ends.they_write(0, 65536, 1)
    block = ends.word(ends.header.refcount_table_offset)
    ends.poke(block + 9 * 2, "HHH", 1, 1, 7)
    with ends.open() as disk:
        WORK[work](disk)
    report = ends.checked()
    assert report.get("leaks") == 3
    assert "corruptions" not in report
