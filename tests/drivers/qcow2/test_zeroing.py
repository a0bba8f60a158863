"""Zeroing and discarding: what is read afterwards, and what becomes of the room."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from underlay.errors import OptionError
from underlay.mapping import Data, Zero

from .ends import LAYOUTS, Ends, backable, pattern

CLUSTER = 65536
SIZE = 1 << 20

BACKABLE = backable(LAYOUTS)

RANGES = [
    (0, SIZE),
    (CLUSTER, 3 * CLUSTER),
    (CLUSTER + 1, 3 * CLUSTER),
    (100, 200),
    (2 * CLUSTER - 2048, 4096),
    (5 * CLUSTER + 2048, 6 * CLUSTER),
]


def _prepare(ends: Ends, layout: str, *, backed: bool, theirs: bool = True) -> None:
    """QEMU writes: data, zeroes with room and without, compressed, shared, and nothing."""
    options = LAYOUTS[layout]
    ends.create(SIZE, theirs=theirs, below=pattern(SIZE) if backed else b"", **options)
    ends.they_write(0, 4 * CLUSTER, 1)
    if "data_file" not in options:
        ends.snapshot("-c", "kept")
        ends.they_write(2 * CLUSTER, 2 * CLUSTER, 2)
        size = options.get("cluster_size", CLUSTER)
        for offset in range(4 * CLUSTER, 6 * CLUSTER, CLUSTER):
            ends.they_write(offset, size, 3, "-c")
    ends.they(f"write -q -z {6 * CLUSTER} {CLUSTER}", f"write -q -P 4 {7 * CLUSTER} 2k")
    ends.put(6 * CLUSTER, bytes(CLUSTER))
    ends.put(7 * CLUSTER, b"\4" * 2048)
    ends.they(f"write -q -P 5 {9 * CLUSTER} 128k", f"write -q -z -u {10 * CLUSTER} 64k")
    ends.put(9 * CLUSTER, b"\5" * CLUSTER + bytes(CLUSTER))


@pytest.mark.parametrize("method", ["write_zeroes", "discard_to_zero"])
@pytest.mark.parametrize(("layout", "backed"), BACKABLE)
def test_exactly_the_range_reads_as_zeroes(
    ends: Ends, layout: str, method: str, *, backed: bool
) -> None:
    _prepare(ends, layout, backed=backed)
    start = ends.path.read_bytes()
    model = bytes(ends.model)
    data = None if ends.data_file is None else ends.data_file.read_bytes()
    for offset, length in RANGES:
        ends.path.write_bytes(start)
        if data is not None and ends.data_file is not None:
            ends.data_file.write_bytes(data)
        ends.model[:] = model
        with ends.open() as disk:
            getattr(disk, method)(offset, length)
            ends.put(offset, bytes(length))
            assert disk.read_bytes(0, SIZE) == ends.model, (offset, length)
        ends.agree()
        if ends.data_file is not None and LAYOUTS[layout].get("data_file_raw"):
            assert ends.data_file.read_bytes()[:SIZE] == ends.model


@pytest.mark.parametrize(("layout", "backed"), BACKABLE)
def test_after_discarding_to_anything_each_byte_is_old_or_zero(
    ends: Ends, layout: str, *, backed: bool
) -> None:
    _prepare(ends, layout, backed=backed)
    with ends.open() as disk:
        for offset, length in ((5 * CLUSTER + 2048, 6 * CLUSTER), (100, 3 * CLUSTER)):
            disk.discard_to_any(offset, length)
            found = disk.read_bytes(0, SIZE)
            for at in range(0, SIZE, 512):
                old, new = ends.model[at : at + 512], found[at : at + 512]
                inside = offset < at + 512 and at < offset + length
                assert new == old or (inside and set(new) <= {0, *old}), hex(at)
            ends.model[:] = found
    ends.agree()


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize(
    "layout", ["v3", "v2", "subclusters", "data file", "data file with subclusters"]
)
def test_after_discarding_to_the_backing_image_it_shows_through(
    ends: Ends, layout: str, *, backed: bool
) -> None:
    _prepare(ends, layout, backed=backed)
    with ends.open() as disk:
        disk.discard_to_backing(CLUSTER, SIZE - CLUSTER)
        below = pattern(SIZE) if backed else bytes(SIZE)
        ends.put(CLUSTER, below[CLUSTER:])
        assert disk.read_bytes(0, SIZE) == ends.model
    ends.agree()
    with ends.open() as disk:
        # A second time there is nothing left to do.
        disk.discard_to_backing(CLUSTER, SIZE - CLUSTER)
        ends.write(disk, 3 * CLUSTER + 5, pattern(10))
    ends.agree()


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("layout", ["v3", "subclusters"])
def test_what_a_snapshot_holds_stays(ends: Ends, layout: str, *, backed: bool) -> None:
    _prepare(ends, layout, backed=backed)
    kept = ends.their_bytes("-l", "snapshot.name=kept")
    with ends.open() as disk:
        disk.discard_to_zero(0, SIZE)
        ends.write(disk, 0, pattern(100))
    ends.put(100, bytes(SIZE - 100))
    ends.agree()
    assert ends.their_bytes("-l", "snapshot.name=kept") == kept


# -- what becomes of the room


def _kinds(ends: Ends, offset: int = 0, length: int = SIZE) -> list[tuple[bool, bool, bool]]:
    """What ``qemu-img map`` says of the clusters of a range: data, zero, has room."""
    return [
        (bool(entry["data"]), bool(entry["zero"]), "offset" in entry)
        for entry in ends.map()
        for at in range(entry["start"], entry["start"] + entry["length"], CLUSTER)
        if offset <= at < offset + length
    ]


def test_zeroing_keeps_the_room_and_writes_nothing_of_it(ends: Ends) -> None:
    ends.create(theirs=True)
    ends.they_write(0, 4 * CLUSTER, 7)
    with ends.open() as disk:
        disk.write_zeroes(CLUSTER, 2 * CLUSTER)
        written = sum(stats.write_bytes for stats in disk.stats().values())
        mapping = disk.get_mapping(CLUSTER)
        assert isinstance(mapping, Zero)
        assert (mapping.explicit, mapping.length) == (True, 2 * CLUSTER)
    assert written == 0
    assert _kinds(ends, CLUSTER, 2 * CLUSTER) == [(False, True, True)] * 2
    # It is used again.
    before = ends.path.stat().st_size
    ends.put(CLUSTER, bytes(2 * CLUSTER))
    with ends.open() as disk:
        ends.write(disk, CLUSTER, pattern(100))
    assert ends.path.stat().st_size == before
    ends.agree()


def test_discarding_gives_the_room_back(ends: Ends) -> None:
    ends.create(theirs=True)
    ends.they_write(0, 4 * CLUSTER, 7)
    with ends.open() as disk:
        disk.discard_to_zero(CLUSTER, 2 * CLUSTER)
    assert _kinds(ends, CLUSTER, 2 * CLUSTER) == [(False, True, False)] * 2


@pytest.mark.parametrize("options", [{"discard": "ignore"}, {"discard": "unmap"}, {}])
def test_discards_can_be_ignored(ends: Ends, options: dict[str, Any]) -> None:
    ends.create(theirs=True)
    ends.they_write(0, 4 * CLUSTER, 7)
    ignored = bool(options) and options["discard"] == "ignore"
    with ends.open(**options) as disk:
        disk.discard_to_any(0, 2 * CLUSTER)
        disk.discard_to_zero(2 * CLUSTER, 2 * CLUSTER)
        found = disk.read_bytes(0, 2 * CLUSTER)
    # Ignored, a discard leaves what was there; but what must be zero is, and keeps its room.
    assert found == (b"\7" if ignored else b"\0") * (2 * CLUSTER)
    ends.put(0, found + bytes(2 * CLUSTER))
    data, zero = (True, False, True), (False, True, ignored)
    assert _kinds(ends, 0, 4 * CLUSTER) == [data if ignored else zero] * 2 + [zero] * 2
    ends.agree()


@pytest.mark.parametrize("option", ["discard", "detect_zeroes"])
def test_an_unknown_choice_is_an_error_that_names_the_known(ends: Ends, option: str) -> None:
    ends.create()
    before = ends.path.read_bytes()
    with pytest.raises(OptionError, match=r"known: (unmap, ignore|off, on, unmap)") as caught:
        ends.open(writable=True, **{option: "perhaps"})
    assert caught.value.option == option
    assert ends.path.read_bytes() == before


# -- written zeroes


@pytest.mark.parametrize("layout", ["v3", "v2", "subclusters", "data file"])
@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("mode", ["off", "on", "unmap"])
def test_written_zeroes_are_found(ends: Ends, layout: str, mode: str, *, backed: bool) -> None:
    _prepare(ends, layout, backed=backed)
    with ends.open(detect_zeroes=mode) as disk:
        for offset, length in ((0, 2 * CLUSTER), (2 * CLUSTER + 100, CLUSTER), (SIZE - 9, 9)):
            ends.write(disk, offset, bytes(length))
        ends.write(disk, 9 * CLUSTER, bytes(CLUSTER - 1) + b"x")
        disk.writev([bytes(100), bytearray(1000)], 8 * CLUSTER)
        ends.put(8 * CLUSTER, bytes(1100))
        assert disk.read_bytes(0, SIZE) == ends.model
    ends.agree()


def test_what_becomes_of_written_zeroes(ends: Ends) -> None:
    found: dict[tuple[str, str], tuple[bool, bool, bool]] = {}
    for mode, discard in itertools.product(("off", "on", "unmap"), ("unmap", "ignore")):
        ends.path.unlink(missing_ok=True)
        ends.create(theirs=True)
        ends.they_write(0, CLUSTER, 7)
        with ends.open(detect_zeroes=mode, discard=discard) as disk:
            ends.write(disk, 0, bytes(CLUSTER))
        ends.agree()
        (found[mode, discard],) = _kinds(ends, 0, CLUSTER)
    data, reserved, nowhere = (True, False, True), (False, True, True), (False, True, False)
    assert found == {
        ("off", "unmap"): data,
        ("off", "ignore"): data,
        ("on", "unmap"): reserved,
        ("on", "ignore"): reserved,
        ("unmap", "unmap"): nowhere,
        ("unmap", "ignore"): reserved,
    }


def test_zeroes_written_where_nothing_is_take_no_room(ends: Ends) -> None:
    ends.create()
    with ends.open(detect_zeroes="on") as disk:
        disk.write(bytes(SIZE), 0)
        assert not isinstance(disk.get_mapping(0), Data)
    assert ends.path.stat().st_size <= 5 * CLUSTER
    ends.agree()


# -- subclusters that cannot change alone


@pytest.mark.parametrize("method", ["write_zeroes", "discard_to_zero"])
def test_a_compressed_cluster_at_the_start_does_not_keep_the_rest_from_being_freed(
    ends: Ends, method: str
) -> None:
    ends.create(8 << 20, extended_l2=True)
    ends.they_write(0, CLUSTER, 1, "-c")
    ends.they_write(CLUSTER, (8 << 20) - CLUSTER, 2)
    with ends.open() as disk:
        getattr(disk, method)(CLUSTER // 2, (8 << 20) - CLUSTER // 2)
        written = sum(stats.write_bytes for stats in disk.stats().values())
        ends.put(CLUSTER // 2, bytes((8 << 20) - CLUSTER // 2))
    assert written <= 2 * CLUSTER
    ends.agree()


def test_random_zeroing_and_writing(ends: Ends) -> None:
    """Many in one session, over everything that there can be, with QEMU's word at the end."""
    _prepare(ends, "subclusters", backed=True)
    numbers = itertools.cycle((13, 7, 29, 3, 17))
    with ends.open() as disk:
        offset = 0
        for turn, number in zip(range(200), numbers, strict=False):
            offset = (offset + number * 12_345) % (SIZE - 200_000)
            length = number * turn * 31 % 150_000 + 1
            match turn % 4:
                case 0:
                    ends.write(disk, offset, pattern(length, turn))
                case 1:
                    disk.write_zeroes(offset, length)
                    ends.put(offset, bytes(length))
                case 2:
                    disk.discard_to_zero(offset, length)
                    ends.put(offset, bytes(length))
                case _:
                    disk.flush()
        assert disk.read_bytes(0, SIZE) == ends.model
    ends.agree()


@pytest.mark.parametrize(("offset", "length"), RANGES)
@pytest.mark.parametrize("method", ["write_zeroes", "discard_to_zero"])
@pytest.mark.parametrize("layout", ["v2", "v3", "subclusters", "512-byte clusters"])
def test_zeroes_stay_when_the_backing_image_is_there_again(
    ends: Ends, layout: str, method: str, offset: int, length: int
) -> None:
    ends.create(SIZE, theirs=True, below=pattern(SIZE), **LAYOUTS[layout])
    with ends.open(backing=None) as disk:
        getattr(disk, method)(offset, length)
        assert not any(disk.read_bytes(0, SIZE))
    content = ends.their_bytes()
    assert content[offset : offset + length] == bytes(length)
    start, end = offset - offset % CLUSTER, offset + length + -(offset + length) % CLUSTER
    assert content[:start] == ends.model[:start]
    assert content[end:] == ends.model[end:]
    ends.qemu_img("check", "-q", ends.path)


def test_discarding_to_anything_writes_nothing_where_the_backing_image_is_missing(
    ends: Ends,
) -> None:
    ends.create(SIZE, theirs=True, below=pattern(SIZE), compat="v2")
    before = ends.path.read_bytes()
    with ends.open(backing=None) as disk:
        disk.discard_to_any(100, SIZE // 2)
    assert ends.path.read_bytes() == before
