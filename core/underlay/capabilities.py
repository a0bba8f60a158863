"""What a disk may be able to do beyond reading and writing.

Optional protocols that a driver may subclass by name. A program asks a disk for one
(``disk.capability(Describable)``) and gets an object or None; jobs ask for these and name no
format. Methods that a driver does not override raise ``UnsupportedOperationError``. What may take
long tells ``progress``; ``underlay.steps`` says how.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeGuard, TypeVar

from underlay.errors import UnsupportedOperationError
from underlay.facts import (
    Bitmap,
    CheckResult,
    DirtyRanges,
    Feature,
    Finding,
    ImageDescription,
    Inspection,
    Measurement,
    Repair,
    Snapshot,
)
from underlay.limits import Limits
from underlay.steps import StepsCallback

if TYPE_CHECKING:
    from underlay.driver import OptionSpec
    from underlay.handle import StorageHandle

__all__ = [
    "Amendable",
    "Bitmap",
    "BitmapStore",
    "CheckResult",
    "Checkable",
    "CompressedWriter",
    "Describable",
    "DirtyRanges",
    "Emptiable",
    "Feature",
    "Finding",
    "ImageDescription",
    "Inspectable",
    "Inspection",
    "Measurable",
    "Measurement",
    "Repair",
    "Repairable",
    "Snapshot",
    "Snapshottable",
    "offers",
]

C = TypeVar("C")


def offers(candidate: object, capability: type[C]) -> TypeGuard[C]:
    """Whether an object or a class subclasses a capability by name."""
    kind = candidate if isinstance(candidate, type) else type(candidate)
    return capability in kind.__mro__


class Describable(Protocol):
    """Can tell about itself."""

    __slots__ = ()

    @abstractmethod
    async def describe(self) -> ImageDescription:
        """Facts from the image itself; nothing that it names is opened."""
        ...


class Inspectable(Protocol):
    """A driver class that can look at an image which it would refuse to open."""

    __slots__ = ()

    @classmethod
    @abstractmethod
    async def inspect(cls, storage: StorageHandle, limits: Limits) -> Inspection:
        """Read the image in ``storage`` and nothing else; what is wrong is reported, not raised."""
        ...


class Checkable(Protocol):
    """Can verify its own metadata."""

    __slots__ = ()

    @abstractmethod
    async def check(
        self,
        progress: StepsCallback | None = None,
        *,
        report: Callable[[Finding], None] | None = None,
    ) -> CheckResult:
        """Read all metadata and report; changes nothing.

        ``report`` is told of each finding at once; where a small file may hold millions, a driver
        may do no more than count them from some number on.

        Raises:
            CorruptImageError: so much is wrong that nothing can be checked.
        """
        ...


class Repairable(Checkable, Protocol):
    """Can mend what a check finds."""

    __slots__ = ()

    @abstractmethod
    async def repair(
        self,
        *,
        leaks_only: bool,
        dry_run: bool = False,
        report: Callable[[Finding | Repair], None] | None = None,
        progress: StepsCallback | None = None,
    ) -> CheckResult:
        """Mend, or with ``dry_run`` say what would be done.

        ``corruptions`` and ``leaks`` are what is left, found by a second check; what cannot be
        mended stays as it is. With ``dry_run`` they are what there is now. Cancelled at any point,
        it leaves the image no worse than it was, and perhaps mended in part.

        Raises:
            ReadOnlyError: the image is not open for writing, and this is no dry run.
            CorruptImageError: so much is wrong that nothing can be mended.
        """
        ...


class Snapshottable(Protocol):
    """Has internal snapshots. Writing them is optional.

    ``progress`` counts guest bytes, as often as they are gone over. A change that is cancelled has
    happened or has not.
    """

    __slots__ = ()

    @abstractmethod
    async def snapshots(self) -> Sequence[Snapshot]:
        """All of them, in the image's order."""
        ...

    async def create_snapshot(self, name: str, progress: StepsCallback | None = None) -> Snapshot:
        """Take one of the disk as it is now."""
        raise UnsupportedOperationError("this format cannot create snapshots")

    async def apply_snapshot(self, id_or_name: str, progress: StepsCallback | None = None) -> None:
        """Make the disk what it was then."""
        raise UnsupportedOperationError("this format cannot apply snapshots")

    async def delete_snapshot(self, id_or_name: str, progress: StepsCallback | None = None) -> None:
        """Remove one."""
        raise UnsupportedOperationError("this format cannot delete snapshots")


class BitmapStore(Protocol):
    """Keeps dirty bitmaps. Writing them is optional.

    A change is there whole or not at all, and durable when the call returns. Names that are not
    there raise ``OptionError``, a bitmap that was not saved properly ``ConflictError``. What
    ``progress`` counts are the bytes of the disk.
    """

    __slots__ = ()

    @abstractmethod
    async def bitmaps(self) -> Sequence[Bitmap]:
        """All of them, in the image's order."""
        ...

    def can_have_bitmaps(self) -> bool:
        """Whether this image is one of those of its format that may have bitmaps."""
        return True

    async def dirty_ranges(self, name: str, offset: int = 0) -> DirtyRanges:
        """The dirty guest bytes from ``offset`` on: as many ranges as are had at once."""
        raise UnsupportedOperationError("this format cannot tell what its bitmaps hold")

    async def add_bitmap(
        self,
        name: str,
        *,
        granularity: int | None = None,
        enabled: bool = True,
        progress: StepsCallback | None = None,
    ) -> Bitmap:
        """Add one that has no dirty bytes, of ``granularity`` bytes (a power of two) a bit.

        Raises:
            ConflictError: there is one of this name.
            OptionError: the name or the granularity is impossible.
        """
        raise UnsupportedOperationError("this format cannot store bitmaps")

    async def copy_bitmaps(
        self,
        store: BitmapStore,
        bitmaps: Sequence[Bitmap],
        progress: StepsCallback | None = None,
    ) -> None:
        """Add these bitmaps of ``store`` with what they say, all of them as one change.

        ``progress`` counts their bits.

        Raises:
            ConflictError: there is one of such a name, or they are about a disk of another size.
            OptionError: a name or a granularity is impossible here.
            LimitExceededError: there would be too many.
        """
        raise UnsupportedOperationError("this format cannot store bitmaps")

    async def remove_bitmap(self, name: str, progress: StepsCallback | None = None) -> None:
        """Remove one, whatever state it is in."""
        raise UnsupportedOperationError("this format cannot remove bitmaps")

    async def clear_bitmap(self, name: str, progress: StepsCallback | None = None) -> None:
        """Let one say that nothing is dirty."""
        raise UnsupportedOperationError("this format cannot change bitmaps")

    async def enable_bitmap(self, name: str) -> None:
        """Let one record guest writes from now on."""
        raise UnsupportedOperationError("this format cannot change bitmaps")

    async def disable_bitmap(self, name: str) -> None:
        """Let one record guest writes no longer."""
        raise UnsupportedOperationError("this format cannot change bitmaps")

    async def merge_bitmap(
        self,
        name: str,
        source: str,
        store: BitmapStore | None = None,
        progress: StepsCallback | None = None,
    ) -> None:
        """Let one also say what the bitmap ``source`` says, of this image or of ``store``.

        Their granularities may differ: whatever a dirty byte belongs to becomes dirty.

        Raises:
            ConflictError: they are about disks of different sizes.
        """
        raise UnsupportedOperationError("this format cannot change bitmaps")


class Amendable(Protocol):
    """Can change what was chosen at its creation."""

    __slots__ = ()

    #: What can be changed; no option has a default, since what is not given stays as it is.
    amend_options: ClassVar[Mapping[str, OptionSpec]]

    @abstractmethod
    async def amend(
        self,
        options: Mapping[str, object],
        progress: StepsCallback | None = None,
    ) -> None:
        """Apply the options, each one of ``amend_options`` and of the type that it says.

        Names of other objects are only recorded: a disk goes on with those that it has open, and
        uses what is recorded now when it is opened anew. Cancelled, it has changed some of the
        options, each of them wholly or not at all.

        Raises:
            OptionError: an option is unknown, or its value impossible for this image; nothing was
                changed.
            ReadOnlyError: the image is not open for writing.
        """
        ...


class Emptiable(Protocol):
    """Can let go of all that it holds at once."""

    __slots__ = ()

    @abstractmethod
    async def make_empty(self) -> None:
        """Let the disk have nothing of its own: it shows what lies below it, or zeroes.

        Durable when the call returns. At any moment the image holds what it held, or nothing; its
        size and all that was chosen at its creation stay.

        Raises:
            UnsupportedOperationError: this image keeps something else that stands in the way.
            ConflictError: somebody holds a lease, or goes on writing, for too long; nothing was
                changed.
            ReadOnlyError: the image is not open for writing.
        """
        ...


class Measurable(Protocol):
    """A driver class that can say how large its images get."""

    __slots__ = ()

    @classmethod
    @abstractmethod
    def measure(
        cls,
        size: int,
        options: Mapping[str, object],
        data: Iterable[tuple[int, int]] | None = None,
        bitmaps: Sequence[Bitmap] | None = None,
    ) -> Measurement:
        """For a disk of ``size`` bytes, created with these of the driver's ``create_options``.

        ``data`` are the guest offsets and lengths of what the source holds that does not read as
        zeroes, in order; it is walked once, if at all. None: there is no source, and no data.
        ``bitmaps`` are those of a source that can have any.

        Raises:
            OptionError: an option's value is impossible, or the disk too large for it.
        """
        ...


class CompressedWriter(Protocol):
    """Can store whole units encoded."""

    __slots__ = ()

    @abstractmethod
    def encoded_unit(self) -> int:
        """How many guest bytes one unit has. Units start at multiples of that."""
        ...

    @abstractmethod
    def encoder(self, level: int | None = None) -> Callable[[memoryview], bytes | None]:
        """What encodes one unit, or gives None where that would not be smaller; thread-safe.

        ``level`` is of the image's own codec; None is a quick one of good size. Where the encoder
        pickles, other processes can encode too.

        Raises:
            OptionError: there is no such level.
            UnsupportedOperationError: this image can hold nothing encoded.
        """
        ...

    def encode(self, data: memoryview) -> bytes | None:
        """The encoded form of one unit, or None where it would not be smaller.

        Pure, thread-safe.
        """
        return self.encoder()(data)

    @abstractmethod
    async def write_encoded_units(self, units: Sequence[tuple[int, bytes]]) -> None:
        """Store encoded units: each with the guest offset that it starts at, in rising order.

        If it fails, each of them reads as before, or as its new whole.
        """
        ...

    async def write_encoded(self, offset: int, encoded: bytes) -> None:
        """Store one encoded unit as the guest bytes at ``offset``."""
        await self.write_encoded_units([(offset, encoded)])
