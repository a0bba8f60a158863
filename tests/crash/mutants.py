"""Our driver, broken in one place each: what the crash test is there to find.

A mutant changes a running program only, by replacing methods. If the driver is rebuilt and a name
is gone, the mutant cannot be made and its test fails: it then has to be told how the new driver
would break.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import attrs
import pytest

from underlay.handle import StorageHandle
from underlay_drivers.qcow2 import claims
from underlay_drivers.qcow2.allocation import Allocator
from underlay_drivers.qcow2.bitmap_tracking import Tracking
from underlay_drivers.qcow2.bitmap_writing import BitmapChange
from underlay_drivers.qcow2.writeback import Writeback

from .guest import (
    Apply,
    CopyBitmaps,
    Discard,
    Flush,
    Grow,
    Operation,
    Push,
    Take,
    WriteData,
    WriteZeroes,
)

__all__ = ["MUTANTS", "Mutant"]

Patch = pytest.MonkeyPatch


@attrs.frozen
class Mutant:
    """One way to be wrong."""

    name: str
    #: On which image it shows.
    shape: str
    breaks: Callable[[Patch], None]
    #: By what it shows, if not by what is tried anyway.
    operations: tuple[Operation, ...] = ()


def _replace_async(patch: Patch, owner: type, name: str, change: Callable[..., Any]) -> None:
    """``owner.name`` becomes ``change(original, self, …)``."""
    original = getattr(owner, name)

    async def replaced(self: Any, *arguments: Any, **named: Any) -> Any:
        return await change(original, self, *arguments, **named)

    patch.setattr(owner, name, replaced)


def _change_work(patch: Patch, change: Callable[[Any], Any]) -> None:
    """What a flush is about to write is changed."""
    original = Writeback._take

    def take(self: Writeback) -> Any:
        work = original(self)
        return None if work is None else change(work)

    patch.setattr(Writeback, "_take", take)


def _no_barrier_inside(patch: Patch, owner: type, name: str) -> None:
    """While this method runs nothing is synced or ordered."""
    depth = [0]

    async def count(original: Any, self: Any, *arguments: Any) -> Any:
        depth[0] += 1
        try:
            return await original(self, *arguments)
        finally:
            depth[0] -= 1

    async def maybe(original: Any, self: Any) -> None:
        if not depth[0]:
            await original(self)

    _replace_async(patch, owner, name, count)
    for method in ("sync", "barrier"):
        _replace_async(patch, StorageHandle, method, maybe)


# -- the order of a flush


def _no_barrier_before_entries(patch: Patch) -> None:
    _change_work(patch, lambda work: attrs.evolve(work, shows=False))


def _data_file_not_synced(patch: Patch) -> None:
    def storages(self: Writeback) -> list[StorageHandle]:
        return [self._disk.image]

    patch.setattr(Writeback, "_storages", storages)


def _counts_with_entries(patch: Patch) -> None:
    def change(work: Any) -> Any:
        counts = work.refcounts
        if counts is None:
            return work
        return attrs.evolve(
            work,
            refcounts=attrs.evolve(counts, block_bytes=[]),
            changed_bytes=counts.block_bytes + work.changed_bytes,
        )

    _change_work(patch, change)


def _new_tables_with_l1(patch: Patch) -> None:
    _change_work(
        patch,
        lambda work: attrs.evolve(
            work, new_bytes=[], changed_bytes=work.changed_bytes + work.new_bytes
        ),
    )


def _entries_first(patch: Patch) -> None:
    async def write(original: Any, self: Any, work: Any) -> None:
        await self._write_all(work.changed_bytes)
        await original(self, work)

    _replace_async(patch, Writeback, "_write", write)


def _no_barrier_before_refcount_pointers(patch: Patch) -> None:
    _no_barrier_inside(patch, Writeback, "_write_unlinked")


def _no_barrier_around_the_header(patch: Patch) -> None:
    _no_barrier_inside(patch, Writeback, "_lead")


# -- promises


def _flush_writes_nothing(patch: Patch) -> None:
    async def flush(original: Any, self: Any) -> None:
        return

    _replace_async(patch, Writeback, "flush", flush)


def _sync_does_nothing(patch: Patch) -> None:
    async def sync(original: Any, self: Any) -> None:
        return

    _replace_async(patch, Writeback, "sync", sync)


# -- freeing


def _freed_at_once(patch: Patch) -> None:
    def release(self: Any, offset: int, clusters: int = 1) -> None:
        self._ready.append([(offset, clusters)])

    patch.setattr(Writeback, "release", release)


def _freed_when_written(patch: Patch) -> None:
    """An entry's removal is written, and not durable yet."""

    async def flush(original: Any, self: Any) -> None:
        await original(self)
        self._ready.append(self._written)
        self._written = []

    _replace_async(patch, Writeback, "flush", flush)


# -- what surrounds a write


def _nothing_is_filled(patch: Patch) -> None:
    def border(*arguments: Any, clean: bool) -> Any:
        return arguments[-1]

    patch.setattr(claims, "fill_from", border)
    patch.setattr(claims, "fill_to", border)


def _counts_never_written(patch: Patch) -> None:
    original = Allocator.take_changes

    def take(self: Allocator) -> Any:
        changes = original(self)
        return None if changes is None else attrs.evolve(changes, block_bytes=[])

    patch.setattr(Allocator, "take_changes", take)


def _bitmaps_stay_valid(patch: Patch) -> None:
    async def write(original: Any, self: Any, flags: Any) -> None:
        return

    _replace_async(patch, Tracking, "_write_flags", write)


def _bitmaps_are_not_outdated_first(patch: Patch) -> None:
    _no_barrier_inside(patch, Tracking, "_write_flags")


def _bitmaps_are_true_too_early(patch: Patch) -> None:
    _no_barrier_inside(patch, Tracking, "store")


def _bitmaps_miss_writes(patch: Patch) -> None:
    patch.setattr(Tracking, "recording", False)  # so plain data is rewritten by anybody


def _bitmaps_are_shown_before_they_are_there(patch: Patch) -> None:
    _no_barrier_inside(patch, BitmapChange, "overwrite")


_REWRITE: Final = (WriteData(9000, 300), WriteData(4096, 300), Flush())
_REUSE: Final = (
    WriteData(0, 4096),
    Flush(),
    Discard(0, 4096),
    Push(),
    WriteData(8192, 2048),
    WriteZeroes(1024, 512),
    Flush(),
    Discard(8192, 2048),
    Flush(),
    WriteData(12288, 4096),
    Flush(),
)

MUTANTS: Final = (
    Mutant("no barrier between what entries need and entries", "v3", _no_barrier_before_entries),
    Mutant("the data file is not synced before entries", "data-file", _data_file_not_synced),
    Mutant("refcounts are written with the entries", "refcount-1", _counts_with_entries),
    Mutant(
        "an L2 table is written with the L1 entry",
        "v3",
        _new_tables_with_l1,
        (Apply("old"), WriteData(4708, 300), Flush()),
    ),
    Mutant("entries are written first", "backing", _entries_first),
    Mutant(
        "a refcount block is not synced before the table's entry",
        "refcount-64",
        _no_barrier_before_refcount_pointers,
    ),
    Mutant(
        "the header leads to a refcount table that is not synced",
        "table-growth",
        _no_barrier_around_the_header,
        (WriteData(3790 * 512, 150 * 512), Flush()),
    ),
    Mutant(
        "the header leads to an L1 table that is not synced",
        "v3",
        _no_barrier_around_the_header,
        (WriteData(0, 20000), Grow(2 << 20), Flush()),
    ),
    Mutant(
        "the header leads to snapshots that are not synced",
        "v3",
        _no_barrier_around_the_header,
        (Take("new"), Flush()),
    ),
    Mutant("a flush is acknowledged before caches are written", "v3", _flush_writes_nothing),
    Mutant("a sync is acknowledged and not done", "v3", _sync_does_nothing),
    Mutant("a cluster is freed before its unlink is written", "v3", _freed_at_once, _REUSE),
    Mutant("a cluster is freed before its unlink is durable", "v3", _freed_when_written, _REUSE),
    Mutant("what surrounds a write is not copied", "backing", _nothing_is_filled),
    Mutant("refcounts are never written", "v2", _counts_never_written),
    Mutant("bitmaps stay up to date whatever is written", "bitmap", _bitmaps_stay_valid),
    Mutant(
        "a write reaches the disk before bitmaps are out of date",
        "bitmap",
        _bitmaps_are_not_outdated_first,
    ),
    Mutant("bitmaps are up to date before they say it all", "bitmap", _bitmaps_are_true_too_early),
    Mutant("what is rewritten in place is not recorded", "bitmap", _bitmaps_miss_writes, _REWRITE),
    Mutant(
        "a bitmap leads to a table that is not there yet",
        "bitmap",
        _bitmaps_are_shown_before_they_are_there,
    ),
    Mutant(
        "the header leads to copied bitmaps that are not synced",
        "bitmap",
        _no_barrier_around_the_header,
        (CopyBitmaps(("copied", "copied too"), (3, 4, 50)), Flush()),
    ),
)
