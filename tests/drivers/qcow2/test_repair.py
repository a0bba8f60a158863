"""A repair mends what QEMU's mends, keeps the guest's bytes, and survives crashes and errors."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import underlay
from underlay.capabilities import CheckResult, Repairable
from underlay.driver import FormatOpenOptions
from underlay.errors import CorruptImageError, ReadOnlyError, StorageError, UnderlayError
from underlay.face import run_blocking
from underlay.handle import StorageHandle
from underlay.storage import PreallocateMode, WriteBuffers
from underlay_drivers.qcow2 import Qcow2
from underlay_storage.memory import MemoryStorage

from .checking import check_bytes, exit_status, repair_bytes
from .images import Image, open_bytes, read
from .test_check import (
    COPIED,
    DATA_FILE,
    EXTENDED,
    FAR,
    PLAIN,
    SNAPSHOTS,
    Damage,
    Maker,
    both,
    field,
    l2,
    refcount,
    reftable,
    share_l2,
    word,
)

Ask = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def qemu_check(tmp_path: Path, qemu_img: object) -> Ask:
    """QEMU's exit status and JSON for these bytes; with more arguments it repairs a copy."""

    def ask(data: bytes | bytearray, *arguments: str) -> tuple[int, dict[str, Any]]:
        path = tmp_path / "asked.qcow2"
        path.write_bytes(data)
        done = subprocess.run(
            ["qemu-img", "check", "--output=json", "-f", "qcow2", *arguments, path],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else {}

    return ask


@pytest.fixture
def qemu_read(tmp_path: Path, qemu_img: Callable[..., str]) -> Callable[[bytearray], bytes | None]:
    """What QEMU's guest sees, or None if it cannot see all of it."""

    def read_all(data: bytearray) -> bytes | None:
        image, raw = tmp_path / "read.qcow2", tmp_path / "read.raw"
        image.write_bytes(data)
        try:
            qemu_img("convert", "-f", "qcow2", "-O", "raw", image, raw)
        except AssertionError:
            return None
        return raw.read_bytes()

    return read_all


def guest_bytes(data: bytes | bytearray) -> bytes | None:
    """What the guest sees, or None if it cannot see all of it."""
    try:
        with open_bytes(data) as disk:
            return read(disk, 0, disk.size())
    except UnderlayError:
        return None


#: What QEMU mends by dropping snapshots or their extra data; we leave such to people.
LEFT_TO_PEOPLE = {"138 id of 65,535 bytes", "139 extra data 2^32-1", "140 extra data 8"}
#: A guest cluster that is also an L2 table changes with the table.
CHANGING = {"105 L2 entry: its own table"}


def repaired_as_qemu_does(image: Image, qemu_check: Ask, *, keeps_bytes: bool = True) -> None:
    before = guest_bytes(image.data)
    planned, untouched = repair_bytes(image.data, dry_run=True)
    assert untouched == image.data
    result, after = repair_bytes(image.data)
    assert (planned.corruptions_fixed, planned.leaks_fixed) == (
        result.corruptions_fixed,
        result.leaks_fixed,
    )
    assert planned.repairs == result.repairs
    assert bool(planned.repairs) == (after != image.data)
    status, _ = qemu_check(after)
    assert status == exit_status(result)
    theirs, _ = qemu_check(image.data, "-r", "all")
    if theirs == 0:
        assert status == 0
    if keeps_bytes and before is not None:
        assert guest_bytes(after) == before


#: The L1 table is not inside the file: whatever is in the file nothing leads to any more.
WITHOUT_L1 = {"24 L1 past the end", "27 l1 offset past the end", "145 cut after the refcount table"}


@pytest.mark.parametrize("name", sorted(PLAIN.keys() - LEFT_TO_PEOPLE - WITHOUT_L1))
def test_damage(plain: Image, qemu_check: Ask, name: str) -> None:
    PLAIN[name](plain)
    repaired_as_qemu_does(plain, qemu_check, keeps_bytes=name not in CHANGING)


@pytest.mark.parametrize("name", EXTENDED)
def test_damaged_extended_entries(extended: Image, qemu_check: Ask, name: str) -> None:
    EXTENDED[name](extended)
    repaired_as_qemu_does(extended, qemu_check)


@pytest.mark.parametrize("name", [name for name in SNAPSHOTS if name not in LEFT_TO_PEOPLE])
def test_damaged_snapshots(snapshotted: Image, qemu_check: Ask, name: str) -> None:
    SNAPSHOTS[name](snapshotted)
    repaired_as_qemu_does(snapshotted, qemu_check)


@pytest.mark.parametrize("name", sorted(LEFT_TO_PEOPLE))
def test_nothing_is_thrown_away(snapshotted: Image, name: str) -> None:
    SNAPSHOTS[name](snapshotted)
    with pytest.raises(CorruptImageError, match="snapshot table"):
        repair_bytes(snapshotted.data)


@pytest.mark.parametrize("name", sorted(WITHOUT_L1))
@pytest.mark.parametrize("leaks_only", [False, True])
def test_a_file_that_lost_its_l1_table_keeps_its_data(
    plain: Image, name: str, *, leaks_only: bool
) -> None:
    """All of it would be taken for leaks, though the header may only need to be put right."""
    PLAIN[name](plain)
    with pytest.raises(CorruptImageError, match="L1 table is not inside the file"):
        repair_bytes(plain.data, leaks_only=leaks_only)


def test_new_refcounts_do_not_lie_where_a_lost_cluster_was(plain: Image) -> None:
    """An entry that leads past the end would find them, and share them."""
    end = plain.add_cluster() + plain.cluster
    plain.put(plain.l2(4), "Q", COPIED | end + plain.cluster)
    plain.put(plain.header.refcount_table_offset, "Q", FAR)
    _, after = repair_bytes(plain.data)
    with open_bytes(after) as disk:
        assert disk.header.refcount_table_offset == end + 2 * plain.cluster


#: Where what QEMU counts is what was wrong, ours counts alike.
COUNTED = (
    "36 reftable over a refblock",
    "99 two L1 entries, one L2 table",
    "107 L2 entry: a refcount block",
    "108 two L2 entries, one cluster",
    "109 no COPIED",
    "111 zero, unaligned",
    "130 refblock all zero",
    "131 refblock all ones",
    "133 a leak of a cluster in use",
    "134 refcount 0",
    "much at once",
)


@pytest.mark.parametrize("name", COUNTED)
def test_counts(plain: Image, qemu_check: Ask, name: str) -> None:
    PLAIN[name](plain)
    _, theirs = qemu_check(plain.data, "-r", "all")
    result, _ = repair_bytes(plain.data)
    assert result.corruptions_fixed == theirs.get("corruptions-fixed", 0)
    assert result.leaks_fixed == theirs.get("leaks-fixed", 0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=64k"])
def test_new_refcounts_of_every_width(
    make: Maker, qemu_check: Ask, bits: int, options: str
) -> None:
    image = make(f"refcount_bits={bits},{options}", "4M", "write -P 7 1M 1000k")
    good = guest_bytes(image.data)
    image.put(image.header.refcount_table_offset, "Q", 0)
    result, after = repair_bytes(image.data)
    assert result.corruptions_fixed > 0
    assert qemu_check(after)[0] == 0
    assert guest_bytes(after) == good


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_refcounts_of_every_width_are_mended_in_place(
    make: Maker, qemu_check: Ask, bits: int
) -> None:
    image = make(f"refcount_bits={bits},cluster_size=4k", "4M", "write -P 7 1M 100k")
    good = guest_bytes(image.data)
    block, most = image.refcount_block(), (1 << bits) - 1
    counts = bytearray(image.data[block : block + image.cluster])
    used = len(image.data) // image.cluster
    for cluster, count in ((7, most), (used + 3, 1), (used + 4, most)):
        _set_count(counts, cluster, count, bits)
    image.data[block : block + image.cluster] = counts
    image.data.extend(bytes(5 * image.cluster))
    l2(257, lambda entry: entry & ~COPIED)(image)
    pointer = image.word(image.header.refcount_table_offset)

    repaired_as_qemu_does(image, qemu_check)

    leaks, after = repair_bytes(image.data, leaks_only=True)
    assert (leaks.corruptions, leaks.leaks) == (1, 0)
    result, after = repair_bytes(after)
    assert (result.corruptions, result.leaks, result.corruptions_fixed) == (0, 0, 1)
    # In place: the refcount blocks are where they were.
    assert Image(bytes(after)).word(image.header.refcount_table_offset) == pointer
    assert qemu_check(after)[0] == 0
    assert guest_bytes(after) == good


def _set_count(block: bytearray, cluster: int, count: int, bits: int) -> None:
    if bits >= 8:
        block[cluster * bits // 8 : (cluster + 1) * bits // 8] = count.to_bytes(bits // 8, "big")
        return
    at, within = divmod(cluster * bits, 8)
    block[at] = block[at] & ~(((1 << bits) - 1) << within) | count << within


WITH_DATA_FILE: dict[str, Damage] = DATA_FILE | {
    "a leak": refcount(2, 3),
    "refcount 0 of the L1 table": refcount(3, 0),
    "no refcounts": reftable(0),
    "marked as dirty, stale": both(
        word(lambda _: 72, lambda bits: bits | 1), refcount(4, 0), refcount(9, 1)
    ),
    "marked as corrupt": both(word(lambda _: 72, lambda bits: bits | 2), refcount(4, 7)),
    "two L1 entries, one L2 table": share_l2,
}


@pytest.mark.parametrize("name", WITH_DATA_FILE)
def test_damage_beside_a_data_file(
    with_data_file: Image,
    qemu_check: Ask,
    qemu_read: Callable[[bytearray], bytes | None],
    name: str,
) -> None:
    """The data file is not looked at, and stays as it is."""
    with open_bytes(with_data_file.data) as disk:
        data_file = Path(str(disk.implicit_external_data_file()))
    data = data_file.read_bytes()
    WITH_DATA_FILE[name](with_data_file)
    before = qemu_read(with_data_file.data)

    repaired_as_qemu_does(with_data_file, qemu_check)

    _, after = repair_bytes(with_data_file.data)
    assert data_file.read_bytes() == data
    if before is not None:
        assert qemu_read(after) == before


def test_leaks_alone(plain: Image, qemu_check: Ask) -> None:
    good = guest_bytes(plain.data)
    both(refcount(5, 3), refcount(9, 0), l2(1, lambda entry: entry & ~COPIED))(plain)
    result, after = repair_bytes(plain.data, leaks_only=True)
    assert (result.leaks, result.leaks_fixed) == (0, 1)
    assert result.corruptions == 1
    assert qemu_check(after)[0] == 2
    assert guest_bytes(after) == good


def test_leaks_alone_are_not_mended_where_refcounts_are_missing(plain: Image) -> None:
    both(refcount(5, 3), refcount(6, 0))(plain)
    with pytest.raises(CorruptImageError, match="repair all"):
        repair_bytes(plain.data, leaks_only=True)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_sound_image_is_marked_so(plain: Image, qemu_check: Ask, bits: int) -> None:
    field(72, "Q", bits)(plain)
    refcount(6, 2)(plain)
    _, after = repair_bytes(plain.data)
    assert Image(bytes(after)).header.incompatible_features == 0
    assert qemu_check(after)[0] == 0


def test_what_stays_damaged_stays_marked(plain: Image) -> None:
    both(field(72, "Q", 2), l2(1, lambda entry: entry + 512))(plain)
    result, after = repair_bytes(plain.data)
    assert result.corruptions
    assert Image(bytes(after)).header.incompatible_features == 2


def test_a_read_only_image_is_not_repaired(plain: Image) -> None:
    with open_bytes(plain.data, to_check=True) as disk, pytest.raises(ReadOnlyError):
        run_blocking(disk.repair(leaks_only=False))


def test_a_disk_goes_on_after_its_repair(plain: Image, qemu_check: Ask) -> None:
    refcount(6, 9)(plain)
    storage = MemoryStorage(bytes(plain.data))
    with underlay.open_image(storage, format="qcow2", writable=True) as disk:
        disk.write(b"before" * 1000, 1 << 20)
        repairable = disk.capability(Repairable)
        assert repairable.check().leaks == 1
        result = repairable.repair(leaks_only=False)
        assert (result.leaks, result.leaks_fixed) == (0, 1)
        disk.write(b"after" * 30_000, 2 << 20)
        disk.write(b"again", 0)
        disk.write_zeroes(64 << 10, 64 << 10)
        assert disk.read_bytes(1 << 20, 6000) == b"before" * 1000
        assert disk.read_bytes(2 << 20, 150_000) == b"after" * 30_000
        disk.flush()
        assert repairable.check().corruptions == 0
    after = bytearray(storage.size())
    storage.readv((after,), 0)
    assert qemu_check(after)[0] == 0
    seen = guest_bytes(after)
    assert seen is not None
    assert seen[: 64 << 10] == b"again" + b"\x11" * ((64 << 10) - 5)
    assert seen[64 << 10 : 128 << 10] == bytes(64 << 10)


# -- crashes and errors


class Recording(MemoryStorage):
    """Remembers its writes, and between which of them it was made durable; may fail at one."""

    __slots__ = ("events", "fail_at")

    def __init__(self, data: bytes, *, fail_at: int | None = None) -> None:
        super().__init__(data)
        #: What was written where; None for a sync.
        self.events: list[tuple[int, bytes] | None] = []
        self.fail_at = fail_at

    def _step(self) -> None:
        if self.fail_at is not None and len(self.events) >= self.fail_at:
            raise StorageError("no more")

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        self._step()
        self.events.append((offset, b"".join(bytes(buffer) for buffer in buffers)))
        super().writev(buffers, offset)

    def sync(self) -> None:
        self._step()
        self.events.append(None)
        super().sync()

    def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        super().resize(size, preallocation)


def recorded(data: bytes | bytearray, fail_at: int | None = None) -> tuple[Recording, bool]:
    """A repair, and whether it failed."""
    storage = Recording(bytes(data), fail_at=fail_at)
    handle = StorageHandle(storage, owned=False)
    options = FormatOpenOptions(storage=handle, writable=True, to_check=True)
    disk = run_blocking(Qcow2.open(options))
    failed = False
    try:
        run_blocking(disk.repair(leaks_only=False))
    except UnderlayError:
        failed = True
    finally:
        run_blocking(disk.close())
    return storage, failed


def crash_states(
    data: bytes | bytearray, events: list[tuple[int, bytes] | None]
) -> list[bytearray]:
    """After each prefix, and after each prefix with one write of its last epoch lost."""
    states: list[bytearray] = []
    epoch = 0
    for end in range(len(events) + 1):
        if end and events[end - 1] is None:
            epoch = end
        for lost in (None, *range(epoch, end - 1)):
            state = bytearray(data)
            for number, event in enumerate(events[:end]):
                if event is not None and number != lost:
                    offset, content = event
                    state.extend(bytes(max(0, offset + len(content) - len(state))))
                    state[offset : offset + len(content)] = content
            states.append(state)
    return states


def worst(result: CheckResult) -> int:
    return result.corruptions + result.check_errors


CRASHES: dict[str, Damage] = {
    "in place": both(refcount(6, 3), refcount(5, 2), l2(1, lambda entry: entry & ~COPIED)),
    "shared": lambda image: image.put(image.l2(1), "Q", image.word(image.l2(0))),
    "rebuilt": both(refcount(6, 0), refcount(7, 5)),
    "no refcounts": reftable(0),
    "refcount block in use": l2(1, COPIED | 0x20000),
    "zeroed": l2(2, COPIED | 0x50200 | 1),
    "snapshot table": field(60, "IQ", 1, 1 << 40),
    "marked": both(field(72, "Q", 3), refcount(6, 3)),
}


@pytest.mark.parametrize("damage", CRASHES.values(), ids=CRASHES)
def test_a_crash_leaves_the_image_no_worse(plain: Image, damage: Damage) -> None:
    damage(plain)
    bad = worst(check_bytes(plain.data))
    good = guest_bytes(plain.data)
    storage, failed = recorded(plain.data)
    assert not failed
    assert storage.events[-1] is None
    for state in crash_states(plain.data, storage.events):
        assert worst(check_bytes(state)) <= bad + 1  # a COPIED bit may have to wait for its turn
        result, mended = repair_bytes(state)
        assert exit_status(result) == 0
        if good is not None:
            assert guest_bytes(state) == guest_bytes(mended) == good


@pytest.mark.parametrize("damage", CRASHES.values(), ids=CRASHES)
def test_an_error_leaves_the_image_no_worse(plain: Image, damage: Damage) -> None:
    damage(plain)
    good = guest_bytes(plain.data)
    whole, _ = recorded(plain.data)
    for fail_at in range(len(whole.events)):
        storage, failed = recorded(plain.data, fail_at)
        assert failed
        left = bytearray(storage.size())
        storage.readv((left,), 0)
        result, mended = repair_bytes(left)
        assert exit_status(result) == 0
        if good is not None:
            assert guest_bytes(mended) == good
