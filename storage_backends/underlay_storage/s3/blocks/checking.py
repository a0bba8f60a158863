"""Looking at the objects of a disk: how many there are, and whether all that it needs are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final

from underlay.errors import (
    InvalidImageError,
    StorageError,
    StorageNotFoundError,
    UnsupportedFeatureError,
)
from underlay.maintenance import ObjectDamage, ObjectsCheck
from underlay.steps import Steps, StepsCallback
from underlay.time_limit import check_time
from underlay_storage.s3.blocks.layout import Name, Ref, Root
from underlay_storage.s3.blocks.objects import DamagedError, Objects

__all__ = ["blocks_of", "check", "survey"]

#: So many damages are told of one by one.
_TOLD_MOST: Final = 1000


def blocks_of(
    objects: Objects,
    root: Root,
    *,
    steps: Steps | None = None,
    broken: Callable[[Ref, Exception], None] | None = None,
) -> Iterator[dict[int, Ref]]:
    """The blocks of each segment of a root; ``broken`` hears of segments that cannot be read."""
    for place, ref in root.segments.items():
        try:
            yield objects.read_segment(place, ref, root)
        except (InvalidImageError, UnsupportedFeatureError, StorageError) as error:
            # A server that does not answer says nothing about the object.
            if broken is None or not _is_damage(error):
                raise
            broken(ref, error)
        if steps is not None:
            steps.did()


def survey(objects: Objects, root: Root) -> Mapping[str, object]:
    """How many blocks a disk has, and their bytes."""
    count = stored = 0
    for blocks in blocks_of(objects, root):
        count += len(blocks)
        stored += sum(ref.length for ref in blocks.values())
    return {
        "blocks": count,
        "index-segments": len(root.segments),
        "stored-bytes": stored + sum(ref.length for ref in root.segments.values()),
    }


def check(
    objects: Objects, root: Root, *, read_all: bool, progress: StepsCallback | None
) -> ObjectsCheck:
    """See ``Maintainable.check_objects``, for what a root names."""
    return _Check(objects, Steps(progress, len(root.segments))).run(root, read_all=read_all)


class _Check:
    def __init__(self, objects: Objects, steps: Steps) -> None:
        self._objects = objects
        self._steps = steps
        self._needed: dict[Name, Ref] = {}
        self._damages: list[ObjectDamage] = []
        self._damaged = 0

    def run(self, root: Root, *, read_all: bool) -> ObjectsCheck:
        for ref in root.segments.values():
            self._need(ref)
        broken = partial(self._broken, "cannot be read as a part of the index")
        for blocks in blocks_of(self._objects, root, steps=self._steps, broken=broken):
            for ref in blocks.values():
                self._need(ref)
        objects, stored = len(self._needed), sum(ref.length for ref in self._needed.values())
        if read_all:
            self._read_all(set(root.segments.values()))
        unneeded, unneeded_bytes = self._compare()
        for ref in self._needed.values():  # those that were not listed
            self._damage(ref.name, "is missing")
        self._steps.end()
        return ObjectsCheck(
            objects=objects,
            stored=stored,
            damages=tuple(self._damages),
            damaged=self._damaged,
            unneeded=unneeded,
            unneeded_bytes=unneeded_bytes,
        )

    def _need(self, ref: Ref) -> None:
        if self._needed.setdefault(ref.name, ref) != ref:
            self._damage(ref.name, "is named twice, in two ways")

    def _read_all(self, read_already: set[Ref]) -> None:
        """Look at every byte; what is missing is found by the listing."""
        self._steps.expect(len(self._needed) - len(read_already))
        for ref in self._needed.values():
            if ref in read_already:
                continue
            try:
                self._objects.read(ref)
            except StorageNotFoundError:
                pass
            except StorageError as error:
                if not _is_damage(error):
                    raise
                self._damage(ref.name, "has other bytes than were written")
            self._steps.did()

    def _compare(self) -> tuple[int, int]:
        """Hold the listing against what is needed; what is listed and not needed, and its bytes."""
        unneeded = unneeded_bytes = 0
        for found in self._objects.listing():
            if found.kind != "object" or found.name is None:
                continue
            check_time()
            ref = self._needed.pop(found.name, None)
            if ref is None:
                unneeded += 1
                unneeded_bytes += found.listed.size
            elif ref.length != found.listed.size:
                self._damage(
                    ref.name, f"has {found.listed.size} bytes, and was written with {ref.length}"
                )
        return unneeded, unneeded_bytes

    def _broken(self, what: str, ref: Ref, error: Exception) -> None:
        if not isinstance(error, StorageNotFoundError):
            self._damage(ref.name, what)

    def _damage(self, name: Name, what: str) -> None:
        self._damaged += 1
        if len(self._damages) < _TOLD_MOST:
            self._damages.append(ObjectDamage(name=str(name), what=what))


def _is_damage(error: Exception) -> bool:
    """Whether an error is about the object, and not about reaching it."""
    return isinstance(error, InvalidImageError | StorageNotFoundError | DamagedError)
