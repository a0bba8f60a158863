"""Writing: what changes, where it goes, and what is read on the way; QEMU looks at all of it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any

import attrs
import pytest

import underlay
from underlay import SyncFormatAccess
from underlay.capabilities import CompressedWriter, Snapshottable
from underlay.errors import CorruptImageError
from underlay.mapping import Data
from underlay.storage import ReadBuffers, WriteBuffers
from underlay_drivers.qcow2.header import Extension
from underlay_storage.memory import MemoryStorage

from .ends import Ends, backable, pattern

CLUSTER = 65536

#: Layouts that must all behave alike; QEMU makes them, or we.
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "v2": {"compat": "v2"},
    "512-byte clusters": {"cluster_size": 512},
    "2 MiB clusters": {"cluster_size": 2 << 20},
    "subclusters": {"extended_l2": True},
    "subclusters of 512 bytes": {"extended_l2": True, "cluster_size": 16384},
    "data file": {"data_file": "data.raw"},
    "raw data file": {"data_file": "data.raw", "data_file_raw": True},
    "data file with subclusters": {"data_file": "data.raw", "extended_l2": True},
}
BACKABLE = backable(LAYOUTS)


class CountingStorage(MemoryStorage):
    """A storage that remembers which of its bytes were read."""

    __slots__ = ("reads",)

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reads: list[tuple[int, int]] = []

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        self.reads.append((offset, sum(map(len, buffers))))
        super().readv(buffers, offset)


class WritesSeen(MemoryStorage):
    """A storage that remembers where it was written."""

    __slots__ = ("writes",)

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.writes: list[tuple[int, int]] = []

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        self.writes.append((offset, sum(map(len, buffers))))
        super().writev(buffers, offset)


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "theirs"])
@pytest.mark.parametrize(("layout", "backed"), BACKABLE)
def test_both_write_one_image_in_turn(
    ends: Ends, layout: str, *, theirs: bool, backed: bool
) -> None:
    options = LAYOUTS[layout]
    size = 300 << 10 if options.get("cluster_size") == 512 else (1 << 20) + 512
    ends.create(size, theirs=theirs, below=pattern(400 << 10) if backed else b"", **options)

    with ends.open() as disk:
        ends.write(disk, 100, pattern(3000, 2))
        ends.write(disk, 130_000, pattern(70_000, 3))
        ends.write(disk, size - 700, pattern(700, 4))
    ends.agree()
    ends.they_write(2048, 512, 0x55)
    ends.they_write(131_072, 66_000, 0x66)
    with ends.open() as disk:
        assert disk.read_bytes(0, size) == ends.model
        ends.write(disk, 2300, pattern(600, 5))
        ends.write(disk, 190_000, pattern(20_000, 6))
    ends.agree()
    if ends.data_file is not None and options.get("data_file_raw"):
        assert ends.data_file.read_bytes()[:size] == ends.model


def test_opening_for_writing_and_closing_changes_nothing(ends: Ends) -> None:
    ends.create(theirs=True)
    ends.they_write(0, CLUSTER, 1)
    before = ends.path.read_bytes()

    with ends.open() as disk:
        disk.flush()
        disk.sync()

    assert ends.path.read_bytes() == before


# -- copy on write


ORIGINS = ["nowhere", "zero", "reserved zero", "compressed", "shared", "backing"]


def _prepare(ends: Ends, origin: str, options: dict[str, Any]) -> None:
    """QEMU makes an image whose first 256 KiB are what the name says."""
    ends.create(theirs=True, below=pattern(1 << 20) if origin == "backing" else b"", **options)
    length = 256 << 10
    if origin == "zero":
        ends.they(f"write -q -z -u 0 {length}")
    elif origin == "reserved zero":
        ends.they(f"write -q -P 9 0 {length}", f"write -q -z 0 {length}")
    elif origin == "compressed":
        for offset in range(0, length, CLUSTER):
            ends.they_write(offset, CLUSTER, 9 + offset // CLUSTER, "-c")
    elif origin == "shared":
        ends.they_write(0, length, 9)
        ends.snapshot("-c", "kept")


@pytest.mark.parametrize("extended", [False, True], ids=["plain", "subclusters"])
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, CLUSTER),
        (CLUSTER + 100, 10),
        (CLUSTER - 3000, 6000),
        (2048, 2 * CLUSTER),
        (5, 3 * CLUSTER),
    ],
)
def test_what_a_write_does_not_cover_is_copied(
    ends: Ends, origin: str, offset: int, length: int, *, extended: bool
) -> None:
    _prepare(ends, origin, {"extended_l2": True} if extended else {})
    before = bytes(ends.model)

    with ends.open() as disk:
        ends.write(disk, offset, pattern(length, 7))

    ends.agree()
    if origin == "shared":
        assert ends.their_bytes("-l", "snapshot.name=kept") == before


@pytest.mark.parametrize(
    ("options", "unit"),
    [({}, CLUSTER), ({"extended_l2": True}, CLUSTER // 32), ({"cluster_size": 4096}, 4096)],
    ids=["plain", "subclusters", "4 KiB"],
)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, CLUSTER),
        (3 * CLUSTER, 4 * CLUSTER),
        (2 * CLUSTER + 100, 1000),
        (CLUSTER - 600, 2 * CLUSTER + 1200),
    ],
)
def test_of_the_backing_image_only_what_is_not_covered_is_read(
    ends: Ends, options: dict[str, Any], unit: int, offset: int, length: int
) -> None:
    below = CountingStorage(pattern(1 << 20))
    ends.create(below=pattern(1 << 20), **options)

    with underlay.open_image(below, format="raw") as base, ends.open(backing=base) as disk:
        below.reads.clear()
        ends.write(disk, offset, pattern(length, 2))
        read = sum(length for _, length in below.reads)

    end = offset + length
    assert read == offset % unit + -end % unit
    ends.agree()


@pytest.mark.parametrize("origin", ["nowhere", "zero"])
def test_a_new_cluster_of_zeroes_costs_no_copying(ends: Ends, origin: str) -> None:
    _prepare(ends, origin, {})
    with ends.open() as disk:
        ends.write(disk, 3 * CLUSTER, b"first")  # has costs of its own
        before = disk.stats()
        ends.write(disk, CLUSTER + 512, pattern(512))
        written = [stats.write_bytes for stats in disk.stats().values()]
        assert sum(written) - sum(stats.write_bytes for stats in before.values()) <= 1024
    ends.agree()


# -- where it goes


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "theirs"])
@pytest.mark.parametrize(
    ("step", "options"),
    [
        (4096, {}),
        (CLUSTER, {}),
        (300_000, {}),
        (4096, {"extended_l2": True}),
        (CLUSTER, {"cluster_size": 4096}),
    ],
    ids=["4K", "cluster", "odd", "subclusters", "small clusters"],
)
def test_a_sequential_writer_gets_contiguous_room(
    ends: Ends, step: int, options: dict[str, Any], *, theirs: bool
) -> None:
    size = 3 << 20
    ends.create(8 << 20, theirs=theirs, **options)
    with ends.open() as disk:
        for offset in range(0, size, step):
            ends.write(disk, offset, pattern(min(step, size - offset), offset))

    data = [entry for entry in ends.map() if entry["data"]]
    assert len(data) <= 1 + (3 if options.get("cluster_size") else 0)  # L2 tables lie between
    ends.agree()


def test_one_write_over_many_tables_is_contiguous_but_for_them(ends: Ends) -> None:
    ends.create(2 << 20, cluster_size=512)
    with ends.open() as disk:
        ends.write(disk, 0, pattern(2 << 20))
    data = [entry for entry in ends.map() if entry["data"]]
    # 64 clusters a table; refcount blocks count 256 each.
    assert len(data) <= 64 + 18
    ends.agree()


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("layout", ["plain", "v2", "subclusters", "data file"])
def test_what_was_preallocated_is_used(ends: Ends, layout: str, mode: str) -> None:
    ends.create(1 << 20, theirs=True, preallocation=mode, **LAYOUTS[layout])
    size = ends.path.stat().st_size
    with ends.open() as disk:
        ends.write(disk, 100, pattern(200_000))
        ends.write(disk, (1 << 20) - 700, pattern(700))
    assert ends.path.stat().st_size <= size
    ends.agree()


@pytest.mark.parametrize("layout", ["plain", "512-byte clusters", "subclusters", "data file"])
def test_a_storage_of_whole_blocks_gets_the_same(ends: Ends, layout: str) -> None:
    """Past the page cache all requests are aligned, and their surroundings are read and kept."""
    ends.create(1 << 20, below=pattern(500_000), **LAYOUTS[layout])
    try:
        disk = ends.open(storage_options={"direct": True})
    except underlay.UnsupportedOperationError as error:
        pytest.skip(str(error))
    with disk:
        for number in range(25):
            ends.write(disk, number * 31_013, pattern(5000, number))
        disk.discard_to_zero(100_000, 300_000)
        ends.put(100_000, bytes(300_000))
        if not layout.startswith("data file"):
            disk.capability(Snapshottable).create_snapshot("s")
        ends.write(disk, 90_001, pattern(100_000))
        assert disk.read_bytes(0, disk.size) == ends.model
    ends.agree()


# -- several at a time


@pytest.mark.parametrize("layout", ["plain", "512-byte clusters", "subclusters", "data file"])
def test_vectors_are_written_as_one(ends: Ends, layout: str) -> None:
    ends.create(256 << 10, **LAYOUTS[layout])
    pieces = [pattern(length, length) for length in (1, 511, 70_000, 3, 20_000, 512)]
    with ends.open() as disk:
        disk.writev([memoryview(piece) for piece in pieces], 1000)
        ends.put(1000, b"".join(pieces))
        assert disk.read_bytes(0, disk.size) == ends.model
    ends.agree()


@pytest.mark.parametrize("layout", ["plain", "512-byte clusters", "subclusters", "data file"])
@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
def test_parts_of_a_write_go_at_a_time(
    ends: Ends, layout: str, *, backed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Parts meet inside one cluster.
    monkeypatch.setattr("underlay.writing.PART", 40_000)
    ends.create(512 << 10, below=pattern(400_000) if backed else b"", **LAYOUTS[layout])
    data = pattern(450_000, 3)

    async def write() -> None:
        gate = underlay.DirectoryGate()
        opened = underlay.aio.open_image(ends.path, format="qcow2", writable=True, gate=gate)
        async with await opened as disk:
            disk.set_async_write_parallelization(4)
            await disk.write(data, 777)
            await asyncio.gather(*(disk.write(bytes([n]) * 100, 9000 * n) for n in range(1, 20)))

    asyncio.run(write())
    ends.put(777, data)
    for number in range(1, 20):
        ends.put(9000 * number, bytes([number]) * 100)
    ends.agree()


# -- mapping for others


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("extended", [False, True], ids=["plain", "subclusters"])
def test_a_program_writes_through_a_mapping(ends: Ends, origin: str, *, extended: bool) -> None:
    _prepare(ends, origin, {"extended_l2": True} if extended else {})

    with ends.open() as disk, disk.lease():
        mapping = disk.ensure_data_mapping(CLUSTER + 5000, 3000)
        # It is shown before anything is written there, with the content that it had.
        assert disk.read_bytes(0, disk.size) == ends.model
        again = disk.get_mapping(CLUSTER + 5000)
        assert isinstance(again, Data)
        assert (again.offset, again.writable) == (mapping.offset, True)
        assert 0 < mapping.length <= 3000
        data = pattern(mapping.length, 4)
        mapping.storage.writev((data,), mapping.offset)
        ends.put(CLUSTER + 5000, data)
        assert disk.read_bytes(0, disk.size) == ends.model
    ends.agree()


def test_mapping_for_writing_leaves_subclusters_alone_that_are_data_already(ends: Ends) -> None:
    """Whoever writes to them meanwhile needs no ticket, and must not lose what he wrote."""
    ends.create(extended_l2=True)
    with ends.open() as disk:
        ends.write(disk, 4096, pattern(2048))
    memory = WritesSeen(ends.path.read_bytes())

    with underlay.open_image(memory, format="qcow2", writable=True) as disk:
        assert disk.read_bytes(0, disk.size) == ends.model
        data = disk.get_mapping(4096)
        assert isinstance(data, Data)
        memory.writes.clear()
        disk.ensure_data_mapping(0, CLUSTER)
        touched = [
            (offset, length)
            for offset, length in memory.writes
            if offset < data.offset + 2048 and data.offset < offset + length
        ]
        assert not touched
        assert disk.read_bytes(0, disk.size) == ends.model


# -- what stays, and what does not


def _with_strangers(ends: Ends) -> bytes:
    """Give the image an unknown compatible bit, an unknown extension and a longer header."""
    header = ends.header
    extensions = b"".join(
        struct.pack(">II", extension.type, len(extension.data))
        + extension.data
        + bytes(-len(extension.data) % 8)
        for extension in (*header.extensions, Extension(0x12345678, b"what is this?"))
    )
    ends.poke(header.header_length, f"{len(extensions)}s", extensions)
    ends.poke(80, "Q", header.compatible_features | 1 << 40)
    ends.poke(88, "Q", header.autoclear_features | 1 << 33)
    return ends.path.read_bytes()


def _everything(disk: SyncFormatAccess) -> None:
    snapshots = disk.capability(Snapshottable)
    disk.write(b"x" * 100_000, 1000)
    snapshots.create_snapshot("one")
    disk.write(b"y" * 100_000, 1000)
    disk.resize(disk.size * 3000)  # moves the L1 table
    snapshots.apply_snapshot("one")
    snapshots.delete_snapshot("one")
    disk.discard_to_zero(0, disk.size)


def test_what_we_do_not_know_survives_byte_for_byte(ends: Ends) -> None:
    ends.create()
    before = _with_strangers(ends)
    header = ends.header

    with ends.open() as disk:
        _everything(disk)

    after = ends.path.read_bytes()
    known = {"l1_table_offset", "l1_size", "refcount_table_offset", "snapshots_offset"}
    changed = attrs.evolve(
        ends.header,
        autoclear_features=header.autoclear_features,
        **{name: getattr(header, name) for name in known},
    )
    assert changed == header
    assert after[header.header_length : CLUSTER] == before[header.header_length : CLUSTER]
    ends.qemu_img("check", "-q", ends.path)


@pytest.mark.parametrize("length", [104, 112, 128])
def test_headers_of_any_length_keep_it(ends: Ends, length: int) -> None:
    """Shorter ones are of older programs; what a longer one has more is kept as it is."""
    ends.create(theirs=True)
    unknown = b"\0" * 8 + b"from the future." if length > 112 else b"\0" * 24
    ends.poke(100, "I", length)
    ends.poke(104, "24s", unknown)
    ends.poke(length, "II", 0, 0)  # no extensions
    before = ends.path.read_bytes()

    with ends.open() as disk:
        _everything(disk)

    assert ends.path.read_bytes()[100:length] == before[100:length]
    if length <= 112:
        ends.qemu_img("check", "-q", ends.path)


FIRST_CHANGES: dict[str, Callable[[SyncFormatAccess], object]] = {
    "write": lambda disk: disk.write(b"x", 5),
    "zero": lambda disk: disk.write_zeroes(0, CLUSTER),
    "discard": lambda disk: disk.discard_to_any(0, CLUSTER),
    "grow": lambda disk: disk.resize(2 << 20),
    "shrink": lambda disk: disk.resize(1 << 19),
    "snapshot": lambda disk: disk.capability(Snapshottable).create_snapshot("a"),
    "map": lambda disk: disk.ensure_data_mapping(0, 10),
    "compress": lambda disk: disk.capability(CompressedWriter).write_encoded(
        0, disk.capability(CompressedWriter).encode(memoryview(bytes(CLUSTER)))
    ),
}


@pytest.mark.parametrize("change", FIRST_CHANGES)
def test_the_first_change_says_that_bitmaps_are_out_of_date(ends: Ends, change: str) -> None:
    """Here of such as nobody can keep true: where its table is there is none."""
    ends.create(theirs=True)
    ends.qemu_img("bitmap", "--add", ends.path, "record")
    ends.they_write(0, CLUSTER, 1)
    directory = next(e for e in ends.header.extensions if e.type == 0x23852875).data
    (offset,) = struct.unpack_from(">Q", directory, 16)
    ends.poke(offset, "Q", 1 << 40)
    before = ends.header
    assert before.autoclear_features == 1

    with ends.open() as disk:
        disk.read_bytes(0, disk.size)
        assert ends.header == before
        FIRST_CHANGES[change](disk)
        # At once, and not when it is flushed.
        assert ends.header.autoclear_features == 0

    assert ends.header.extensions == before.extensions
    # QEMU no longer counts what bitmaps hold, and says so; nothing else is wrong.
    assert not ends.checked().get("corruptions")


@pytest.mark.parametrize("change", FIRST_CHANGES)
def test_from_the_first_change_on_bitmaps_are_in_use(ends: Ends, change: str) -> None:
    ends.create(theirs=True)
    ends.qemu_img("bitmap", "--add", ends.path, "record")
    ends.they_write(0, CLUSTER, 1)
    before = ends.path.read_bytes()

    def flags() -> object:
        return ends.info()["format-specific"]["data"]["bitmaps"][0]["flags"]

    with ends.open(lock=False) as disk:
        disk.read_bytes(0, disk.size)
        assert ends.path.read_bytes() == before
        FIRST_CHANGES[change](disk)
        # At once, and not when it is flushed.
        assert flags() == ["in-use", "auto"]

    assert flags() == ["auto"]
    ends.qemu_img("check", "-q", ends.path)


def test_bitmaps_keep_their_clusters_after_they_went_out_of_date(ends: Ends) -> None:
    """They may be looked at again, so nothing is written over them."""
    ends.create(theirs=True)
    ends.qemu_img("bitmap", "--add", ends.path, "record")
    ends.they_write(0, CLUSTER, 1)
    directory = next(e for e in ends.header.extensions if e.type == 0x23852875).data
    (offset,) = struct.unpack_from(">Q", directory, 16)
    ends.poke(88, "Q", 0)
    before = ends.path.read_bytes()[offset : offset + 32]
    assert b"record" in before

    for seed in range(2):
        with ends.open() as disk:
            ends.write(disk, 0, pattern(disk.size, seed))

    assert ends.path.read_bytes()[offset : offset + 32] == before


def test_lazy_refcounts_are_kept_as_a_wish_and_the_image_is_never_dirty(ends: Ends) -> None:
    ends.create(theirs=True, lazy_refcounts=True)
    with ends.open() as disk:
        ends.write(disk, 0, pattern(200_000))
        disk.flush()
        assert ends.header.incompatible_features == 0
    assert ends.header.compatible_features == 1
    ends.agree()


def test_an_image_that_was_not_closed_is_mended_before_the_first_write(ends: Ends) -> None:
    ends.create(theirs=True, lazy_refcounts=True)
    with pytest.raises(AssertionError):
        ends.they("write -q -P 7 0 200k", "flush", "abort")
    ends.put(0, b"\7" * (200 << 10))
    assert ends.header.incompatible_features == 1
    dirty = ends.path.read_bytes()

    with ends.open() as disk:
        assert disk.read_bytes(0, disk.size) == ends.model
        assert ends.path.read_bytes() == dirty
        ends.write(disk, 300 << 10, pattern(1000))
        assert ends.header.incompatible_features == 0
    ends.agree()


# -- corruption met while writing


def _l2_to_metadata(ends: Ends) -> None:
    at, _ = ends.l2_entry(CLUSTER)
    ends.poke(at, "Q", ends.header.l1_table_offset | 1 << 63)


def _l2_misaligned(ends: Ends) -> None:
    at, entry = ends.l2_entry(CLUSTER)
    ends.poke(at, "Q", entry | 512)


def _free_says_the_count(ends: Ends) -> None:
    """All counts are zero: the first free cluster is the header's own."""
    header = ends.header
    block = ends.word(header.refcount_table_offset)
    ends.poke(block, f"{header.cluster_size}x")


WRITES: dict[str, Callable[[SyncFormatAccess], object]] = {
    "write": lambda disk: disk.write(b"x" * 100, CLUSTER + 50),
    "map": lambda disk: disk.ensure_data_mapping(CLUSTER, 10),
    "compress": lambda disk: disk.capability(CompressedWriter).write_encoded(CLUSTER, b"x"),
}


@pytest.mark.parametrize("damage", [_l2_to_metadata, _l2_misaligned, _free_says_the_count])
@pytest.mark.parametrize("change", WRITES)
def test_damage_met_while_writing_stops_it_and_is_marked(
    ends: Ends,
    damage: Callable[[Ends], None],
    change: str,
) -> None:
    ends.create(theirs=True)
    ends.they_write(0, 2 * CLUSTER, 1)
    if damage is _free_says_the_count:
        ends.snapshot("-c", "shared")  # a write needs a new cluster
    damage(ends)
    before = bytearray(ends.path.read_bytes())

    with ends.open() as disk:
        with pytest.raises(CorruptImageError):
            WRITES[change](disk)
        with pytest.raises(CorruptImageError, match="nothing more is written"):
            disk.write(b"y", 0)
        with pytest.raises(CorruptImageError, match="nothing more is written"):
            disk.flush()
        assert disk.read_bytes(0, 100) == b"\1" * 100
        disk.abandon()

    struct.pack_into(">Q", before, 72, 2)
    assert ends.path.read_bytes() == before
    with pytest.raises(CorruptImageError, match="marked as corrupt"):
        ends.open()


FREEING: dict[str, Callable[[SyncFormatAccess], object]] = {
    "discard": lambda disk: disk.discard_to_zero(0, 4 * CLUSTER),
    "zero": lambda disk: disk.write_zeroes(CLUSTER, CLUSTER),
    "show the backing image": lambda disk: disk.discard_to_backing(CLUSTER, CLUSTER),
    "shrink": lambda disk: disk.resize(CLUSTER),
}


@pytest.mark.parametrize("damage", [_l2_to_metadata, _l2_misaligned])
@pytest.mark.parametrize("change", FREEING)
def test_damage_met_while_room_is_let_go_frees_nothing_of_it(
    ends: Ends,
    damage: Callable[[Ends], None],
    change: str,
) -> None:
    ends.create(theirs=True)
    ends.they_write(0, 2 * CLUSTER, 1)
    damage(ends)
    header = ends.header
    before = ends.path.read_bytes()

    disk = ends.open()
    with pytest.raises(CorruptImageError):
        FREEING[change](disk)
    with pytest.raises(CorruptImageError, match="nothing more is written"):
        disk.close()

    assert ends.header.incompatible_features == 2
    after = ends.path.read_bytes()
    for offset in (header.refcount_table_offset, header.l1_table_offset):
        assert after[offset : offset + CLUSTER] == before[offset : offset + CLUSTER]


def test_version_2_has_no_mark_for_damage_and_is_left_as_it_is(ends: Ends) -> None:
    ends.create(theirs=True, compat="v2")
    ends.they_write(0, 2 * CLUSTER, 1)
    _l2_to_metadata(ends)
    before = ends.path.read_bytes()

    with ends.open() as disk:
        for _ in range(2):
            with pytest.raises(CorruptImageError, match=r"nothing more is written|check the image"):
                disk.write(b"x" * 100, CLUSTER + 50)
        assert disk.read_bytes(0, 100) == b"\1" * 100
        disk.abandon()

    assert ends.path.read_bytes() == before


# -- caches


def _held(disk: SyncFormatAccess) -> int:
    """Bytes of tables that a disk keeps in memory, waiting or not."""
    driver: Any = disk.inner
    writer = driver.writer
    blocks = writer.allocator._blocks
    tables = len(driver._cache) * driver.geometry.cluster_size
    return int(tables + sum(map(len, blocks.values())))


@pytest.mark.parametrize(("cluster", "step", "times"), [(512, 32 << 10, 10), (4096, 2 << 20, 100)])
def test_caches_are_bounded_whatever_is_written(
    ends: Ends, cluster: int, step: int, times: int
) -> None:
    cache = 64 << 10
    tables = times * cache // cluster
    memory = MemoryStorage(0)  # which costs no time to sync
    underlay.create(memory, size=tables * step, cluster_size=cluster).close()

    most = 0
    with underlay.open_image(
        memory, format="qcow2", writable=True, cache_size=cache, refcount_cache_size=cache
    ) as disk:
        for number in range(tables):
            disk.write(b"%08d" % number, number * step)
            most = max(most, _held(disk))
        for number in range(0, tables, 7):
            assert disk.read_bytes(number * step, 8) == b"%08d" % number
    assert most <= 2 * cache + 8 * cluster
    content = bytearray(memory.size())
    memory.readv((content,), 0)
    ends.path.write_bytes(content)
    ends.qemu_img("check", "-q", ends.path)


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_the_smallest_caches_write_the_same(ends: Ends, size: int) -> None:
    ends.create(600 << 10, cluster_size=512)
    with ends.open(cache_size=size, refcount_cache_size=size) as disk:
        for number in range(60):
            ends.write(disk, number * 7919 % 590 * 1024, pattern(5000, number))
        disk.discard_to_zero(100_000, 200_000)
        ends.put(100_000, bytes(200_000))
    ends.agree()
