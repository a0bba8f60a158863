"""Copying many bitmaps at once: one new directory for all of them, whatever happens meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest

import underlay
from underlay import SyncFormatAccess, jobs
from underlay.capabilities import Bitmap, BitmapStore, DirtyRanges
from underlay.errors import (
    ConflictError,
    LimitExceededError,
    OptionError,
    StorageError,
    UnderlayError,
)
from underlay.jobs.check import check
from underlay.storage import BlockingStorage, ReadBuffers, WriteBuffers
from underlay.testing.wrappers import WrappedStorage
from underlay_drivers.qcow2 import layout
from underlay_storage.memory import MemoryStorage

from .bitmapping import dirty, their_dirty
from .ends import Ends

SIZE = (1 << 20) + 512
GRANULE = 4096
CLUSTER = 4096

Content = dict[str, list[tuple[int, int]]]


def content(count: int) -> Content:
    """What is dirty in so many bitmaps: nothing, all, or some."""

    def runs(number: int) -> list[tuple[int, int]]:
        at = number * GRANULE % (1 << 19)
        return [[], [(0, SIZE)], [(at, GRANULE)], [(at, GRANULE), (1 << 20, 512)]][number % 4]

    return {f"bitmap-{number}": runs(number) for number in range(count)}


@attrs.frozen
class Elsewhere(BitmapStore):
    """The bitmaps of a disk that no image is needed for; each second one is enabled."""

    held: Content
    size: int = SIZE

    def listed(self) -> list[Bitmap]:
        return [
            Bitmap(name=name, granularity=GRANULE, in_use=False, auto=number % 2 == 0)
            for number, name in enumerate(self.held)
        ]

    async def bitmaps(self) -> Sequence[Bitmap]:
        return self.listed()

    async def dirty_ranges(self, name: str, offset: int = 0) -> DirtyRanges:
        return DirtyRanges(ranges=tuple(self.held[name]), end=self.size, size=self.size)

    def copy(self, disk: SyncFormatAccess, **more: Any) -> None:
        """Copy all of them to a disk."""
        disk.capability(BitmapStore).copy_bitmaps(self, self.listed(), **more)


class Watched(WrappedStorage):
    """Knows what goes to and fro; ``fails`` is the number of the write or sync that does."""

    def __init__(self, inner: MemoryStorage) -> None:
        super().__init__(inner)
        self.fails: int | None = None
        self.changes = self.syncs = 0
        self.written: list[bytes] = []
        self.read: list[bytes] = []

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """Remembered."""
        super().readv(buffers, offset)
        self.read.append(b"".join(buffers))

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """Remembered, or a failure."""
        self._change()
        self.written.append(b"".join(buffers))
        super().writev(buffers, offset)

    def sync(self) -> None:
        """Counted, or a failure."""
        self._change()
        self.syncs += 1
        super().sync()

    def _change(self) -> None:
        self.changes += 1
        if self.changes - 1 == self.fails:
            raise StorageError("no luck")


def new_image(held: Content | None = None) -> MemoryStorage:
    """An image in memory with these bitmaps."""
    storage = MemoryStorage(0)
    with underlay.create(storage, size=SIZE, cluster_size=CLUSTER) as disk:
        Elsewhere(held or {}).copy(disk)
    return storage


def kept(image: Any) -> Content:
    """What is dirty in which bitmap of an image."""
    gate = underlay.PermissiveImplicitOpenGate()
    with underlay.open_image(image, format="qcow2", gate=gate) as disk:
        return {one.name: dirty(disk, one.name) for one in jobs.bitmaps(disk)}


def content_of(storage: MemoryStorage) -> bytes:
    """All its bytes."""
    data = bytearray(storage.size())
    storage.readv((memoryview(data),), 0)
    return bytes(data)


def test_one_directory_shows_all_that_a_conversion_copies() -> None:
    """It is read once, too; and what syncs are needed does not depend on how many there are."""
    syncs: set[int] = set()
    for count in (4, 40, 400):
        wanted = content(count)
        source, target = Watched(new_image(wanted)), Watched(new_image())
        with (
            underlay.open_image(source, format="qcow2") as from_disk,
            underlay.open_image(target, format="qcow2", writable=True) as to_disk,
        ):
            source.read.clear()
            target.written.clear()
            target.syncs = 0
            jobs.convert(from_disk, to_disk, output_format="qcow2", bitmaps=True)
            assert sum(b"bitmap-0" in data for data in source.read) == 1
            assert sum(b"bitmap-0" in data for data in target.written) == 1
            assert len(target.written) < 2 * count + 20  # a table, and mostly a cluster of bits
            syncs.add(target.syncs)
        assert kept(target.inner) == wanted
    assert len(syncs) == 1


@pytest.mark.parametrize("options", [{}, {"cluster_size": 512}, {"data_file": "data.raw"}])
def test_both_ends_copy_what_the_other_copied(
    ends: Ends, qemu: Callable[[str], str], options: dict[str, Any]
) -> None:
    wanted = content(60)
    ends.create(SIZE, **options)
    with ends.open() as disk:
        jobs.add_bitmap(disk, "earlier", granularity=GRANULE)
        Elsewhere(wanted).copy(disk)
    wanted = {"earlier": [], **wanted}
    ends.agree()
    flags = [
        (one["name"], one["flags"], one["granularity"])
        for one in ends.info()["format-specific"]["data"]["bitmaps"]
    ]
    assert flags == [("earlier", ["auto"], GRANULE)] + [
        (one.name, ["auto"] if one.auto else [], GRANULE) for one in Elsewhere(content(60)).listed()
    ]
    assert kept(ends.path) == wanted
    assert their_dirty(qemu, ends.path, "bitmap-3") == wanted["bitmap-3"]
    theirs = ends.path.with_name("theirs.qcow2")
    ends.qemu_img("convert", "-O", "qcow2", "--bitmaps", ends.path, theirs)
    ours = ends.path.with_name("ours.qcow2")
    jobs.convert(theirs, ours, output_format="qcow2", bitmaps=True)
    for path in (theirs, ours):
        assert kept(path) == wanted
        ends.qemu_img("check", "-q", path)


def sound(storage: BlockingStorage) -> bool:
    """Whether a check finds nothing at all."""
    result = check(storage)
    return (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)


def test_whatever_fails_all_are_there_or_none() -> None:
    """A write or a sync, each in turn. Where writing goes on, nothing was leaked."""
    old, new = content(1), {f"new-{name}": runs for name, runs in content(6).items()}
    outcomes: set[tuple[bool, bool]] = set()
    for number in itertools.count():
        storage = Watched(new_image(old))
        disk = underlay.open_image(storage, format="qcow2", writable=True)
        storage.changes, storage.fails = 0, number
        failed, ended = False, False
        try:
            Elsewhere(new).copy(disk)
        except StorageError:
            failed = True
        storage.fails = None
        try:
            disk.close()
        except UnderlayError:
            ended = True  # nobody knows what has reached the storage
        assert check(storage.inner).corruptions == 0, number
        assert ended or sound(storage.inner), number
        found = kept(storage.inner)
        assert found == ({**old, **new} if found.keys() > old.keys() else old), number
        outcomes.add((found == old, ended))
        if not failed:
            assert number > 10
            break
    # Before it was shown; as nobody knew whether it was shown; and after that.
    assert outcomes >= {(True, False), (True, True), (False, False)}


def test_a_copying_that_is_stopped_takes_no_room() -> None:
    """At each call of its callback; only at the last one it has happened."""
    old, new = content(1), {f"new-{name}": runs for name, runs in content(20).items()}
    told: list[tuple[int, int]] = []
    for calls in itertools.count():
        told.clear()

        def progress(done: int, total: int, calls: int = calls) -> None:
            told.append((done, total))
            if len(told) > calls:
                raise KeyboardInterrupt

        storage = new_image(old)
        stopped = False
        with underlay.open_image(storage, format="qcow2", writable=True) as disk:
            try:
                Elsewhere(new).copy(disk, progress=progress)
            except KeyboardInterrupt:
                stopped = True
        assert sound(storage)
        done, total = told[-1]
        assert kept(storage) == ({**old, **new} if done == total else old)
        if not stopped:
            assert total == 20 * -(-SIZE // GRANULE)
            assert len(told) > 20
            break


def test_what_cannot_all_be_added_adds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "BITMAPS_MAX", 5)
    storage = new_image({"there": []})
    before = content_of(storage)
    wrong: list[tuple[type[UnderlayError], str, Elsewhere]] = [
        (LimitExceededError, "Maximum number", Elsewhere(content(5))),
        (ConflictError, "already exists: there", Elsewhere({**content(1), "there": []})),
        (OptionError, "exceeds maximum", Elsewhere({**content(1), "x" * 1024: []})),
        (ConflictError, "different sizes", Elsewhere(content(2), size=SIZE + 512)),
    ]
    with underlay.open_image(storage, format="qcow2", writable=True) as disk:
        for error, why, elsewhere in wrong:
            with pytest.raises(error, match=why):
                elsewhere.copy(disk)
        twice = Elsewhere(content(1))
        with pytest.raises(ConflictError, match="already exists: bitmap-0"):
            disk.capability(BitmapStore).copy_bitmaps(twice, twice.listed() * 2)
    assert content_of(storage) == before
    with underlay.open_image(storage, format="qcow2", writable=True) as disk:
        Elsewhere(content(4)).copy(disk)
    assert len(kept(storage)) == 5


def test_a_directory_that_others_change_is_read_anew_when_asked(ends: Ends) -> None:
    ends.create(SIZE)
    jobs.add_bitmap(ends.path, "first")
    with ends.open(writable=False, lock=False) as disk:
        assert [one.auto for one in jobs.bitmaps(disk)] == [True]
        jobs.disable_bitmap(ends.path, "first")
        disk.invalidate_cache()
        assert [one.auto for one in jobs.bitmaps(disk)] == [False]
        jobs.add_bitmap(ends.path, "second")
        disk.invalidate_cache()
        assert [one.name for one in jobs.bitmaps(disk)] == ["first", "second"]
