"""Snapshots that we take, apply and delete: QEMU lists and reads them, and the other way round."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from typing import Any

import pytest

import underlay
from underlay import SyncFormatAccess
from underlay.capabilities import Snapshottable
from underlay.errors import ConflictError, OptionError, UnsupportedOperationError
from underlay_drivers.qcow2.snapshots import SnapshotEntry
from underlay_storage.file import FileStorage

from .ends import Ends, pattern

SIZE = 1 << 20
LAYOUTS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v2": {"compat": "v2"},
    "subclusters": {"extended_l2": True},
    "512-byte clusters": {"cluster_size": 512},
    "64-bit counts": {"cluster_size": 512, "refcount_bits": 64},
}


def able(disk: SyncFormatAccess) -> Any:
    """The disk's snapshots."""
    return disk.capability(Snapshottable)


def entries(ends: Ends) -> list[SnapshotEntry]:
    """The snapshot table as it stands in the file."""
    data = ends.path.read_bytes()
    at = ends.header.snapshots_offset
    found: list[SnapshotEntry] = []
    for _ in range(ends.header.nb_snapshots):
        entry, at = SnapshotEntry.unpack(data, at)
        assert entry is not None
        found.append(entry)
    return found


@pytest.mark.parametrize(("takes", "applies"), [("we", "they"), ("they", "we")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_takes_applies_and_deletes_what_the_other_did(
    ends: Ends, layout: str, takes: str, applies: str
) -> None:
    ends.create(SIZE, theirs=takes == "we", below=pattern(SIZE // 2), **LAYOUTS[layout])

    def do(who: str, how: str, name: str) -> None:
        if who == "they":
            ends.snapshot(how, name)
            return
        with ends.open() as disk:
            method = {"-c": "create", "-a": "apply", "-d": "delete"}[how]
            getattr(able(disk), f"{method}_snapshot")(name)
            assert disk.size == SIZE

    ends.they_write(0, 200_704, 1)
    cluster = ends.header.cluster_size
    ends.they_write(5 * 65_536, cluster, 2, "-c")
    contents: dict[str, bytes] = {}
    for name in ("first", "second"):
        do(takes, "-c", name)
        contents[name] = bytes(ends.model)
        ends.agree()
        with ends.open() as disk:
            ends.write(disk, 65_000, pattern(80_000, len(name)))
            disk.discard_to_zero(150_000, 100_000)
            ends.put(150_000, bytes(100_000))
        ends.they_write(400_384, 512, 7)
        ends.agree()
    for name in ("first", "second", "first"):
        assert ends.their_bytes("-l", f"snapshot.name={name}") == contents[name]
        with ends.open(writable=False, snapshot=name) as disk:
            assert disk.read_bytes(0, SIZE) == contents[name]
        do(applies, "-a", name)
        ends.model[:] = contents[name]
        ends.agree()
        with ends.open() as disk:
            ends.write(disk, 65_500, b"after applying")
        ends.agree()
    do(applies, "-d", "first")
    ends.agree()
    assert ends.their_bytes("-l", "snapshot.name=second") == contents["second"]
    do(applies, "-d", "second")
    ends.agree()
    assert ends.header.nb_snapshots == 0
    assert ends.header.snapshots_offset == 0


def test_the_list_is_the_same_at_both_ends(ends: Ends) -> None:
    ends.create(SIZE)
    with ends.open() as disk:
        made = [able(disk).create_snapshot(name) for name in ("one", "two", "three")]
        assert [snapshot.id for snapshot in made] == ["1", "2", "3"]
        able(disk).delete_snapshot("two")
        # IDs are not used twice while a higher one is there.
        assert able(disk).create_snapshot("four").id == "4"
        ours = able(disk).snapshots()
    told = ends.info()["snapshots"]
    assert [(s["id"], s["name"]) for s in told] == [("1", "one"), ("3", "three"), ("4", "four")]
    assert [(s.id, s.name) for s in ours] == [(s["id"], s["name"]) for s in told]
    assert [(s.date_sec, s.date_nsec) for s in ours] == [
        (s["date-sec"], s["date-nsec"]) for s in told
    ]
    assert all(s["vm-state-size"] == 0 for s in told)
    assert "three" in ends.qemu_img("snapshot", "-l", ends.path)
    # As QEMU's own look: extra data of three fields, and an instruction count of zero.
    assert {entry.extra for entry in entries(ends)} == {struct.pack(">QQQ", 0, SIZE, 0)}


def test_an_entry_is_as_qemu_would_write_it(ends: Ends) -> None:
    ends.create(SIZE, theirs=True)
    ends.snapshot("-c", "name")
    with ends.open() as disk:
        able(disk).create_snapshot("name")
    theirs, ours = entries(ends)
    same = ("l1_size", "name", "vm_clock_nsec", "vm_state_size_short", "disk_size", "vm_state_size")
    assert [getattr(ours, field) for field in same] == [getattr(theirs, field) for field in same]
    assert len(ours.extra) == len(theirs.extra)
    assert (theirs.id, ours.id) == (b"1", b"2")
    ends.agree()


# -- names


@pytest.mark.parametrize("length", [1, 7, 8, 15, 16, 17, 255, 4096, 65_535])
def test_names_of_any_length_are_kept(ends: Ends, length: int) -> None:
    ends.create(SIZE)
    name = ("snapshot-" * 8000)[:length]
    with ends.open() as disk:
        able(disk).create_snapshot(name)
        able(disk).create_snapshot("behind it")
        assert [snapshot.name for snapshot in able(disk).snapshots()] == [name, "behind it"]
    ends.agree()
    assert [s["name"] for s in ends.info()["snapshots"]][1] == "behind it"
    with ends.open() as disk:
        able(disk).delete_snapshot(name)
    ends.agree()


@pytest.mark.parametrize("name", ["ünï", "日本", "with space", "'quoted'", "\udcff\udcfe"])
def test_names_are_bytes_to_us(ends: Ends, name: str) -> None:
    ends.create(SIZE)
    with ends.open() as disk:
        able(disk).create_snapshot(name)
    assert [entry.name for entry in entries(ends)] == [name.encode("utf-8", "surrogateescape")]
    with ends.open() as disk:
        able(disk).apply_snapshot(name)
        able(disk).delete_snapshot(name)
    ends.agree()


@pytest.mark.parametrize("name", ["", "x" * 65_536])
def test_names_that_cannot_be_stored_are_refused(ends: Ends, name: str) -> None:
    ends.create(SIZE)
    before = ends.path.read_bytes()
    with ends.open() as disk, pytest.raises(OptionError, match="65535"):
        able(disk).create_snapshot(name)
    assert ends.path.read_bytes() == before


def test_an_id_counts_before_a_name(ends: Ends) -> None:
    """QEMU looks for it in the same order."""
    ends.create(SIZE)
    with ends.open() as disk:
        ends.write(disk, 0, b"one")
        able(disk).create_snapshot("2")
        ends.write(disk, 0, b"two")
        able(disk).create_snapshot("x")
        able(disk).apply_snapshot("2")
        assert disk.read_bytes(0, 3) == b"two"
    ends.agree()
    ends.snapshot("-a", "2")
    ends.agree()
    with ends.open() as disk:
        able(disk).delete_snapshot("2")
        assert [snapshot.id for snapshot in able(disk).snapshots()] == ["1"]
        able(disk).apply_snapshot("2")
        assert disk.read_bytes(0, 3) == b"one"


@pytest.mark.parametrize("method", ["apply_snapshot", "delete_snapshot"])
def test_one_that_is_not_there_is_an_error_that_names_those_that_are(
    ends: Ends, method: str
) -> None:
    ends.create(SIZE, theirs=True)
    ends.snapshot("-c", "there")
    before = ends.path.read_bytes()
    with ends.open() as disk:
        with pytest.raises(OptionError, match="it has: 'there'"):
            getattr(able(disk), method)("elsewhere")
        ends.write(disk, 5, b"the disk goes on")
    assert ends.path.read_bytes()[:65536] == before[:65536]
    ends.agree()


def test_many_of_them(ends: Ends) -> None:
    ends.create(SIZE, refcount_bits=32)
    with ends.open() as disk:
        for number in range(60):
            ends.write(disk, number * 7 * 512, b"%d" % number)
            able(disk).create_snapshot(f"snapshot number {number}")
        assert len(able(disk).snapshots()) == 60
    ends.agree()
    for number in range(0, 60, 20):
        with ends.open(writable=False, snapshot=f"snapshot number {number}") as disk:
            for other in range(60):
                expected = b"%d" % other if other <= number else bytes(len(b"%d" % other))
                assert disk.read_bytes(other * 7 * 512, len(expected)) == expected
    with ends.open() as disk:
        for number in range(0, 60, 2):
            able(disk).delete_snapshot(f"snapshot number {number}")
    ends.agree()
    with ends.open() as disk:
        for number in range(1, 60, 2):
            able(disk).delete_snapshot(f"snapshot number {number}")
    ends.agree()
    assert ends.blocks <= 40 * 65_536


# -- what they hold besides the disk


def _with_machine_state(ends: Ends) -> bytes:
    """A snapshot with machine state, as a running machine leaves it: behind the disk's end."""
    ends.create(2 * SIZE, theirs=True)
    ends.they_write(0, SIZE, 1)
    # For the moment it is a larger disk, of which the end is the state.
    ends.they_write(SIZE, 200_704, 0xEE)
    ends.snapshot("-c", "running")
    table = ends.header.snapshots_offset
    extra = struct.pack(">QQQ", 200_704, SIZE, 12_345) + b"what is this"
    (entry,) = entries(ends)
    packed = SnapshotEntry(
        l1_table_offset=entry.l1_table_offset,
        l1_size=entry.l1_size,
        id=b"7",
        name=entry.name,
        date_sec=1_000_000_000,
        date_nsec=999_999_999,
        vm_clock_nsec=1 << 40,
        vm_state_size_short=200_704,
        extra=extra,
    ).pack()
    ends.poke(table, f"{len(packed)}s", packed)
    ends.poke(24, "Q", SIZE)
    del ends.model[SIZE:]
    return packed


def test_machine_state_and_all_extra_data_stay_as_they_are(ends: Ends) -> None:
    packed = _with_machine_state(ends)
    ends.agree()
    with ends.open() as disk:
        assert able(disk).create_snapshot("later").id == "8"
        ends.write(disk, 5, b"x")
        able(disk).create_snapshot("still later")
        able(disk).delete_snapshot("later")
        (first, *_) = able(disk).snapshots()
        assert (first.vm_state_size, first.icount, first.disk_size) == (200_704, 12_345, SIZE)
    assert entries(ends)[0].pack() == packed
    ends.agree()
    told = ends.info()["snapshots"][0]
    assert (told["vm-state-size"], told["vm-clock-nsec"]) == (200_704, (1 << 40) % 10**9)


def test_machine_state_never_becomes_part_of_the_disk(ends: Ends) -> None:
    _with_machine_state(ends)
    ends.put(0, b"\1" * SIZE)
    with ends.open() as disk:
        able(disk).apply_snapshot("running")
        assert disk.size == SIZE
        disk.resize(2 * SIZE)
        ends.model.extend(bytes(SIZE))
        assert disk.read_bytes(0, 2 * SIZE) == ends.model
        ends.write(disk, SIZE + 70_000, pattern(1000))
    ends.agree()
    ends.snapshot("-a", "running")
    del ends.model[SIZE:]
    ends.agree()
    with ends.open() as disk:
        able(disk).delete_snapshot("running")
    ends.agree()


def test_the_disk_gets_the_size_that_it_had(ends: Ends) -> None:
    ends.create(300 << 10, cluster_size=512)
    with ends.open() as disk:
        contents: dict[str, bytes] = {}
        for size in (300 << 10, 5 << 20, 1536, 700):
            disk.resize(size)
            ends.model[:] = ends.model[:size].ljust(size, b"\0")
            ends.write(disk, size // 2, pattern(300, size))
            assert able(disk).create_snapshot(f"of {size}").disk_size == size
            contents[f"of {size}"] = bytes(ends.model)
        for name in ("of 5242880", "of 700", "of 307200", "of 1536"):
            able(disk).apply_snapshot(name)
            ends.model[:] = contents[name]
            assert disk.size == len(ends.model)
            assert disk.read_bytes(0, disk.size) == ends.model
            disk.flush()
            disk.sync()
    ends.agree()
    assert [s["name"] for s in ends.info()["snapshots"]] == list(contents)
    for name, content in contents.items():
        if len(content) % 512 == 0:
            ends.snapshot("-a", name)
            ends.model[:] = content
            ends.agree()


# -- who else is there


def test_who_holds_a_lease_keeps_a_snapshot_from_being_taken(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He may write through his mapping, and a snapshot never changes."""
    monkeypatch.setattr("underlay_drivers.qcow2.writeback._LONGEST_LEASE", 0.05)
    ends.create(SIZE)
    with ends.open() as disk:
        ends.write(disk, 0, pattern(1000))
        with disk.lease():
            with pytest.raises(ConflictError, match="lease"):
                able(disk).create_snapshot("s")
            ends.write(disk, 5000, b"the disk goes on")
        assert not able(disk).snapshots()
        able(disk).create_snapshot("s")
    ends.agree()


def test_a_data_file_keeps_no_old_data(ends: Ends) -> None:
    ends.create(SIZE, data_file="data.raw")
    with ends.open() as disk, pytest.raises(UnsupportedOperationError, match="data file"):
        able(disk).create_snapshot("s")
    ends.agree()


def test_a_read_only_disk_takes_none(ends: Ends) -> None:
    ends.create(SIZE)
    with ends.open(writable=False) as disk, pytest.raises(underlay.ReadOnlyError):
        able(disk).create_snapshot("s")


@pytest.mark.parametrize("method", ["create_snapshot", "apply_snapshot", "delete_snapshot"])
@pytest.mark.parametrize("which", [1, 2, 3, 4, 5])
def test_a_failure_leaves_all_as_it_was_and_the_disk_goes_on(
    ends: Ends, method: str, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends.create(SIZE, cluster_size=4096)
    with ends.open() as disk:
        ends.write(disk, 0, pattern(300_000))
        able(disk).create_snapshot("old")
        ends.write(disk, 100_000, pattern(100_000, 2))
        disk.flush()
        disk.sync()
        writev, calls = FileStorage.writev, 0

        def fail(self: Any, buffers: Any, offset: int) -> None:
            nonlocal calls
            calls += 1
            if calls == which:
                raise underlay.StorageError("no space", filename="x")
            writev(self, buffers, offset)

        monkeypatch.setattr(FileStorage, "writev", fail)
        failed = False
        name = "new" if method == "create_snapshot" else "old"
        try:
            getattr(able(disk), method)(name)
        except underlay.StorageError:
            failed = True
        monkeypatch.undo()
        assert failed or calls < which
        if failed:
            # The header's own write may have gone either way, and the disk says that it stops.
            assert [snapshot.name for snapshot in able(disk).snapshots()] == ["old"]
            driver: Any = disk.inner
            if driver.writer.back.broken:
                with pytest.raises(underlay.StorageError, match="can no longer be written"):
                    disk.write(b"x", 0)
                disk.abandon()
            else:
                ends.write(disk, 200_000, b"it goes on")
        elif method == "apply_snapshot":
            ends.put(100_000, pattern(300_000)[100_000:200_000])
    report = ends.checked()
    assert not report.get("corruptions")
    with ends.open(writable=False) as disk:
        assert disk.read_bytes(0, SIZE) == ends.model


# -- snapshots that are damaged


def _snapshot_l1(ends: Ends) -> int:
    (entry,) = entries(ends)
    return entry.l1_table_offset


def _l1_leads_to(ends: Ends, offset: int) -> None:
    ends.poke(_snapshot_l1(ends), "Q", offset | 1 << 63)


def _l2_leads_to(ends: Ends, offset: int) -> None:
    l2 = ends.word(_snapshot_l1(ends)) & 0x00FF_FFFF_FFFF_FE00
    ends.poke(l2, "Q", offset)


@pytest.mark.parametrize("method", ["apply_snapshot", "delete_snapshot"])
@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (_l1_leads_to, "header"),
        *itertools.product(
            (_l1_leads_to, _l2_leads_to), ("refcounts", "l1", "l2", "inside", "far away")
        ),
    ],
)
def test_a_damaged_snapshot_does_no_harm_to_the_disk(
    ends: Ends, damage: Callable[[Ends, int], None], where: str, method: str
) -> None:
    ends.create(SIZE, theirs=True)
    ends.they_write(0, 200_704, 1)
    ends.snapshot("-c", "s")
    ends.they_write(0, 200_704, 2)
    header = ends.header
    places = {
        "header": 0,
        "refcounts": ends.word(header.refcount_table_offset),
        "l1": header.l1_table_offset,
        "l2": ends.word(header.l1_table_offset) & 0x00FF_FFFF_FFFF_FE00,
        "inside": ends.word(header.refcount_table_offset) + 512,
        "far away": 1 << 40,
    }
    damage(ends, places[where])
    before = ends.path.read_bytes()
    with ends.open() as disk:
        with pytest.raises(underlay.CorruptImageError):
            getattr(able(disk), method)("s")
        assert disk.read_bytes(0, SIZE) == ends.model
        disk.abandon()
    # It is marked, and nothing else has happened.
    ends.poke(72, "Q", 0)
    assert ends.path.read_bytes() == before
    with ends.open(writable=False) as disk:
        assert disk.read_bytes(0, SIZE) == ends.model
