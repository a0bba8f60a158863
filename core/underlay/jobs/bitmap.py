"""Dirty bitmaps: which parts of a disk were written to since some time.

Every function takes an open disk, which stays open, or a name; opening by name opens nothing that
the image names. A change is there whole or not at all, and durable when the function returns.
``progress`` counts the bytes of the disk that the bitmap is about.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Unpack

import attrs

from underlay.capabilities import Bitmap, BitmapStore
from underlay.errors import OptionError, UnsupportedOperationError
from underlay.jobs.opened import OpeningAlone, Source, opened_alone
from underlay.jobs.progress import ProgressCallback, counting
from underlay.units import parse_size

if TYPE_CHECKING:
    from underlay.sync import SyncFormatAccess

__all__ = [
    "DirtyRange",
    "add_bitmap",
    "bitmaps",
    "clear_bitmap",
    "dirty_ranges",
    "disable_bitmap",
    "enable_bitmap",
    "merge_bitmap",
    "remove_bitmap",
]


@attrs.frozen
class DirtyRange:
    """Guest bytes that a bitmap calls dirty."""

    #: Guest bytes.
    start: int
    length: int


def bitmaps(image: Source, **opening: Unpack[OpeningAlone]) -> list[Bitmap]:
    """The bitmaps of an image, in its order; none where its format has none.

    Example::

        for bitmap in underlay.jobs.bitmaps("disk.qcow2"):
            print(bitmap.name, bitmap.granularity)
    """
    with opened_alone(image, **opening) as disk:
        store = disk.capability(BitmapStore)
        return [] if store is None else list(store.bitmaps())


def dirty_ranges(image: Source, name: str, **opening: Unpack[OpeningAlone]) -> Iterator[DirtyRange]:
    """The dirty ranges of a bitmap, in order; those that touch are one. Needs little memory.

    Example::

        underlay.jobs.add_bitmap("disk.qcow2", "monday")
        for dirty in underlay.jobs.dirty_ranges("disk.qcow2", "monday"):
            print(dirty.start, dirty.length)

    Raises:
        OptionError: there is no bitmap of this name.
        ConflictError: it was not saved properly, so nobody knows.
        CorruptImageError: it is damaged.
    """
    with opened_alone(image, **opening) as disk:
        store = _store(disk, name)
        pending: DirtyRange | None = None
        offset = 0
        while True:
            found = store.dirty_ranges(name, offset)
            for start, length in found.ranges:
                if pending is not None and pending.start + pending.length == start:
                    pending = DirtyRange(pending.start, pending.length + length)
                    continue
                if pending is not None:
                    yield pending
                pending = DirtyRange(start, length)
            offset = found.end
            if offset >= found.size:
                break
        if pending is not None:
            yield pending


def add_bitmap(
    image: Source,
    name: str,
    *,
    granularity: int | str | None = None,
    enabled: bool = True,
    progress: ProgressCallback | None = None,
    **opening: Unpack[OpeningAlone],
) -> Bitmap:
    """Add a bitmap that has nothing dirty yet.

    ``granularity`` is how many bytes one bit stands for: a power of two from 512 bytes to 2 GiB, by
    default about a cluster. It records guest writes unless ``enabled`` is False.

    Example::

        underlay.jobs.add_bitmap("disk.qcow2", "backup-1", granularity="64k")

    Raises:
        ConflictError: there is one of this name.
        OptionError: the name or the granularity is impossible.
        UnsupportedOperationError: this image cannot have bitmaps.
    """
    size = None if granularity is None else parse_size(granularity, option="granularity")
    with opened_alone(image, writable=True, **opening) as disk:
        store = disk.capability(BitmapStore)
        if store is None:
            where = disk.collect_storage_dependencies()[0].name()
            raise UnsupportedOperationError(
                f"Can't store persistent bitmaps to {where}: Operation not supported"
            )
        added: Bitmap = store.add_bitmap(
            name, granularity=size, enabled=enabled, progress=counting(progress)
        )
        return added


def remove_bitmap(
    image: Source,
    name: str,
    *,
    progress: ProgressCallback | None = None,
    **opening: Unpack[OpeningAlone],
) -> None:
    """Remove a bitmap, one that was not saved properly too.

    Example::

        underlay.jobs.add_bitmap("disk.qcow2", "old")
        underlay.jobs.remove_bitmap("disk.qcow2", "old")

    Raises:
        OptionError: there is none of this name.
    """
    with opened_alone(image, writable=True, **opening) as disk:
        _store(disk, name).remove_bitmap(name, counting(progress))


def clear_bitmap(
    image: Source,
    name: str,
    *,
    progress: ProgressCallback | None = None,
    **opening: Unpack[OpeningAlone],
) -> None:
    """Let a bitmap say that nothing is dirty.

    Example::

        underlay.jobs.add_bitmap("disk.qcow2", "daily")
        underlay.jobs.clear_bitmap("disk.qcow2", "daily")

    Raises:
        OptionError: there is none of this name.
        ConflictError: it was not saved properly.
    """
    with opened_alone(image, writable=True, **opening) as disk:
        _store(disk, name).clear_bitmap(name, counting(progress))


def enable_bitmap(image: Source, name: str, **opening: Unpack[OpeningAlone]) -> None:
    """Let a bitmap record guest writes from now on. Raises as ``clear_bitmap`` does.

    Example::

        underlay.jobs.add_bitmap("disk.qcow2", "later", enabled=False)
        underlay.jobs.enable_bitmap("disk.qcow2", "later")
    """
    with opened_alone(image, writable=True, **opening) as disk:
        _store(disk, name).enable_bitmap(name)


def disable_bitmap(image: Source, name: str, **opening: Unpack[OpeningAlone]) -> None:
    """Let a bitmap record guest writes no longer. Raises as ``clear_bitmap`` does.

    Example::

        underlay.jobs.add_bitmap("disk.qcow2", "done")
        underlay.jobs.disable_bitmap("disk.qcow2", "done")
    """
    with opened_alone(image, writable=True, **opening) as disk:
        _store(disk, name).disable_bitmap(name)


def merge_bitmap(
    image: Source,
    name: str,
    source: str,
    *,
    source_image: Source | None = None,
    source_format: str | None = None,
    progress: ProgressCallback | None = None,
    **opening: Unpack[OpeningAlone],
) -> None:
    """Let a bitmap also say what ``source`` says: a bitmap of this image or of ``source_image``.

    Their granularities may differ: whatever a dirty byte belongs to becomes dirty.

    Example::

        underlay.jobs.add_bitmap("disk.qcow2", "monday")
        underlay.jobs.add_bitmap("disk.qcow2", "week", granularity="1M")
        underlay.jobs.merge_bitmap("disk.qcow2", "week", "monday")

    Raises:
        OptionError: one of them is not there.
        ConflictError: one of them was not saved properly, or the disks differ in size.
    """
    with opened_alone(image, writable=True, **opening) as disk:
        store = _store(disk, name)
        if source_image is None:
            store.merge_bitmap(name, source, progress=counting(progress))
            return
        other: OpeningAlone = {**opening, "format": source_format}
        with opened_alone(source_image, **other) as from_disk:
            store.merge_bitmap(name, source, _store(from_disk, source), counting(progress))


def _store(disk: SyncFormatAccess, name: str) -> Any:
    """The disk's bitmaps; a disk that can have none has none of this name."""
    store = disk.capability(BitmapStore)
    if store is None:
        raise OptionError(f"Dirty bitmap '{name}' not found", option="name")
    return store
