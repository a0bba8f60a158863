"""What a storage of objects can do for its disks: tell, check, tidy up, and show how it publishes.

``underlay storage`` and ``underlay.jobs`` ask a storage for these, and name no scheme.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Protocol

import attrs

from underlay.steps import StepsCallback
from underlay.storage import StorageOpenOptions

__all__ = ["Collected", "Maintainable", "ObjectDamage", "ObjectsCheck", "Publishing", "Sweepable"]


@attrs.frozen(kw_only=True)
class ObjectDamage:
    """An object that the disk needs and has not, or not as it was written."""

    #: As the storage calls it.
    name: str
    #: One sentence.
    what: str


@attrs.frozen(kw_only=True)
class ObjectsCheck:
    """What was found out about the objects of one disk."""

    #: How many the disk needs, and their bytes.
    objects: int
    stored: int
    #: The first thousand, and how many there are.
    damages: tuple[ObjectDamage, ...]
    damaged: int
    #: Objects that the disk does not need, and their bytes.
    unneeded: int
    unneeded_bytes: int


@attrs.frozen(kw_only=True)
class Collected:
    """What became of the objects that a disk does not need."""

    #: How many were removed, and their bytes; or would have been.
    removed: int
    removed_bytes: int
    #: Those that a reader may still need.
    waiting: int
    #: Those of whoever writes the disk, who may be about to need them.
    writers: int


class Maintainable(Protocol):
    """A storage that can do so; open read-only for all of it. Plain functions, which may block.

    ``progress`` counts objects; ``underlay.steps`` says how.
    """

    __slots__ = ()

    @abstractmethod
    def survey(self) -> Mapping[str, object]:
        """Facts for people that take requests to find out, beyond ``describe``.

        Raises:
            StorageError: they cannot be found out.
        """

    @abstractmethod
    def check_objects(
        self, *, read_all: bool = False, progress: StepsCallback | None = None
    ) -> ObjectsCheck:
        """See whether all that the disk needs is there; ``read_all`` looks at every byte of it.

        Raises:
            InvalidImageError: so much is wrong that nothing can be checked.
            StorageError: the server did not answer.
        """

    @abstractmethod
    def collect(
        self,
        *,
        grace: float | None = None,
        take_over: bool = False,
        dry_run: bool = False,
        progress: StepsCallback | None = None,
    ) -> Collected:
        """Remove what the disk does not need, and has not for ``grace`` seconds.

        None is the storage's own grace period, in which readers that opened the disk before may
        still need it. What belongs to whoever writes the disk stays; with ``take_over`` he is shut
        out instead (one who crashed does not mind). ``dry_run`` removes nothing and shuts out
        nobody.

        Raises:
            StorageChangedError: the disk was written by others meanwhile; try again.
            StorageError: the server did not answer.
        """


class Sweepable(Protocol):
    """A storage whose writers leave something behind when they are killed, that no handle shows.

    So it is asked by name: there may be nothing (yet) that could be opened. A plain function.
    """

    __slots__ = ()

    @classmethod
    @abstractmethod
    def sweep(
        cls,
        options: StorageOpenOptions,
        *,
        grace: float | None = None,
        dry_run: bool = False,
        progress: StepsCallback | None = None,
    ) -> Collected:
        """Remove what writers of ``options.name`` left, and did nothing with for ``grace`` seconds.

        None is the storage's own grace period. ``dry_run`` removes nothing.

        Raises:
            StorageError: the server did not answer.
        """


class Publishing(Protocol):
    """A storage that keeps what is written, and sends all of it when it is synced.

    That may take as long as all that came before, so it can be watched. A plain function, which
    may block.
    """

    __slots__ = ()

    @abstractmethod
    def publish(self, progress: StepsCallback | None = None) -> None:
        """Sync. ``progress`` counts bytes; what it raises leaves everything as it was.

        Raises:
            What ``sync`` raises.
        """
