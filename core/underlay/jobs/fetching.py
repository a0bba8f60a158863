"""The part of a copy that other processes can do: everything but the writing.

They fetch, decode, look for zeroes and encode, and give back what is to be written. One process
writes: its metadata is nowhere else, and nobody who was taken for dead can write behind its back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs

from underlay.jobs.copier import Copier, Task, holds_no_data, through_the_chain
from underlay.jobs.elsewhere import Elsewhere
from underlay.jobs.encoding import Encoding, EncodingCopier
from underlay.jobs.opened import in_use
from underlay.jobs.salvage import Unreadable

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["FetchingCopier"]


class FetchingCopier:
    """Has an executor of other processes do the tasks of ``copier``, and writes what they give."""

    def __init__(self, copier: Copier, executor: Executor) -> None:
        self._copier = copier
        self._elsewhere = Elsewhere(executor, _Fetch.like(copier))

    def stop(self) -> None:
        """Let the tasks end."""
        self._copier.stop()
        self._elsewhere.stop()

    def do(self, task: Task) -> tuple[int, int]:
        """See ``Copier.copy``. Memory: the bytes of one task."""
        copier = self._copier
        if all(map(holds_no_data, task.pieces)):
            return copier.copy(task)
        assert task.disk is not None
        with task.disk.in_use():
            pieces = [through_the_chain(task.disk, piece, copier.salvage) for piece in task.pieces]
        fetched = self._elsewhere.do(task._replace(disk=None, pieces=pieces))
        for lost in fetched.lost:
            if copier.salvage is not None:
                copier.salvage(lost)
        if copier.rate is not None:
            copier.rate.take(fetched.written, copier.stopped)
        with in_use(copier.target):
            for change in fetched.changes:
                if copier.stopped():
                    break
                change.make(copier)
        return task.length, fetched.written


class _Write(NamedTuple):
    offset: int
    data: bytes

    def make(self, copier: Copier) -> None:
        copier.target.write(self.data, self.offset)


class _Discard(NamedTuple):
    offset: int
    length: int

    def make(self, copier: Copier) -> None:
        copier.target.discard_to_zero(self.offset, self.length)


class _Store(NamedTuple):
    units: list[tuple[int, bytes]]

    def make(self, copier: Copier) -> None:
        assert isinstance(copier, EncodingCopier)
        copier.encoding.store(self.units)


class _Fetched(NamedTuple):
    """What a worker gives back."""

    #: In the order in which they are to be made.
    changes: list[_Write | _Discard | _Store]
    #: Guest bytes that become data.
    written: int
    lost: list[Unreadable]


class _Notes:
    """In a worker, the target: takes note of what is to be done to it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changes: list[_Write | _Discard | _Store] = []

    def write(self, data: memoryview | bytes, offset: int) -> None:
        # A block of zeroes that is written again and again is sent once.
        self.changes.append(_Write(offset, data if isinstance(data, bytes) else bytes(data)))

    def discard_to_zero(self, offset: int, length: int) -> None:
        self.changes.append(_Discard(offset, length))

    def store(self, units: list[tuple[int, bytes]]) -> None:
        self.changes.append(_Store(units))


@attrs.frozen(kw_only=True)
class _Fetch:
    """What a worker does with a task."""

    #: What a copier is made of, but for what stays with the one that writes.
    facts: Mapping[str, Any]
    #: The target's bytes.
    size: int
    #: Whether what cannot be read becomes zeroes.
    salvage: bool
    #: What encodes units of so many bytes, where the target stores those.
    unit: int = 0
    encode: Callable[[memoryview], bytes | None] | None = None

    @classmethod
    def like(cls, copier: Copier) -> _Fetch:
        """What does as ``copier`` would."""
        encoding = copier.encoding if isinstance(copier, EncodingCopier) else None
        return cls(
            facts={name: getattr(copier, name) for name in ("zeroes", "clean_from", "sparse_size")},
            size=copier.target.size,
            salvage=copier.salvage is not None,
            unit=0 if encoding is None else encoding.unit,
            encode=None if encoding is None else encoding.encode,
        )

    def __call__(self, task: Task) -> _Fetched:
        notes = _Notes(self.size)
        lost: list[Unreadable] = []
        salvage = lost.append if self.salvage else None
        copier = Copier(target=notes, salvage=salvage, **self.facts)
        if self.encode is not None:
            encoding = Encoding(unit=self.unit, encode=self.encode, store=notes.store)
            copier = EncodingCopier(target=notes, salvage=salvage, encoding=encoding, **self.facts)
        return _Fetched(notes.changes, copier.copy(task)[1], lost)
