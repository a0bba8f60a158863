"""What is done to the dirty bitmaps of a disk, and what they must say then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from underlay import SyncFormatAccess
from underlay.capabilities import Bitmap, BitmapStore, DirtyRanges

from .bitmaps import GRANULE, Kept

if TYPE_CHECKING:
    from .guest import History, Moment

__all__ = ["ChangeBitmap", "CopyBitmaps"]


@attrs.frozen
class ChangeBitmap:
    """Add, remove, clear, disable or enable a dirty bitmap, or merge another one into it.

    Where that cannot be, for want of a bitmap or because there is one, nothing happens.
    """

    action: str
    name: str
    source: str = ""

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        store = disk.capability(BitmapStore)
        names = [bitmap.name for bitmap in store.bitmaps()]
        if self.action == "add":
            if self.name not in names:
                store.add_bitmap(self.name, granularity=GRANULE)
        elif self.name in names and self.action == "merge":
            if self.source in names:
                store.merge_bitmap(self.name, self.source)
        elif self.name in names:
            getattr(store, f"{self.action}_bitmap")(self.name)

    def after(self, history: History, number: int) -> Moment:
        now = history.now
        bitmaps = dict(now.bitmaps)
        kept = bitmaps.get(self.name)
        if self.action == "add":
            bitmaps.setdefault(self.name, Kept(since=now.content))
        elif kept is not None and self.action == "remove":
            del bitmaps[self.name]
        elif kept is not None:
            bitmaps[self.name] = self._changed(kept, now)
        return attrs.evolve(now, bitmaps=bitmaps)

    def _changed(self, kept: Kept, now: Moment) -> Kept:
        dirty = kept.now(now.content)
        if self.action == "clear":
            return Kept(since=None if kept.since is None else now.content)
        if self.action == "merge":
            source = now.bitmaps.get(self.source)
            more = frozenset[int]() if source is None else source.now(now.content)
            return attrs.evolve(kept, dirty=dirty | more)
        return Kept(dirty, now.content if self.action == "enable" else None)


@attrs.frozen
class _Elsewhere(BitmapStore):
    """The bitmaps of another disk of so many bytes, all of which say the same."""

    size: int
    granules: tuple[int, ...]

    async def bitmaps(self) -> Sequence[Bitmap]:
        raise AssertionError("whoever copies them has been told which")

    async def dirty_ranges(self, name: str, offset: int = 0) -> DirtyRanges:
        starts = [granule * GRANULE for granule in self.granules]
        ranges = tuple((at, min(GRANULE, self.size - at)) for at in starts if at < self.size)
        return DirtyRanges(ranges=ranges, end=self.size, size=self.size)


@attrs.frozen
class CopyBitmaps:
    """Copy bitmaps of another disk of this size, all at once; the first one records guest writes.

    Where there is one of these names nothing happens.
    """

    names: tuple[str, ...]
    granules: tuple[int, ...]

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        store = disk.capability(BitmapStore)
        if {bitmap.name for bitmap in store.bitmaps()}.isdisjoint(self.names):
            copied = [
                Bitmap(name=name, granularity=GRANULE, in_use=False, auto=name == self.names[0])
                for name in self.names
            ]
            store.copy_bitmaps(_Elsewhere(disk.size, self.granules), copied)

    def after(self, history: History, number: int) -> Moment:
        now = history.now
        if not now.bitmaps.keys().isdisjoint(self.names):
            return now
        new = {
            name: Kept(frozenset(self.granules), now.content if name == self.names[0] else None)
            for name in self.names
        }
        return attrs.evolve(now, bitmaps={**now.bitmaps, **new})
