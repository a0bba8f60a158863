"""A writer checks each change against the metadata, and stops at the first contradiction.

It says what is wrong, where, and what to do; it marks the image as corrupt where there is a mark;
and it changes nothing else. The lies are those of the recipes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import attrs
import pytest

import underlay
from underlay import SyncFormatAccess
from underlay.capabilities import BitmapStore, CompressedWriter, Snapshottable
from underlay.errors import CorruptImageError, LimitExceededError
from underlay.jobs.check import check, repair
from underlay_drivers.qcow2 import layout
from underlay_storage.memory import MemoryStorage

from .bases import Base, Bases
from .corpus import RECIPES
from .recipe import Recipe, Rule

Change = Callable[[SyncFormatAccess, int], object]

_BY_NAME = {recipe.name: recipe for recipe in RECIPES}
_CLUSTER = 64 << 10
_CORRUPT_AT = layout.INCOMPATIBLE_FEATURES_OFFSET + 7


@attrs.define
class Victim:
    """A damaged image in memory, and its data file if it has one."""

    base: Base
    recipe: Recipe
    image: MemoryStorage
    data: MemoryStorage | None
    before: bytes

    @classmethod
    def of(cls, bases: Bases, recipe: Recipe) -> Victim:
        base = bases[recipe.base]
        image = base.image()
        recipe.damage(image)
        beside = [MemoryStorage(content) for content in base.beside.values()]
        data = beside[0] if beside else None
        before = bytes(image.data)
        return cls(base, recipe, MemoryStorage(before), data, before)

    def open(self, *, writable: bool = True) -> SyncFormatAccess:
        if self.data is None:
            return underlay.open_image(self.image, format="qcow2", writable=writable)
        return underlay.open_image(
            self.image, format="qcow2", writable=writable, data_file=self.data
        )

    def bytes(self) -> bytes:
        content = bytearray(self.image.size())
        self.image.readv((content,), 0)
        return bytes(content)

    @property
    def has_mark(self) -> bool:
        return self.base.image().header.version > 2

    def has_only_the_mark(self) -> bool:
        """Whether the image is as it was, but for the bit that marks it as corrupt."""
        marked = bytearray(self.before)
        if self.has_mark:
            marked[_CORRUPT_AT] |= layout.CORRUPT
        return self.bytes() == bytes(marked)

    def undamaged(self, disk: SyncFormatAccess) -> bool:
        """Whether what lies outside the damage reads as it did."""
        start, end = self.recipe.rule.damaged
        good = self.base.content
        return (
            disk.read_bytes(0, start) == good[:start]
            and disk.read_bytes(end, len(good) - end) == good[end:]
        )


def _able(disk: SyncFormatAccess, kind: type[object]) -> Any:
    """A capability, whose methods on this face do not wait."""
    return disk.capability(kind)


#: What can be done to the guest cluster at an offset.
HERE: dict[str, Change] = {
    "write": lambda disk, at: disk.write(b"x" * 600, at + 100),
    "write a cluster": lambda disk, at: disk.write(b"x" * _CLUSTER, at),
    "zero": lambda disk, at: disk.write_zeroes(at, _CLUSTER),
    "discard": lambda disk, at: disk.discard_to_zero(at, _CLUSTER),
    "show the backing image": lambda disk, at: disk.discard_to_backing(at, _CLUSTER),
    "compress": lambda disk, at: _able(disk, CompressedWriter).write_encoded(at, b"encoded"),
    "map": lambda disk, at: disk.ensure_data_mapping(at, 100),
    "shrink": lambda disk, at: disk.resize(at),
    "snapshot": lambda disk, _: _able(disk, Snapshottable).create_snapshot("new"),
}
#: What changes an image as a whole.
WHOLE: dict[str, Change] = {
    "grow": lambda disk, _: disk.resize(1 << 40),
    "apply": lambda disk, _: _able(disk, Snapshottable).apply_snapshot("first"),
    "delete": lambda disk, _: _able(disk, Snapshottable).delete_snapshot("first"),
    "add a bitmap": lambda disk, _: _able(disk, BitmapStore).add_bitmap("new"),
}


def _changes(recipe: Recipe, changes: dict[str, Change]) -> dict[str, Change]:
    """Those that this image can have at all."""
    cannot = set[str]()
    if recipe.base != "snapshots":
        cannot |= {"apply", "delete"}
    if recipe.base == "data-file":
        cannot |= {"compress", "snapshot"}
    if recipe.base == "v2":
        # Version 2 has no entry that says zero over what another image shows: there is none here.
        cannot |= {"zero", "add a bitmap"}
    return {name: change for name, change in changes.items() if name not in cannot}


def _cases(names: list[str], changes: dict[str, Change]) -> list[object]:
    return [
        pytest.param(_BY_NAME[name], change, id=f"{_BY_NAME[name].number}-{name}-{what}")
        for name in names
        for what, change in _changes(_BY_NAME[name], changes).items()
    ]


def _stops(victim: Victim, change: Change, at: int) -> None:
    """What has to hold for a change that would touch metadata, or rely on a lie."""
    disk = victim.open()
    with pytest.raises(CorruptImageError) as caught:
        change(disk, at)
    said = str(caught.value)
    assert "0x" in said, said
    assert any(word in said for word in ("repair", "check", "copy")), said
    assert caught.value.field is not None
    with pytest.raises(CorruptImageError, match="nothing more is written"):
        disk.write(b"y", 1 << 20)
    assert victim.undamaged(disk)
    disk.abandon()
    assert victim.has_only_the_mark()

    if victim.has_mark:
        with pytest.raises(CorruptImageError, match="marked as corrupt"):
            victim.open()
    with victim.open(writable=False) as disk:
        assert victim.undamaged(disk)


# -- what contradicts itself wherever one writes

#: Tables that overlap, or cannot be.
TABLES = [
    recipe.name
    for recipe in RECIPES
    if recipe.number in {*range(91, 100), *range(125, 129), 132, 135, 136, 137, 139, 143, 145}
] + ["reftable-over-refblock", "snapshot-table-is-refcount-block"]
FIRST = [
    *_cases(TABLES, WHOLE),
    *_cases(TABLES, {name: HERE[name] for name in ("write", "discard", "compress", "snapshot")}),
]


@pytest.mark.parametrize(("recipe", "change"), FIRST)
def test_tables_that_cannot_be_stop_the_first_change(
    bases: Bases, recipe: Recipe, change: Change
) -> None:
    # Where nothing is, and nothing is wrong.
    _stops(Victim.of(bases, recipe), change, 3 << 20)


HEADERS = [
    "reftable-at-0",
    "reftable-past-end",
    "reftable-is-l1",
    "snapshots-at-0",
    "snapshots-past-end",
    "snapshot-table-is-l1-table",
]


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_cannot_be_stops_opening(bases: Bases, name: str) -> None:
    victim = Victim.of(bases, _BY_NAME[name])
    with pytest.raises(CorruptImageError):
        victim.open()
    assert victim.bytes() == victim.before
    with victim.open(writable=False) as disk:
        assert victim.undamaged(disk)


# -- entries

ENTRIES = [
    recipe.name
    for recipe in RECIPES
    if recipe.number in {*range(100, 108), *range(110, 118)} and recipe.rule.damaged[1]
]


@pytest.mark.parametrize(
    ("recipe", "change"),
    _cases(ENTRIES, {what: change for what, change in HERE.items() if what != "shrink"}),
)
def test_an_entry_that_cannot_be_stops_what_touches_it(
    bases: Bases, recipe: Recipe, change: Change
) -> None:
    if recipe.name == "l2-entry-zero-on-metadata" and change is HERE["zero"]:
        return  # it is zero already, so there is nothing to do
    _stops(Victim.of(bases, recipe), change, recipe.rule.damaged[0])


@pytest.mark.parametrize("name", ENTRIES)
def test_shrinking_cuts_such_an_entry_off_or_stops_before_anything_changes(
    bases: Bases, name: str
) -> None:
    victim = Victim.of(bases, _BY_NAME[name])
    at = victim.recipe.rule.damaged[0]
    was = check(victim.image)
    disk = victim.open()
    try:
        disk.resize(at)
    except CorruptImageError:
        disk.abandon()
        assert victim.has_only_the_mark()
    else:
        disk.close()
        left = check(victim.image)
        assert left.corruptions == 0
        assert left.leaks <= was.leaks


@pytest.mark.parametrize("name", ENTRIES)
def test_the_rest_of_a_disk_with_such_an_entry_goes_on(bases: Bases, name: str) -> None:
    """Data is written in place and to new places; neither is near the damage."""
    victim = Victim.of(bases, _BY_NAME[name])
    was = check(victim.image)
    with victim.open() as disk:
        disk.write(b"z" * _CLUSTER, 3 << 20)
        disk.write(b"z" * 100, 2 << 20)
    left = check(victim.image)
    assert (left.corruptions, left.leaks) == (was.corruptions, was.leaks)
    with victim.open(writable=False) as disk:
        assert disk.read_bytes(3 << 20, _CLUSTER) == b"z" * _CLUSTER


# -- reference counts


FREE = ["block-missing", "block-zero", "data-free", "l2-table-free", "refcount-block-free"]


@pytest.mark.parametrize(
    ("recipe", "change"),
    _cases(FREE, HERE | {"add a bitmap": WHOLE["add a bitmap"]}),
)
def test_what_only_counts_as_free_is_not_handed_out(
    bases: Bases, recipe: Recipe, change: Change
) -> None:
    """Guest cluster 3 is compressed: every change lets go of its room, or needs another."""
    _stops(Victim.of(bases, recipe), change, 3 * _CLUSTER)


SHARED = ["cluster-shared", "shared-data-counts-once"]


@pytest.mark.parametrize(
    ("recipe", "change"),
    _cases(SHARED, {name: HERE[name] for name in ("discard", "compress", "shrink")})
    + _cases(SHARED, {name: WHOLE[name] for name in ("apply", "delete")}),
)
def test_what_two_entries_have_is_not_freed_for_one(
    bases: Bases, recipe: Recipe, change: Change
) -> None:
    _stops(Victim.of(bases, recipe), change, 0)


@pytest.mark.parametrize("compressed", [False, True])
def test_room_that_an_entry_leads_to_already_is_not_handed_out(
    bases: Bases, *, compressed: bool
) -> None:
    """The first cluster past the end of the file, which nothing counts: it would come next."""
    base = bases["plain"]
    image = base.image()
    end = len(image.data)
    entry = layout.COMPRESSED | 130 << 54 | end - 512 if compressed else layout.COPIED | end
    image.put(image.l2(40), "Q", entry)
    victim = Victim(
        base,
        attrs.evolve(_BY_NAME["leak"], rule=Rule(damaged=(40 * _CLUSTER, 41 * _CLUSTER))),
        MemoryStorage(bytes(image.data)),
        None,
        bytes(image.data),
    )
    _stops(victim, HERE["write"], 3 << 20)


def test_a_table_that_is_read_late_may_not_lead_to_what_was_put_there_meanwhile(
    bases: Bases,
) -> None:
    base = bases["two-tables"]
    image = base.image()
    end = len(image.data)
    image.put(image.l2(20, 0), "Q", layout.COPIED | end)
    victim = Victim(
        base, _BY_NAME["leak"], MemoryStorage(bytes(image.data)), None, bytes(image.data)
    )
    with victim.open() as disk:
        disk.write(b"A" * 4096, 3 << 20)  # by the other table
        disk.flush()
        after = victim.bytes()
        assert after[end : end + 4096] == b"A" * 4096
        with pytest.raises(CorruptImageError, match="something else's"):
            disk.write(b"B" * 4096, 20 * 4096)
        assert disk.read_bytes(3 << 20, 4096) == b"A" * 4096
        disk.abandon()
    victim.before = after
    assert victim.has_only_the_mark()


def test_a_count_that_is_as_high_as_can_be_stops_a_snapshot(bases: Bases) -> None:
    """That is no contradiction: the disk goes on."""
    victim = Victim.of(bases, _BY_NAME["block-full"])
    with victim.open() as disk:
        with pytest.raises(LimitExceededError):
            _able(disk, Snapshottable).create_snapshot("new")
        disk.write(b"z" * 512, 900 << 10)
    assert not victim.bytes()[_CORRUPT_AT] & layout.CORRUPT


# -- snapshots

REFUSING = ["snapshot-size-2-63"]


@pytest.mark.parametrize("name", REFUSING)
@pytest.mark.parametrize("what", ["apply", "delete"])
def test_a_snapshot_that_cannot_be_is_refused_and_the_disk_goes_on(
    bases: Bases, name: str, what: str
) -> None:
    victim = Victim.of(bases, _BY_NAME[name])
    with victim.open() as disk:
        with pytest.raises(CorruptImageError, match="snapshot"):
            WHOLE[what](disk, 0)
        disk.write(b"z" * _CLUSTER, 3 << 20)
    assert not victim.bytes()[_CORRUPT_AT] & layout.CORRUPT
    assert check(victim.image).leaks == 0


# -- afterwards

#: What a repair makes whole: it believes what leads to clusters, and counts anew.
MENDED = {
    # The refcount table or block that something else leads to is written anew, elsewhere.
    "l1-entry-refcount-table",
    "snapshot-l1-is-refcount-table",
    "reftable-over-refblock",
    "l2-entry-refcount-block",
    "l2-table-shared",
    "l2-entry-zero-unaligned",
    "cluster-shared",
    "block-unaligned",
    "block-past-the-end",
    "block-reserved",
    "block-is-l1-table",
    "block-is-header",
    "block-shared",
    *FREE,
    "shared-data-counts-once",
}
#: What a check of QEMU's passes over, and ours tells of without counting it.
NOTED = {
    "l2-entry-header",
    "l2-entry-zero-in-version-2",
    "l2-entry-zero-alone-in-version-2",
    "l2-entry-host-not-guest",
}


def _flaws(victim: Victim) -> list[str]:
    """What a check counts, but for entries that do not say that a cluster is theirs alone."""
    found = [one.line for one in check(victim.image).findings if one.kind == "corruption"]
    return [line for line in found if "OFLAG_COPIED" not in line]


@pytest.mark.parametrize("name", [*dict.fromkeys((*TABLES, *ENTRIES, *FREE, *SHARED))])
def test_a_check_finds_it_and_a_repair_mends_what_can_be_mended(bases: Bases, name: str) -> None:
    victim = Victim.of(bases, _BY_NAME[name])
    at, left = victim.recipe.rule.damaged[0], ["it cannot be checked"]
    with contextlib.suppress(CorruptImageError):  # of some, snapshots cannot even be listed
        found = check(victim.image)
        assert bool(found.corruptions) == (name not in NOTED)
        assert found.findings
        repair(victim.image)
        left = _flaws(victim)
    with victim.open(writable=False) as disk:
        assert victim.undamaged(disk)
    if name in MENDED:
        with victim.open() as disk:
            disk.write(b"z" * 100, at)
            disk.write(b"z" * _CLUSTER, 3 << 20)
            disk.write_zeroes(_CLUSTER, _CLUSTER)
        assert _flaws(victim) == left
    else:
        # The damage is still there, and stops whoever touches it.
        with pytest.raises(CorruptImageError), contextlib.closing(victim.open()) as disk:
            disk.write(b"z" * 100, at)
