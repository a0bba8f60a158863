"""All ways to ask where guest bytes are give one answer."""

from __future__ import annotations

import itertools
import random
import struct
import threading
from collections.abc import Generator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from underlay.errors import CorruptImageError, OptionError, OutOfRangeError
from underlay.face import run_blocking
from underlay.gate import Reference, ReferenceKind
from underlay.handle import StorageHandle
from underlay.mapping import Backing, Data, Eof, ShallowMapping, Special, Zero
from underlay_drivers.qcow2 import Qcow2
from underlay_drivers.qcow2 import mappings as module
from underlay_drivers.qcow2.cache import TableCache
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.tables import empty_table
from underlay_storage.memory import MemoryStorage

from .conftest import Maker
from .images import Image, mappings, open_bytes, read

COPIED = 1 << 63
COMPRESSED = 1 << 62
CLUSTER = 64 << 10

# -- images of any shape: three L2 tables, the middle one missing

BITS = 14
SIZE = 1 << BITS
#: Host clusters: header, refcount table, L1 table, two L2 tables, then data.
DATA_FROM, HOST_CLUSTERS = 5, 40


def assemble(
    entries: list[tuple[int, int]], *, extended: bool, external: bool, size: int, at: int
) -> bytes:
    """An image whose L2 entries from ``at`` on are these, in the first table and in the third."""
    entry_bytes = 16 if extended else 8
    in_table = SIZE // entry_bytes
    header = Header(
        version=3,
        cluster_bits=BITS,
        size=size,
        l1_size=3,
        l1_table_offset=2 * SIZE,
        refcount_table_offset=SIZE,
        refcount_table_clusters=1,
        incompatible_features=(16 if extended else 0) | (4 if external else 0),
        header_length=104,
    )
    image = bytearray(HOST_CLUSTERS * SIZE)
    packed = header.to_bytes()
    image[: len(packed)] = packed
    struct.pack_into(">3Q", image, 2 * SIZE, 3 * SIZE | COPIED, 0, 4 * SIZE | COPIED)
    for table in (3, 4):
        guest = (0 if table == 3 else 2) * in_table * SIZE
        for number, (entry, bitmap) in enumerate(entries, at):
            # With a data file the host offset is the guest's.
            own = entry & ~0xFF_FFFF_FFFF_FE00 | guest + number * SIZE
            value = own if external and entry & COPIED and not entry & COMPRESSED else entry
            place = table * SIZE + number % in_table * entry_bytes
            struct.pack_into(">Q", image, place, value)
            if extended:
                struct.pack_into(">Q", image, place + 8, bitmap)
    return bytes(image)


hosts = st.integers(DATA_FROM, HOST_CLUSTERS + 1).map(lambda number: number * SIZE)
descriptors = st.one_of(
    st.just(0),
    st.just(1),
    hosts.map(lambda host: host | COPIED),
    hosts,
    hosts.map(lambda host: host | 1),
    hosts.map(lambda host: COMPRESSED | host + 77 | 3 << 56),
    st.sampled_from([1 << 3, 1 << 60, COPIED, COPIED | 1, 2 * SIZE | COPIED, SIZE, 512]),
)
bitmaps = st.sampled_from(
    [0, 0xFFFFFFFF, 0xFFFFFFFF << 32, 1, 1 << 63, 0xFF00FF, 0xF << 40 | 0xF, 1 << 32 | 1]
)


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Entries, among them runs that continue each other."""
    entries: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(1, 8))):
        entry, bitmap = draw(descriptors), draw(bitmaps)
        step = SIZE if entry & ~COMPRESSED & 0xFF_FFFF_FFFF_C000 else 0
        length = draw(st.integers(1, 4))
        entries += [(entry + number * step, bitmap) for number in range(length)]
    return entries


@contextmanager
def opened(data: bytes, *, external: bool) -> Generator[Qcow2]:
    with open_bytes(data) as disk:
        if external:
            disk.set_data_file(MemoryStorage(bytes(1000)))
        yield disk


def key(mapping: ShallowMapping) -> tuple[object, ...]:
    """What must agree, but for the length."""
    match mapping:
        case Data(storage, offset, _, writable):
            return "data", storage, offset, writable
        case Zero(_, explicit, offset):
            return "zero", explicit, offset
        case Special(_, storage, offset, host_length, _, skip, unit):
            return "special", storage, offset, host_length, skip, unit
        case _:
            raise AssertionError(mapping)


def moved(found: tuple[object, ...], distance: int) -> tuple[object, ...]:
    """What a mapping says of the bytes ``distance`` further on."""
    return tuple(
        item + distance
        if isinstance(item, int)
        and not isinstance(item, bool)
        and place == (4 if found[0] == "special" else 2)
        else item
        for place, item in enumerate(found)
    )


def ask(disk: Qcow2, offset: int) -> tuple[object, ...] | None:
    """What ``get_mapping`` says of one byte; None for damage."""
    try:
        return key(run_blocking(disk.get_mapping(offset, 1)))
    except CorruptImageError:
        return None


@settings(max_examples=100, deadline=None)
@given(
    entries=runs(),
    at=st.sampled_from([0, 1, 100]),
    extended=st.booleans(),
    external=st.booleans(),
    cut=st.integers(0, 3 * SIZE),
)
def test_one_answer(
    entries: list[tuple[int, int]], at: int, extended: bool, external: bool, cut: int
) -> None:
    in_table = SIZE // (16 if extended else 8)
    disk_size = (2 * in_table + at + len(entries)) * SIZE - cut
    data = assemble(entries, extended=extended, external=external, size=disk_size, at=at)
    step = SIZE // 32 if extended else SIZE
    interesting = [
        *range(0, (at + len(entries) + 2) * SIZE, step),
        *range(2 * in_table * SIZE, disk_size, step),
    ]
    with opened(data, external=external) as disk:
        answers = {offset: ask(disk, offset) for offset in interesting}
        for offset, answer in answers.items():
            location = disk.locate(offset)
            if answer is None or answer[0] != "data":
                assert location is None
            else:
                assert location is not None
                assert ("data", location[0], location[1], location[3]) == answer
                assert 0 < location[2] <= min(SIZE, disk_size - offset)
        # A walk ends at the first damage: begin behind each, too.
        damage = [offset for offset, answer in answers.items() if answer is None]
        behind = {offset // SIZE * SIZE + SIZE for offset in damage}
        starts = [0, SIZE + 512, (at + 1) * SIZE - 1, 2 * in_table * SIZE, *sorted(behind)[:8]]
        for start in starts:
            for bulk in (False, True):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(module, "_BULK_CLUSTERS", 0 if bulk else 1 << 40)
                    _check_walk(disk, start, answers)


def _check_walk(disk: Qcow2, start: int, answers: dict[int, tuple[object, ...] | None]) -> None:
    """``iter_mappings`` says what single questions do, up to the first damage."""
    found: list[tuple[int, ShallowMapping]] = []

    async def walk() -> int | None:
        at = start
        try:
            async for mapping in disk.iter_mappings(start, disk.size()):
                found.append((at, mapping))
                at += mapping.length
        except CorruptImageError:
            return at
        return None

    damaged = run_blocking(walk())
    if damaged is None:
        assert (found[-1][0] + found[-1][1].length if found else start) == max(start, disk.size())
    else:
        assert ask(disk, damaged) is None
    expected = ((at, answer) for at, answer in sorted(answers.items()) if at >= start)
    for offset, answer in expected:
        for at, mapping in found:
            if at <= offset < at + mapping.length:
                assert answer == moved(key(mapping), offset - at)
    for (at, one), (_, other) in itertools.pairwise(found):
        same = moved(key(one), one.length) == key(other)
        assert not same or isinstance(one, Special), (at, one, other)


# -- single questions


def test_a_run_reaches_as_far_as_it_is_asked_to(make: Maker) -> None:
    image = make("compat=1.1", "4M", "write 0 1M")
    with open_bytes(image.data) as disk:
        mapping = run_blocking(disk.get_mapping(100, 1 << 20))
        assert isinstance(mapping, Data)
        assert mapping.length == (1 << 20) - 100
        assert run_blocking(disk.get_mapping(100, 1)).length == CLUSTER - 100


def test_what_is_nowhere_is_one_run_however_long(make: Maker) -> None:
    image = make("compat=1.1", "8T", "write 7T 64k")
    with open_bytes(image.data) as disk:
        found = mappings(disk)
        assert [(at, type(mapping)) for at, mapping in found] == [
            (0, Zero),
            (7 << 40, Data),
            ((7 << 40) + CLUSTER, Zero),
        ]
        assert run_blocking(disk.get_mapping(0, 8 << 40)).length >= 6 << 40


def test_a_run_goes_on_in_the_next_table_if_that_is_at_hand(make: Maker) -> None:
    image = make("compat=1.1,preallocation=metadata,cluster_size=4k", "4M")
    with open_bytes(image.data) as disk:
        end = 2 << 20  # of the first L2 table's range
        first = run_blocking(disk.get_mapping(0, 4 << 20))
        assert first.length <= end
        assert read(disk, end, 1) == b"\0"
        reads = disk.image.stats.read_requests
        run_blocking(disk.get_mapping(end - 8192, 16384))
        assert disk.image.stats.read_requests == reads


def test_zeroes_tell_where_their_space_is(plain: Image) -> None:
    plain.put(plain.l2(2), "Q", plain.word(plain.l2(1)) | 1)
    with open_bytes(plain.data) as disk:
        mapping = run_blocking(disk.get_mapping(2 * CLUSTER + 5, 10))
        assert isinstance(mapping, Zero)
        assert mapping.offset == (plain.word(plain.l2(1)) & ~COPIED) + 5


def test_offsets_outside_the_disk(plain: Image) -> None:
    with open_bytes(plain.data) as disk:
        assert read(disk, 0, 1) == b"\x11"
        for offset in (-1, -(1 << 70), disk.size(), 1 << 70):
            assert disk.locate(offset) is None
        assert isinstance(run_blocking(disk.get_mapping(disk.size(), 1)), Eof)
        with pytest.raises(OutOfRangeError):
            run_blocking(disk.get_mapping(-1, 1))


def test_a_file_that_has_grown_since_is_looked_at_again(make: Maker) -> None:
    image = make("compat=1.1", "4M", "write -P 0x11 0 64k", "write -P 0x22 64k 64k")
    whole = bytes(image.data)
    start = image.word(image.l2(1)) & ~COPIED
    storage = MemoryStorage(whole[:start])
    disk = Qcow2.open_image_sync(storage)
    with pytest.raises(CorruptImageError):
        read(disk, CLUSTER, 1)
    storage.writev((whole[start:],), start)
    assert read(disk, CLUSTER, 1) == b"\x22"
    assert disk.locate(CLUSTER) is not None
    run_blocking(disk.close())


def test_backing_and_nothing(make: Maker, plain: Image) -> None:
    overlay = make("compat=1.1", "8M", "write -P 0x99 0 4k")
    name = b"base"
    overlay.put(8, "QI", 1024, len(name))
    overlay.data[1024 : 1024 + len(name)] = name
    with open_bytes(plain.data) as base, open_bytes(overlay.data) as disk:
        (reference,) = disk.references()
        assert reference == Reference(kind=ReferenceKind.BACKING, name="base")
        with pytest.raises(OSError, match="not attached"):
            read(disk, CLUSTER, 1)
        disk.attach(reference, base)
        assert disk.references() == []
        mapping = run_blocking(disk.get_mapping(CLUSTER + 7, 8 << 20))
        assert isinstance(mapping, Backing)
        assert (mapping.layer, mapping.offset) == (base, CLUSTER + 7)
        assert read(disk, CLUSTER, 1) == b"\x22"
        assert read(disk, 5 << 20, 4096) == bytes(4096)
        disk.set_backing(None)
        assert read(disk, CLUSTER, 1) == b"\0"


# -- the cache


def test_the_cache_is_bounded_and_forgets_what_is_not_used() -> None:
    cache = TableCache(size=8 * 4096, table_bytes=4096)
    tables = [empty_table(512) for _ in range(100)]
    for number, table in enumerate(tables):
        cache.put(number, table, cache.epoch)
        assert cache.get(0) is tables[0]  # what is used stays
        assert len(cache) <= 8
    assert cache.hit(99) is tables[99]
    assert cache.get(50) is None
    epoch = cache.epoch
    cache.clear()
    assert len(cache) == 0
    assert cache.hit(99) is None
    cache.put(1, tables[1], epoch)
    assert cache.get(1) is None  # read before, put after


def test_a_small_cache_reads_the_same(make: Maker) -> None:
    image = make("compat=1.1,cluster_size=4k,preallocation=metadata", "64M", "write -P 0x77 0 64M")
    dice = random.Random(1)
    with open_bytes(image.data, options={"cache_size": 3 * 4096}) as disk:
        for _ in range(300):
            offset = dice.randrange(64 << 20)
            assert read(disk, offset, 1) == b"\x77"
        assert len(disk._cache) <= 2
        assert disk.image.stats.read_requests > 200


@pytest.mark.parametrize("size", [-1, "many", 1.5])
def test_a_cache_size_is_a_number_of_bytes(plain: Image, size: object) -> None:
    with pytest.raises(OptionError), open_bytes(plain.data, options={"cache_size": size}):
        pass


def test_threads_share_a_disk_with_a_small_cache(make: Maker) -> None:
    image = make("compat=1.1,cluster_size=4k", "32M", *(
        f"write -P {number + 1} {number * 2}M 4k" for number in range(16)
    ))  # fmt: skip
    wrong: list[int] = []
    with open_bytes(image.data, options={"cache_size": 4 * 4096}) as disk:

        def work(seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(300):
                number = dice.randrange(16)
                if read(disk, number << 21, 4096) != bytes([number + 1]) * 4096:
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_few_requests_open_an_image(make: Maker) -> None:
    image = make("compat=1.1", "4M", "write 0 64k")
    handle = StorageHandle(MemoryStorage(bytes(image.data)), owned=True)
    disk = Qcow2.open_image_sync(handle)
    assert handle.stats.read_requests == 2
    run_blocking(disk.close())
    run_blocking(handle.close())


def test_a_disk_of_no_bytes_opens(make: Maker) -> None:
    with open_bytes(make("compat=1.1", "0").data) as disk:
        assert disk.size() == 0
        assert disk.locate(0) is None
        assert mappings(disk) == []


def test_a_size_that_is_no_multiple_of_anything_is_kept(plain: Image) -> None:
    plain.put(24, "Q", (1 << 20) + 17)
    with open_bytes(plain.data) as disk:
        assert disk.size() == (1 << 20) + 17
        assert sum(mapping.length for _, mapping in mappings(disk)) == (1 << 20) + 17


def test_what_lies_before_damage_is_listed(make: Maker) -> None:
    """By the walk of few clusters, and by the one of many."""
    for size in ("4M", "4G"):
        image = make("compat=1.1", size, "write 0 128k", "write 256k 64k")
        image.put(image.l2(5), "Q", 1 << 5)
        with open_bytes(image.data) as disk:
            found: list[int] = []

            async def collect() -> None:
                async for mapping in disk.iter_mappings(0, disk.size()):
                    found.append(mapping.length)  # noqa: B023, PERF401

            with pytest.raises(CorruptImageError) as caught:
                collect().send(None)
            assert found == [128 << 10, 128 << 10, 64 << 10]
            assert caught.value.field == "L2 entry"
            assert caught.value.offset == image.l2(5)
            assert caught.value.value == 1 << 5
