"""Which object holds which block: what the root's segments say, and what has changed since."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final, TypeAlias

from underlay_storage.s3.blocks.cache import Cache
from underlay_storage.s3.blocks.layout import SEGMENT_BLOCKS, Ref, Root
from underlay_storage.s3.blocks.objects import Objects

__all__ = ["Changes", "Index"]

#: Bytes that one entry takes in memory, about.
_ENTRY: Final = 256

#: Changes by segment and slot; None: the block reads as zeroes.
Changes: TypeAlias = dict[int, dict[int, Ref | None]]


class Index:
    """Finds blocks. Thread-safe; segments are fetched when they are needed."""

    def __init__(self, objects: Objects, root: Root, *, most: int) -> None:
        """``most`` bytes of segments are kept in memory."""
        self._objects = objects
        self._lock = threading.Lock()
        #: The root by which its segments are checked, and those of them that still count.
        self._root = root
        self._segments = dict(root.segments)
        self._changes: Changes = {}
        self._changed = 0
        self._cache: Cache[Ref, Mapping[int, Ref]] = Cache(most)

    # -- looking

    def find(self, block: int) -> Ref | None:
        """The object of a block; None where it is zeroes."""
        place, slot = divmod(block, SEGMENT_BLOCKS)
        while True:
            with self._lock:
                changes = self._changes.get(place)
                if changes is not None and slot in changes:
                    return changes[slot]
                ref, root = self._segments.get(place), self._root
            if ref is None:
                return None
            found = self._load(place, ref, root).get(slot)
            with self._lock:
                changes = self._changes.get(place)
                if self._segments.get(place) == ref and (changes is None or slot not in changes):
                    return found

    def known(self, block: int) -> tuple[bool, Ref | None]:
        """As ``find``, without fetching: whether it is known, and what it is."""
        place, slot = divmod(block, SEGMENT_BLOCKS)
        with self._lock:
            changes = self._changes.get(place)
            if changes is not None and slot in changes:
                return True, changes[slot]
            ref = self._segments.get(place)
        if ref is None:
            return True, None
        loaded = self._cache.peek(ref)
        return (False, None) if loaded is None else (True, loaded.get(slot))

    def is_empty(self, place: int) -> bool:
        """Whether a segment has no blocks at all."""
        with self._lock:
            return place not in self._segments and not any(
                ref is not None for ref in self._changes.get(place, {}).values()
            )

    @property
    def changed(self) -> int:
        """How many blocks have changed since the last publication."""
        return self._changed

    def _load(self, place: int, ref: Ref, root: Root) -> Mapping[int, Ref]:
        def fetch() -> tuple[Mapping[int, Ref], int]:
            blocks = self._objects.read_segment(place, ref, root)
            return blocks, _ENTRY * len(blocks)

        return self._cache.get(ref, fetch)

    # -- changing

    def change(self, block: int, ref: Ref | None) -> Ref | None:
        """A block lies in another object now; the change of it that this takes the place of."""
        place, slot = divmod(block, SEGMENT_BLOCKS)
        with self._lock:
            if ref is None and place not in self._segments and place not in self._changes:
                return None
            changes = self._changes.setdefault(place, {})
            self._changed += slot not in changes
            old = changes.get(slot)
            changes[slot] = ref
            return old

    def cut(self, blocks: int) -> list[Ref]:
        """Keep the first so many blocks only; the changes that this takes away."""
        place, slot = divmod(blocks, SEGMENT_BLOCKS)
        dropped: list[Ref] = []
        with self._lock:
            for other in [other for other in self._segments if other >= place + (slot > 0)]:
                del self._segments[other]
            for other in [other for other in self._changes if other >= place]:
                changes = self._changes[other]
                for at in [at for at in changes if other > place or at >= slot]:
                    old = changes.pop(at)
                    self._changed -= 1
                    if old is not None:
                        dropped.append(old)
                if not changes:
                    del self._changes[other]
            if slot and place in self._segments:
                changes = self._changes.setdefault(place, {})
                for at in range(slot, SEGMENT_BLOCKS):
                    self._changed += 1
                    changes[at] = None
        return dropped

    # -- publishing

    def changes(self) -> tuple[dict[int, Ref], Changes]:
        """The segments that count, and what has changed in each, as of now."""
        with self._lock:
            return dict(self._segments), {
                place: dict(changes) for place, changes in self._changes.items()
            }

    def merged(
        self, place: int, base: Ref | None, changes: Mapping[int, Ref | None]
    ) -> tuple[dict[int, Ref], list[Ref]]:
        """The blocks of a segment with its changes, and those that these take the place of."""
        blocks = {} if base is None else dict(self._load(place, base, self._root))
        replaced: list[Ref] = []
        for slot, ref in changes.items():
            old = blocks.pop(slot, None)
            if old is not None and old != ref:
                replaced.append(old)
            if ref is not None:
                blocks[slot] = ref
        return blocks, replaced

    def keep(self, ref: Ref, blocks: Mapping[int, Ref]) -> None:
        """Have a segment that was just written at hand."""
        self._cache.put(ref, blocks, _ENTRY * len(blocks))

    def published(self, root: Root, changes: Changes) -> None:
        """``root`` counts now, with these changes in it."""
        with self._lock:
            self._root = root
            self._segments = dict(root.segments)
            for place, published in changes.items():
                rest = self._changes.get(place, {})
                for slot, ref in published.items():
                    if slot in rest and rest[slot] == ref:
                        del rest[slot]
                        self._changed -= 1
                if not rest:
                    self._changes.pop(place, None)

    def clear(self) -> None:
        """Forget the segments that were fetched."""
        self._cache.clear()
