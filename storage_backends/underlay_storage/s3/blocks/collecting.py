"""Removing objects that no root names: never one that some root names, or will.

Who writes an object has taken over before, so its name tells whether its writer may still be about
to name it: only the writer that the root tells of can. An object of another one that the root does
not name is named by none again. That needs no clock. Clocks are for readers: who opened an older
root has the grace period to read what it names. How long an object has not been named is known from
the server alone: longer than the root is there, or than a mark that lists it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import attrs

from underlay.errors import InvalidImageError, UnsupportedFeatureError
from underlay.maintenance import Collected
from underlay.steps import Steps, StepsCallback
from underlay.time_limit import check_time
from underlay_storage.s3.blocks.checking import blocks_of
from underlay_storage.s3.blocks.layout import (
    MARK_NAMES,
    NOBODY,
    Name,
    Root,
    new_writer,
    pack_mark,
    unpack_mark,
)
from underlay_storage.s3.blocks.objects import Objects, Published
from underlay_storage.s3.sweeping import is_over

__all__ = ["collect"]

_MARK_MOST: Final = 24 + 24 * MARK_NAMES


def collect(
    objects: Objects,
    *,
    grace: float,
    take_over: bool = False,
    dry_run: bool = False,
    progress: StepsCallback | None = None,
) -> Collected:
    """See ``Maintainable.collect``."""
    return _Collection(objects, grace, dry_run=dry_run, steps=Steps(progress)).run(take_over)


@attrs.define
class _Listing:
    """What is there, by the server's clock."""

    #: When it was listed, and when the root was written.
    now: float = 0
    root_since: float = 0
    #: The bytes of each object that the root did not name, and when each mark was written.
    unnamed: dict[Name, int] = attrs.field(factory=dict[Name, int])
    marks: dict[Name, float] = attrs.field(factory=dict[Name, float])
    #: And each probe, by its key.
    probes: dict[str, float] = attrs.field(factory=dict[str, float])


class _Collection:
    def __init__(self, objects: Objects, grace: float, *, dry_run: bool, steps: Steps) -> None:
        self._objects = objects
        self._grace = grace
        self._dry_run = dry_run
        self._steps = steps
        self._id = new_writer()

    def run(self, take_over: bool) -> Collected:
        before = self._objects.read_root()
        listing = self._list(before.root)
        # Only a root that comes after the listing tells who may still name what was listed.
        if take_over and not self._dry_run and before.root.writer != NOBODY:
            after = self._shut_out(before).root
        else:
            after = self._objects.read_root().root
        unnamed = listing.unnamed
        if after.segments != before.root.segments:
            listing.root_since = listing.now
            for name in self._named(after):
                unnamed.pop(name, None)
        # Who took over meanwhile is nobody's to shut out.
        writer = NOBODY if take_over and self._dry_run else after.writer
        writers = [name for name in unnamed if name.writer == writer]
        for name in writers:
            del unnamed[name]
        removed = self._remove(listing)
        self._steps.end()
        return Collected(
            removed=len(removed),
            removed_bytes=sum(removed.values()),
            waiting=len(unnamed) - len(removed),
            writers=len(writers),
        )

    def _shut_out(self, found: Published) -> Published:
        root = attrs.evolve(found.root, generation=found.root.generation + 1, writer=NOBODY)
        return self._objects.replace_root(root, found.etag)

    def _named(self, root: Root) -> Iterator[Name]:
        self._steps.expect(len(root.segments))
        for ref in root.segments.values():
            yield ref.name
        for blocks in blocks_of(self._objects, root, steps=self._steps):
            for ref in blocks.values():
                yield ref.name

    def _list(self, root: Root) -> _Listing:
        named: dict[bytes, set[int]] = {}
        for name in self._named(root):
            named.setdefault(name.writer, set()).add(name.number)
        listing = _Listing()
        clock = Name(self._id, 0)
        self._objects.write_mark(clock, pack_mark(()))
        try:
            for found in self._objects.listing():
                check_time()
                modified = found.listed.modified
                if found.kind == "root":
                    listing.root_since = modified
                elif found.kind == "probe":
                    listing.probes[found.listed.key] = modified
                elif found.name is None:
                    continue
                elif found.name == clock:
                    listing.now = modified
                elif found.kind == "mark":
                    listing.marks[found.name] = modified
                elif found.name.number not in named.get(found.name.writer, ()):
                    listing.unnamed[found.name] = found.listed.size
        finally:
            self._objects.delete_marks([clock])
        return listing

    def _remove(self, listing: _Listing) -> dict[Name, int]:
        """Remove what no reader can need any more; mark what is new among the rest."""
        since = dict.fromkeys(listing.unnamed, listing.root_since)
        marked: dict[Name, list[Name]] = {}
        unmarked = set(listing.unnamed)
        for mark, written in listing.marks.items():
            marked[mark] = self._read_mark(mark)
            for name in marked[mark]:
                if name in since:
                    since[name] = min(since[name], written)
                    unmarked.discard(name)
        removed = {
            name: size
            for name, size in listing.unnamed.items()
            if self._is_over(since[name], listing)
        }
        if not self._dry_run:
            self._objects.delete_probes(
                key for key, tried in listing.probes.items() if self._is_over(tried, listing)
            )
            self._objects.delete(removed)
            rest = since.keys() - removed.keys()
            self._objects.delete_marks(
                mark for mark, names in marked.items() if rest.isdisjoint(names)
            )
            self._mark(name for name in rest if name in unmarked)
        return removed

    def _is_over(self, since: float, listing: _Listing) -> bool:
        return is_over(since, listing.now, self._grace)

    def _read_mark(self, mark: Name) -> list[Name]:
        what = f"A mark of '{self._objects}' ({mark})"
        try:
            return unpack_mark(self._objects.read_mark(mark, _MARK_MOST + 1), what=what)
        except (InvalidImageError, UnsupportedFeatureError):
            return []  # worth nothing: its names are marked anew

    def _mark(self, names: Iterable[Name]) -> None:
        ordered = sorted(names)
        for number, at in enumerate(range(0, len(ordered), MARK_NAMES), 1):
            self._objects.write_mark(
                Name(self._id, number), pack_mark(ordered[at : at + MARK_NAMES])
            )
