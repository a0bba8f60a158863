"""Jobs that change an image in place tell how far they are, and can be cancelled whenever they do.

Cancelled, the image is what it was or what it was to become, QEMU finds nothing wrong with it, and
the job can be run again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest

import underlay
import underlay.handle
from underlay import jobs
from underlay.storage import PreallocateMode

from .files import allocated

Tool = Callable[..., str]

#: A table for each 32 KiB.
CLUSTER = 512
SIZE = 1 << 19
#: At so many of its calls the callback raises, in one run each.
MOMENTS = 8


@attrs.frozen
class Change:
    """A job on an image, and what the image is first."""

    run: Callable[..., object]
    image: str = "full"
    #: More about the result than ``state`` tells.
    also: Callable[[Path], object] = bool


def _resize(size: int, preallocation: str = "off") -> Callable[..., object]:
    gate = underlay.PermissiveImplicitOpenGate()
    return partial(jobs.resize, size=size, preallocation=preallocation, shrink=True, gate=gate)


def _refcount_order(path: Path) -> object:
    return int.from_bytes(path.read_bytes()[96:100], "big")


CHANGES = {
    "grow with metadata": Change(_resize(2 * SIZE, preallocation="metadata")),
    "grow with data": Change(_resize(2 * SIZE, preallocation="full")),
    "grow what is empty": Change(_resize(2 * SIZE, preallocation="falloc"), "empty"),
    "grow over more": Change(_resize(2 * SIZE), "overlay"),
    "grow over more in version 2": Change(_resize(2 * SIZE), "overlay of version 2"),
    "grow raw": Change(_resize(2 * SIZE, preallocation="full"), "raw"),
    "shrink": Change(_resize(SIZE // 4)),
    "shrink raw": Change(_resize(SIZE // 4), "raw"),
    "create a snapshot": Change(partial(jobs.create_snapshot, name="new")),
    "apply a snapshot": Change(partial(jobs.apply_snapshot, id_or_name="s")),
    "delete a snapshot": Change(partial(jobs.delete_snapshot, id_or_name="s")),
    "add a bitmap": Change(partial(jobs.add_bitmap, name="new")),
    "remove a bitmap": Change(partial(jobs.remove_bitmap, name="b"), "marked"),
    "clear a bitmap": Change(partial(jobs.clear_bitmap, name="b"), "marked"),
    "merge a bitmap": Change(partial(jobs.merge_bitmap, name="b", source="c"), "marked"),
    "amend refcounts": Change(
        partial(jobs.amend, options={"refcount_bits": 64}), also=_refcount_order
    ),
    "amend the size": Change(partial(jobs.amend, options={"size": 2 * SIZE})),
}


def build(kind: str, path: Path) -> None:
    """Make an image with data in half of its clusters, a snapshot that differs, and bitmaps."""
    if kind == "raw":
        path.write_bytes(b"raw." * (SIZE // 4))
        return
    options: dict[str, Any] = {"cluster_size": CLUSTER, "size": SIZE}
    if kind.startswith("overlay"):
        below = path.with_name("below.raw")
        below.write_bytes(b"below..." * (3 * SIZE // 16))
        options |= {"backing_file": below.name, "backing_fmt": "raw"}
    if kind == "overlay of version 2":
        options["compat"] = "v2"
    if kind == "marked":
        options["size"] = 16 << 20
    jobs.create(path, **options)
    if kind == "marked":
        _mark(path, "b", 0)
        _mark(path, "c", 8192)
    if kind != "full":
        return
    _fill(path, b"old")
    jobs.create_snapshot(path, "s")
    jobs.add_bitmap(path, "b", granularity=512)
    _fill(path, b"new")
    jobs.add_bitmap(path, "c", granularity=1024)
    _fill(path, b"newer", SIZE // 2)


def _fill(path: Path, data: bytes, start: int = 0) -> None:
    with underlay.open_image(path, format="qcow2", writable=True) as disk:
        for at in range(start, SIZE, 8 * CLUSTER):
            disk.write((data * CLUSTER)[: 4 * CLUSTER], at)


def _mark(path: Path, bitmap: str, first: int) -> None:
    """Let a bitmap have bits in each of its clusters."""
    jobs.add_bitmap(path, bitmap, granularity=512)
    with underlay.open_image(path, format="qcow2", writable=True) as disk:
        for at in range(first, disk.size, 64 << 10):
            disk.write(b"marked", at)
    jobs.disable_bitmap(path, bitmap)


def state(path: Path) -> object:
    """All that a guest, and whoever backs it up, can know of an image."""
    with underlay.open_any(path, gate=underlay.PermissiveImplicitOpenGate()) as disk:
        bitmaps = [(one, list(jobs.dirty_ranges(disk, one.name))) for one in jobs.bitmaps(disk)]
        kept = [one.name for one in jobs.snapshots(disk)]
        seen = hashlib.sha256(disk.read_bytes(0, disk.size)).hexdigest()
        return disk.size, seen, kept, bitmaps


class Cancelled(Exception):  # noqa: N818 - it is no error
    """The caller does not want it any more."""


@attrs.define
class Told:
    """A callback that keeps what it is told, and raises at its n-th call."""

    moment: int | None = None
    calls: list[jobs.Progress] = attrs.field(factory=list[jobs.Progress])

    def __call__(self, progress: jobs.Progress) -> None:
        self.calls.append(progress)
        if len(self.calls) - 1 == self.moment:
            raise Cancelled

    def check(self) -> None:
        done = [each.done for each in self.calls]
        totals = [each.total for each in self.calls]
        assert done == sorted(done)
        assert totals == sorted(totals)
        assert done[-1] == totals[-1] > 0
        assert all(each.done < each.total for each in self.calls[:-1])


@pytest.fixture
def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(underlay.handle, "_RESERVED_AT_ONCE", 64 << 10)


@pytest.mark.usefixtures("in_small_pieces")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_whole_or_not_at_all(name: str, tmp_path: Path, qemu_img: Tool) -> None:
    change = CHANGES[name]
    original, path = tmp_path / "original", tmp_path / "disk"
    build(change.image, original)

    def seen() -> object:
        return state(path), change.also(path)

    shutil.copy(original, path)
    before = seen()
    told = Told()
    change.run(path, progress=told)
    told.check()
    after = seen()
    count = len(told.calls)
    assert count > (1 if name == "add a bitmap" else 3) or "raw" in name
    for moment in sorted({*range(0, count, -(-count // MOMENTS)), count - 1}):
        shutil.copy(original, path)
        told = Told(moment)
        with pytest.raises(Cancelled):
            change.run(path, progress=told)
        left = seen()
        assert left in (before, after), f"at {told.calls[-1]}"
        assert left == after if moment == count - 1 else before in (left, before)
        if change.image != "raw":
            assert not jobs.check(path).leaks
            qemu_img("check", "-q", path)
        if left == before:
            change.run(path)
            assert seen() == after


@pytest.mark.usefixtures("in_small_pieces")
@pytest.mark.parametrize("image", ["full", "empty", "raw"])
def test_a_growth_that_is_cancelled_gives_its_space_back(tmp_path: Path, image: str) -> None:
    path = tmp_path / "disk"
    build(image, path)
    held = allocated(path)
    with pytest.raises(Cancelled):
        jobs.resize(path, 9 * SIZE, preallocation="full", progress=Told(20))
    # A larger L1 table and refcount blocks stay.
    assert allocated(path) < held + SIZE // 16


@pytest.mark.usefixtures("in_small_pieces")
@pytest.mark.parametrize(
    ("format_name", "mode"),
    [("qcow2", "metadata"), ("qcow2", "full"), ("raw", "falloc"), ("raw", "full")],
)
def test_creating_can_be_cancelled(tmp_path: Path, format_name: str, mode: str) -> None:
    path = tmp_path / "disk"
    given: dict[str, Any] = {"format": format_name, "size": 4 * SIZE, "preallocation": mode}
    if format_name == "qcow2":
        given["cluster_size"] = CLUSTER
    told = Told()
    jobs.create(path, progress=told, **given)
    told.check()
    count = len(told.calls)
    assert count > 2
    path.unlink()
    for moment in (0, count // 2, count - 1):
        with pytest.raises(Cancelled):
            jobs.create(path, progress=Told(moment), **given)
        assert not path.exists()
    jobs.create(path, **given)
    assert jobs.info(path)[0].virtual_size == 4 * SIZE


#: What a conversion does besides copying, and how many more bytes it counts for that.
CONVERSIONS: dict[str, tuple[dict[str, Any], int]] = {
    "nothing": ({"output_format": "qcow2"}, 0),
    "tables": (
        {
            "output_format": "qcow2",
            "options": {"preallocation": "metadata", "cluster_size": CLUSTER},
        },
        SIZE,
    ),
    "room in an image": ({"output_format": "qcow2", "options": {"preallocation": "full"}}, SIZE),
    "room": ({"options": {"preallocation": "falloc"}}, SIZE),
    "bitmaps": ({"output_format": "qcow2", "bitmaps": True}, SIZE + SIZE // 2),
}


@pytest.mark.usefixtures("in_small_pieces")
@pytest.mark.parametrize("name", CONVERSIONS)
def test_all_parts_of_a_conversion_tell_and_can_be_cancelled(name: str, tmp_path: Path) -> None:
    given, more = CONVERSIONS[name]
    source, path = tmp_path / "source", tmp_path / "copy"
    build("full", source)
    told = Told()
    jobs.convert(source, path, progress=told, **given)
    told.check()
    assert told.calls[-1].total == SIZE + more
    assert not jobs.compare(source, path).difference
    path.unlink()
    count = len(told.calls)
    assert count > (5 if more else 1)
    for moment in sorted({*range(0, count, -(-count // MOMENTS)), count - 1}):
        with pytest.raises(Cancelled):
            jobs.convert(source, path, progress=Told(moment), **given)
        assert not path.exists()


# -- repairs


def _leak(path: Path) -> None:
    """Count clusters that nothing leads to."""
    _set_refcounts(path, last=True)


def _lose(path: Path) -> None:
    """Forget references: refcounts are lower than they must be."""
    _set_refcounts(path, last=False)


def _set_refcounts(path: Path, *, last: bool) -> None:
    content = bytearray(path.read_bytes())
    table = int.from_bytes(content[48:56], "big")
    blocks = [
        int.from_bytes(content[at : at + 8], "big") for at in range(table, table + CLUSTER, 8)
    ]
    for block in filter(None, blocks):
        for at in range(block, block + CLUSTER, 32):
            count = int.from_bytes(content[at : at + 2], "big")
            if count and (count == 1) == last:
                content[at : at + 2] = (count + 1 if last else count - 1).to_bytes(2, "big")
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_leak, _lose])
@pytest.mark.parametrize("options", [{}, {"leaks_only": True}, {"dry_run": True}])
def test_a_repair_can_be_cancelled(
    tmp_path: Path,
    qemu_img: Tool,
    damage: Callable[[Path], None],
    options: dict[str, Any],
) -> None:
    original, path = tmp_path / "original", tmp_path / "disk"
    build("full", original)
    expected = state(original)
    damage(original)
    shutil.copy(original, path)
    told = Told()
    jobs.repair(path, progress=told, **options)
    told.check()
    count = len(told.calls)
    worst = jobs.check(original)
    for moment in sorted({*range(0, count, -(-count // MOMENTS)), count - 1}):
        shutil.copy(original, path)
        with pytest.raises(Cancelled):
            jobs.repair(path, progress=Told(moment), **options)
        left = jobs.check(path)
        assert left.corruptions <= worst.corruptions
        if options == {"dry_run": True}:
            assert path.read_bytes() == original.read_bytes()
            continue
        assert state(path) == expected
        jobs.repair(path)
        qemu_img("check", "-q", path)


def test_a_disk_goes_on_after_a_repair_that_was_cancelled(tmp_path: Path, qemu_img: Tool) -> None:
    path = tmp_path / "disk"
    build("full", path)
    with underlay.open_image(path, format="qcow2", writable=True) as disk:
        repairable = disk.capability(underlay.capabilities.Repairable)
        assert repairable is not None

        def stop(done: int, total: int) -> None:
            if done > total // 2:
                raise Cancelled

        with pytest.raises(Cancelled):
            repairable.repair(leaks_only=False, progress=stop)
        disk.write(b"after" * 100, 4 * CLUSTER)
        assert disk.read_bytes(4 * CLUSTER, 5) == b"after"
    qemu_img("check", "-q", path)


def test_what_reads_only_tells_too(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    build("full", path)
    readers: tuple[Callable[..., object], ...] = (
        jobs.check,
        jobs.picture,
        jobs.measure,
        jobs.digest,
    )
    for job in readers:
        told = Told()
        job(path, progress=told)
        assert told.calls[-1].done == told.calls[-1].total > 0
        with pytest.raises(Cancelled):
            job(path, progress=Told(0))


def test_modes_that_reserve() -> None:
    assert [mode.value for mode in PreallocateMode if mode.reserves] == ["falloc", "full"]
