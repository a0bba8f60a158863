"""What a fuzzer calls: each target is some uses of one image, and the fields to damage for them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import attrs

import underlay
from underlay.errors import UnderlayError

from .damage import damage
from .fields import Group
from .trial import MemoryPlace, Trial

__all__ = ["TARGETS", "Target"]

#: No image that a fuzzer makes is larger, in bytes.
_LONGEST = 1 << 20


@attrs.frozen
class Target:
    """One entrance."""

    name: str
    #: The images it starts from, by their names in ``seeds``.
    seeds: tuple[str, ...]
    #: Which fields to damage; none: bytes are changed anyhow.
    groups: tuple[Group, ...]
    #: The uses of an image.
    use: Callable[[Trial], object]

    def run(self, data: bytes) -> None:
        """Use an image.

        Raises:
            AssertionError: a rule is broken.
        """
        if len(data) > _LONGEST:
            return
        trial = Trial(data=data, place=MemoryPlace(), chance=random.Random(zlib.crc32(data)))
        self.use(trial)
        assert not trial.problems, "\n".join(trial.problems)

    def mutate(self, data: bytes, longest: int, seed: int) -> bytes:
        """A damaged image."""
        if len(data) < _HEADER:
            return data
        image, _ = damage(data, random.Random(seed), self.groups)
        return bytes(image[:longest])


#: A shorter one has no fields.
_HEADER = 112


def _look(trial: Trial) -> None:
    trial.look()


def _tables(trial: Trial) -> None:
    trial.look()
    trial.mend()
    trial.write()


def _alter(trial: Trial) -> None:
    trial.look()
    trial.alter()


def _probe(trial: Trial) -> None:
    """The bytes are anything. What is written to a raw disk stays one."""
    target = trial.place.put(trial.data)
    before = underlay.probe(target)
    underlay.inspect(target).as_json()
    if not before.guessed:
        return
    try:
        with underlay.open_any(target, writable=True) as disk:
            disk.write(trial.data[: disk.size // 2][::-1], disk.size // 4)
    except UnderlayError:
        pass
    after = underlay.probe(trial.place.put(trial.place.content()))
    if not after.guessed:
        trial.problems.append(f"a raw disk has become {after}")


_ALL = ("plain", "v2", "narrow", "wide", "zlib", "zstd", "subclusters", "snapshots", "bitmaps")

TARGETS = {
    target.name: target
    for target in (
        Target("header", _ALL, (Group.HEADER, Group.EXTENSIONS), _look),
        Target(
            "tables",
            ("plain", "v2", "narrow", "wide", "zlib", "subclusters", "snapshots"),
            (Group.L1, Group.L2, Group.REFCOUNTS),
            _tables,
        ),
        Target("compressed", ("zlib", "zstd"), (Group.COMPRESSED,), _tables),
        Target("snapshots", ("snapshots",), (Group.SNAPSHOTS,), _alter),
        Target("bitmaps", ("bitmaps",), (Group.BITMAPS,), _alter),
        Target("probing", _ALL, (), _probe),
    )
}
