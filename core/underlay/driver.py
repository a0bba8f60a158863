"""The format contract: a virtual disk on one or more storages.

A driver answers *where* guest bytes are; the core does the I/O. Subclass ``FormatDriverInstance``
by name. A read-only format needs ``probe``, ``open``, ``size``, ``get_mapping`` and
``collect_storage_dependencies``; everything else has a default that says "unsupported", which the
core understands and works around where that is possible.

Coroutines of a driver wait for nothing but ``StorageHandle`` methods, other drivers, and
``underlay.locks``. Whether that blocks or suspends is decided by the face that drives them.
"""

from __future__ import annotations

import enum
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, TypeAlias

import attrs

from underlay.errors import ReadOnlyError, UnsupportedOperationError
from underlay.limits import DEFAULT_LIMITS, Limits
from underlay.mapping import Data, Eof, ShallowMapping
from underlay.probing import NoMatch, ProbeVerdict, ProbeView
from underlay.steps import StepsCallback
from underlay.storage import PreallocateMode

if TYPE_CHECKING:
    from underlay.gate import Reference
    from underlay.handle import StorageHandle
    from underlay.lease import Leases

__all__ = [
    "Decoder",
    "DetectZeroes",
    "FormatCreateOptions",
    "FormatDriverInstance",
    "FormatOpenOptions",
    "Location",
    "OptionSpec",
    "WriteTicket",
]

#: What ``locate`` answers: the storage, the host offset of the byte asked for, how many bytes lie
#: there contiguously, and whether writing them there writes the disk.
Location: TypeAlias = "tuple[StorageHandle, int, int, bool]"


class DetectZeroes(enum.Enum):
    """What becomes of a write that holds nothing but zeroes."""

    #: It is written like any other.
    OFF = "off"
    #: The range is marked as zero; what it occupies stays its own.
    ON = "on"
    #: The range is marked as zero, and its space is given back.
    UNMAP = "unmap"


@attrs.frozen
class OptionSpec:
    """One option of a driver, as ``-o help`` shows it."""

    help: str
    #: ``"size"`` (bytes; suffixes allowed), ``"int"``, ``"bool"`` or ``"str"``.
    type: str = "str"
    #: The default, for people; empty where there is none.
    default: str = ""


@attrs.frozen(kw_only=True)
class FormatOpenOptions:
    """What a driver is asked to open.

    It opens nothing further: ``references()`` says what it needs.
    """

    storage: StorageHandle
    writable: bool = False
    limits: Limits = DEFAULT_LIMITS
    #: Open this internal snapshot (its ID or name), read-only, as a disk of its own.
    snapshot: str | None = None
    #: Open it to check and to repair it: what makes an image unfit for writing is no obstacle then,
    #: and nothing is mended by the opening itself. The guest's bytes are not asked for.
    to_check: bool = False
    #: The caller's options, each one of ``open_options``.
    options: Mapping[str, object] = attrs.field(factory=dict[str, object])


@attrs.frozen(kw_only=True)
class FormatCreateOptions:
    """What a driver is asked to write into an empty storage."""

    #: None only for ``check_create``.
    storage: StorageHandle | None
    #: Virtual bytes.
    size: int
    preallocation: PreallocateMode = PreallocateMode.OFF
    limits: Limits = DEFAULT_LIMITS
    #: The storage for an external data file, already created, where the options ask for one.
    data_file: StorageHandle | None = None
    #: The caller's options, each one of ``create_options``.
    options: Mapping[str, object] = attrs.field(factory=dict[str, object])
    #: Counts bytes that are preallocated.
    progress: StepsCallback | None = None


@attrs.define(kw_only=True, eq=False)
class WriteTicket:
    """The promise between the two phases of a write that allocates.

    The core writes ``length`` guest bytes at host ``offset`` of ``storage``, and before and after
    them ``before`` and ``after`` bytes of what the disk holds there now (the rest of the allocated
    clusters). Nothing of it is visible until ``commit_write``.
    """

    #: Who gave it out; ``guest_offset`` is a guest offset of this driver.
    driver: FormatDriverInstance
    storage: StorageHandle
    #: Guest bytes.
    guest_offset: int
    #: Host bytes.
    offset: int
    #: How much of the write this ticket covers, from its start; at least one byte.
    length: int
    before: int = 0
    after: int = 0
    #: The driver's own note of what to publish or give back.
    token: object = None


class Decoder(Protocol):
    """Decodes units of one image, in whatever process: it pickles."""

    __slots__ = ()

    @abstractmethod
    def decode(self, host_length: int, raw: memoryview, out: memoryview) -> None:
        """See ``FormatDriverInstance.decode``."""


class FormatDriverInstance(Protocol):
    """One open image of one format."""

    __slots__ = ()

    #: The version of this contract that the class was written for.
    api_version: ClassVar[int] = 1
    #: The name under which the format is asked for.
    format_name: ClassVar[str] = ""
    #: Options of ``open`` beside those of the core.
    open_options: ClassVar[Mapping[str, OptionSpec]] = {}
    #: Options of ``create`` beside those of the core.
    create_options: ClassVar[Mapping[str, OptionSpec]] = {}

    # -- coming to be

    @classmethod
    def probe(cls, view: ProbeView) -> ProbeVerdict:
        """Say whether the view is of this format.

        Checks a signature and a version; opens nothing.
        """
        return NoMatch()

    @classmethod
    @abstractmethod
    async def open(cls, options: FormatOpenOptions) -> Self:
        """Open the image in ``options.storage``. A refused open leaves every byte as it was.

        Raises:
            InvalidImageError: it is none, or it is damaged beyond use.
            UnsupportedFeatureError: it needs something that this driver cannot do.
            LimitExceededError: it asks for more than ``options.limits``.
        """

    @classmethod
    async def create(cls, options: FormatCreateOptions) -> None:
        """Write an empty image into ``options.storage``, which is empty."""
        raise UnsupportedOperationError(f"{cls.format_name} images cannot be created")

    @classmethod
    def check_create(cls, options: FormatCreateOptions) -> None:
        """Refuse options that cannot be, before anything is created; opens and writes nothing.

        Raises:
            OptionError: an option's value, or their combination, is impossible.
        """
        return

    @classmethod
    def creation_facts(cls, options: FormatCreateOptions) -> Mapping[str, object]:
        """What is said of a new image when it is made, under qemu-img's names and in its order.

        What has no value is None, and holds the place of what the caller knows. Nothing is refused.
        """
        return {"size": options.size, "preallocation": None} | dict(options.options)

    def references(self) -> Sequence[Reference]:
        """Every object that this image names and that is not attached; the core resolves them."""
        return ()

    def attach(
        self, reference: Reference, opened: StorageHandle | FormatDriverInstance | None
    ) -> None:
        """Take what ``reference`` led to: a driver for a backing image, a handle for the rest.

        None says that the caller wants none. The core closes what it opened; the driver does not.
        """
        raise UnsupportedOperationError(f"{self.format_name} images name no other objects")

    # -- facts

    @abstractmethod
    def size(self) -> int:
        """The virtual size in bytes."""

    def writable(self) -> bool:
        """Whether the disk can be written; never changes."""
        return False

    def zero_granularity(self) -> int | None:
        """The block size in which ranges can be zeroed without writing data, or None."""
        return None

    def detect_zeroes(self) -> DetectZeroes:
        """What becomes of writes of zeroes; never changes."""
        return DetectZeroes.OFF

    @abstractmethod
    def collect_storage_dependencies(self) -> Sequence[StorageHandle]:
        """The storages of this image itself, metadata first; not those of its backing image."""

    def backing(self) -> FormatDriverInstance | None:
        """The image that shows through where this one has nothing, or None."""
        return None

    def leases(self) -> Leases | None:
        """Who still uses old mappings; None where mappings never move, as on a read-only disk."""
        return None

    async def sparse_data(self) -> bool:
        """Whether ``Data`` may lie in holes of its storage, so that looking for them pays."""
        return False

    # -- mapping

    def locate(self, offset: int) -> Location | None:
        """Where the guest byte at ``offset`` lies, if that is plain data and known without waiting.

        This is the hot path of every read: it must be thread-safe without a lock, make no object
        but the tuple, and answer None for whatever needs thought (an offset outside the disk
        included).
        """
        return None

    @abstractmethod
    async def get_mapping(self, offset: int, max_length: int) -> ShallowMapping:
        """What the guest bytes from ``offset`` on are mapped to.

        The answer may reach further than ``max_length`` but does no I/O merely to get longer, and
        never reaches past the end of the disk; ``Eof`` at or past it.
        """

    async def iter_mappings(self, offset: int, length: int) -> AsyncIterator[ShallowMapping]:
        """The mappings of the range, in order, for bulk work; stops at the end of the disk."""
        end = min(offset + length, self.size())
        while offset < end:
            mapping = await self.get_mapping(offset, end - offset)
            if isinstance(mapping, Eof):
                return
            if mapping.length > end - offset:
                mapping = attrs.evolve(mapping, length=end - offset)
            yield mapping
            offset += mapping.length

    def decode(self, host_length: int, raw: memoryview, out: memoryview) -> None:
        """Decode one ``Special`` unit from ``raw`` into ``out`` (``unit`` bytes).

        Pure, thread-safe.
        ``raw`` holds ``host_length`` bytes or more. Never writes or allocates more than
        ``len(out)``.

        Raises:
            CorruptImageError: the bytes do not decode to exactly ``len(out)`` bytes.
        """
        raise UnsupportedOperationError(f"{self.format_name} has nothing to decode")

    def decoder(self) -> Decoder | None:
        """What decodes as ``decode`` does, for other processes; None where only this one can."""
        return None

    # -- writing

    async def begin_write(self, offset: int, length: int) -> WriteTicket:
        """Make room for guest bytes from ``offset`` on; the ticket may cover fewer than ``length``.

        Waits while another ticket covers any of the same clusters. Every ticket ends in exactly one
        of ``commit_write`` and ``abort_write``, which cancelling a task does not interrupt. What is
        mapped to writable data already needs no room: the default serves a format where all is.
        """
        mapping = await self.get_mapping(offset, length)
        if not isinstance(mapping, Data) or not mapping.writable:
            raise ReadOnlyError(f"This {self.format_name} image cannot be written at {offset}")
        return WriteTicket(
            driver=self,
            storage=mapping.storage,
            guest_offset=offset,
            offset=mapping.offset,
            length=min(mapping.length, length),
        )

    def try_begin_write(self, offset: int, length: int) -> WriteTicket | None:
        """``begin_write`` if that needs neither waiting nor I/O, else None: nothing was done then.

        For the hot path. What it raises, ``begin_write`` would raise too.
        """
        return None

    def try_commit_write(self, ticket: WriteTicket) -> bool:
        """``commit_write`` if that needs neither waiting nor I/O, else False: do it by that."""
        return False

    async def commit_write(self, ticket: WriteTicket) -> None:
        """The data is written: show it. It becomes durable with the next ``flush`` and ``sync``."""
        return

    async def abort_write(self, ticket: WriteTicket) -> None:
        """The data was not written: give the room back. The disk reads as before."""
        return

    async def ensure_data_mapping(
        self, offset: int, length: int, overwrite: bool
    ) -> tuple[StorageHandle, int, int]:
        """Map guest bytes from ``offset`` on to plain, writable data: storage, host offset, length.

        What is newly allocated holds zeroes or the copied content before it is shown; with
        ``overwrite`` the caller does not need the old content of the range. The length may be
        shorter than asked for, but is at least 1.
        """
        raise UnsupportedOperationError(f"{self.format_name} cannot map data for writing")

    async def ensure_zero_mapping(self, offset: int, length: int) -> tuple[int, int]:
        """Make as much of the range as possible read as zeroes without writing data.

        Returns the offset and the length that now do, as close to ``offset`` as possible. With a
        length of 0 nothing before that offset can, and what follows it may. Frees nothing.
        """
        raise UnsupportedOperationError(f"{self.format_name} cannot map zeroes")

    async def discard_to_zero(self, offset: int, length: int) -> tuple[int, int]:
        """As ``ensure_zero_mapping``, and give the space back."""
        raise UnsupportedOperationError(f"{self.format_name} cannot discard")

    async def discard_to_any(self, offset: int, length: int) -> tuple[int, int]:
        """Give the space of the range back; each byte of it then has its old value or is zero."""
        raise UnsupportedOperationError(f"{self.format_name} cannot discard")

    async def discard_to_backing(self, offset: int, length: int) -> tuple[int, int]:
        """Give the space of the range back and let the backing image show through."""
        raise UnsupportedOperationError(f"{self.format_name} cannot discard")

    async def resize_grow(
        self, size: int, preallocation: PreallocateMode, progress: StepsCallback | None = None
    ) -> None:
        """Grow the disk; new bytes read as zeroes, over a longer backing image too.

        ``progress`` counts bytes; until it is told of all of them the disk keeps its size.
        """
        raise UnsupportedOperationError(f"{self.format_name} images cannot be resized")

    async def resize_shrink(self, size: int, progress: StepsCallback | None = None) -> None:
        """Cut the disk; what is cut never comes back.

        ``progress`` counts bytes. Cancelled, the disk has its old size or the new one; then space
        of what was cut may stay taken.
        """
        raise UnsupportedOperationError(f"{self.format_name} images cannot be resized")

    # -- buffers

    async def flush(self) -> None:
        """Write the driver's own buffers to its storages."""
        return

    async def sync(self) -> None:
        """Sync this image's storages. Its backing image is the core's to sync."""
        for storage in self.collect_storage_dependencies():
            if storage.writable():
                await storage.sync()

    async def invalidate_cache(self) -> None:
        """Drop buffers without writing them, and read the image anew."""
        return

    async def close(self) -> None:
        """Release what is the driver's own (not its storages). Called once, after ``flush``."""
        return
