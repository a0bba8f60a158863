"""Dirty bitmaps that go with a disk into its copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from underlay.capabilities import Bitmap, BitmapStore, offers
from underlay.errors import ConflictError, UnsupportedOperationError
from underlay.plugins import registry
from underlay.steps import Steps
from underlay.sync import SyncFormatAccess

__all__ = ["bitmap_steps", "check_format", "copy_bitmaps", "sound_bitmaps"]

#: What a bit of a bitmap is worth, in bytes of the disk: it can stand for no fewer.
_BIT = 512


def check_format(name: str) -> None:
    """Refuse a format whose images have no bitmaps.

    Raises:
        UnsupportedOperationError: it is one of these.
    """
    if not offers(registry().driver(name), BitmapStore):
        raise UnsupportedOperationError(f"Format driver '{name}' does not support bitmaps")


def sound_bitmaps(source: SyncFormatAccess, *, skip_broken: bool) -> list[Bitmap]:
    """The bitmaps of a disk that can be copied.

    Raises:
        UnsupportedOperationError: its format has none.
        ConflictError: one was not saved properly, and is not to be skipped.
    """
    store: Any = source.capability(BitmapStore)
    if store is None:
        raise UnsupportedOperationError("Source lacks bitmap support")
    found: Sequence[Bitmap] = store.bitmaps()
    broken = [bitmap for bitmap in found if bitmap.in_use]
    if broken and not skip_broken:
        raise ConflictError(
            f"Cannot copy inconsistent bitmap '{broken[0].name}'; remove it, or say "
            "skip_broken_bitmaps"
        )
    return [bitmap for bitmap in found if not bitmap.in_use]


def bitmap_steps(source: SyncFormatAccess, found: Sequence[Bitmap]) -> int:
    """How many bytes of the disk copying these bitmaps is worth: a sector for each bit."""
    return sum(-(-source.size // bitmap.granularity) * _BIT for bitmap in found)


def copy_bitmaps(
    source: SyncFormatAccess, found: Sequence[Bitmap], target: SyncFormatAccess, steps: Steps
) -> None:
    """Give a copy the bitmaps of its source; ``steps`` go on by ``bitmap_steps``.

    Raises:
        UnsupportedOperationError: the target can have none.
        ConflictError: it has one of the same name; it got none.
    """
    store: Any = target.capability(BitmapStore)
    if store is None or not store.can_have_bitmaps():
        raise UnsupportedOperationError(
            f"Format driver '{target.format_name}' does not support bitmaps"
        )
    store.copy_bitmaps(source.inner, found, steps.part(bitmap_steps(source, found)))
