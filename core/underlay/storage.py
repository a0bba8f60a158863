"""The storage contract: bytes in an object, with no notion of a format.

There are two rungs with the same names. ``BlockingStorage`` is plain functions and the right one
for most back ends (files, memory, any blocking client). ``Storage`` has coroutines for whatever
waits, for clients that live in an event loop. Subclass one of them by name; a useful read-only
storage needs ``size`` and ``readv`` alone.

What every implementation may rely on, since the core sees to it (``underlay.handle``):

- Buffers are flat: ``len()`` of each is its size in bytes. None is empty, and there are at most
  1,024.
- Offsets and lengths are multiples of ``req_align()`` (``zero_align()``, ``discard_align()`` for
  those calls), buffer addresses and lengths of ``mem_align()``.
- A call is never made after ``close()``, and ``close()`` only when no call is in flight.
- Calls come from any thread, several at once.
"""

from __future__ import annotations

import enum
import os
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar, Protocol, Self, TypeAlias

import attrs

from underlay.errors import OptionError, ReadOnlyError, UnsupportedOperationError

__all__ = [
    "AnyStorage",
    "BlockingStorage",
    "Extent",
    "PreallocateMode",
    "ReadBuffers",
    "Reopening",
    "Storage",
    "StorageCreateOptions",
    "StorageFacts",
    "StorageOpenOptions",
    "WriteBuffers",
    "is_blocking_storage",
    "is_storage",
]

#: Flat writable buffers to be filled one after the other.
ReadBuffers: TypeAlias = Sequence[memoryview | bytearray]
#: Flat buffers to be written one after the other.
WriteBuffers: TypeAlias = Sequence[memoryview | bytearray | bytes]

_ZERO_CHUNK = 1 << 20


class PreallocateMode(enum.Enum):
    """How space for new bytes is made ready; they read as zeroes in every mode."""

    #: Nothing is reserved.
    OFF = "off"
    #: A format lays out its tables; the host reserves nothing. For a storage the same as ``OFF``.
    METADATA = "metadata"
    #: The host reserves the space without writing it.
    FALLOC = "falloc"
    #: Zeroes are written.
    FULL = "full"

    @property
    def reserves(self) -> bool:
        """Whether the host gives the space at once."""
        return self in {PreallocateMode.FALLOC, PreallocateMode.FULL}

    @classmethod
    def parse(cls, value: object) -> PreallocateMode:
        """A mode from itself or from its name.

        Raises:
            OptionError: there is no such mode.
        """
        try:
            return cls(value)
        except ValueError:
            known = ", ".join(mode.value for mode in cls)
            raise OptionError(
                f"Unknown preallocation '{value}'; known: {known}", option="preallocation"
            ) from None


@attrs.frozen(kw_only=True)
class StorageOpenOptions:
    """What a storage is asked to open."""

    #: A path, or a URL with the scheme under which the class is registered.
    name: str
    writable: bool = False
    #: Take the locks that keep two users of one image apart, where the storage has such.
    lock: bool = True
    #: ``storage_options`` of the caller; an unknown one is an ``OptionError``.
    options: Mapping[str, object] = attrs.field(factory=dict[str, object])


@attrs.frozen(kw_only=True)
class StorageCreateOptions:
    """What a storage is asked to create; the result is writable."""

    name: str
    #: Bytes; they read as zeroes.
    size: int = 0
    preallocation: PreallocateMode = PreallocateMode.OFF
    #: Without it an object that exists is a ``StorageExistsError``; with it nothing of its old
    #: content survives.
    overwrite: bool = False
    lock: bool = True
    options: Mapping[str, object] = attrs.field(factory=dict[str, object])


@attrs.frozen(kw_only=True)
class Reopening:
    """How another process, on another machine too, opens the very object that is open here.

    It pickles, and two are equal where the objects are and hold the same bytes: the other process
    compares its own with this one.
    """

    #: A full name: a path, or a URL.
    name: str
    #: The ``storage_options``; they may hold secrets.
    options: Mapping[str, object] = attrs.field(factory=dict[str, object], repr=False)
    #: What changes when the bytes do: a time of change, an entity tag.
    state: Hashable = None


@attrs.frozen
class Extent:
    """A run of a storage that is data, or a hole that reads as zeroes without being stored."""

    #: Bytes from the offset that was asked for.
    length: int
    is_data: bool


class StorageFacts(Protocol):
    """What both rungs answer at once, without waiting."""

    __slots__ = ()

    #: The version of this contract that the class was written for.
    api_version: ClassVar[int] = 1
    #: The URL schemes that it serves (``file``, ``memory``, …), if it is to be found by URL.
    schemes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def has_option(cls, name: str, option: str) -> bool:
        """Whether ``storage_options`` for what is called ``name`` may have one called ``option``.

        Asked where somebody names several images and gives options once, so that each gets its own.
        The default says yes to all.
        """
        return True

    @abstractmethod
    def size(self) -> int:
        """The object's length in bytes, now: not a value that grows stale.

        Raises:
            StorageError: it cannot be found out.
        """

    def name(self) -> str:
        """What to call the object in a message; opening that name again should reach it again."""
        return f"<{type(self).__name__}>"

    def identity(self) -> Hashable | None:
        """Equal for two handles on one object and for no others; None if that cannot be said."""
        return None

    def reopening(self) -> Reopening | None:
        """How other processes can read the object; None where they cannot reach it.

        Raises:
            StorageError: it cannot be found out.
        """
        return None

    def writable(self) -> bool:
        """Whether it was opened for writing; never changes."""
        return False

    def mem_align(self) -> int:
        """The alignment of buffer addresses and lengths, a power of two."""
        return 1

    def req_align(self) -> int:
        """The alignment of offsets and lengths, a power of two."""
        return 1

    def zero_align(self) -> int:
        """The alignment of ``write_zeroes``; a multiple of ``req_align()``."""
        return self.req_align()

    def discard_align(self) -> int:
        """The alignment of ``discard``; a multiple of ``req_align()``."""
        return self.req_align()

    def descriptor(self) -> int | None:
        """An OS file descriptor whose byte N is this storage's byte N, or None.

        The core uses it for positional reads, writes and copies while the storage is open, never to
        seek or close.
        """
        return None

    def real_path(self) -> str | None:
        """The path of the very object that is open, symbolic links resolved; None without one.

        Gates trust it, so it is never worked out from the name. The default asks the system about
        ``descriptor()``.
        """
        descriptor = self.descriptor()
        if descriptor is None:
            return None
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            return None

    def resolve_relative(self, name: str) -> str:
        """The full name of ``name``, seen from this object's own folder; a full name stays itself.

        Raises:
            UnsupportedOperationError: this storage has no folders.
        """
        raise UnsupportedOperationError(f"{self.name()}: cannot resolve '{name}': no folders here")

    def describe(self) -> Mapping[str, object]:
        """Facts for people (``info`` shows them), such as ``{"locked": False}``."""
        return {}


class BlockingStorage(StorageFacts, Protocol):
    """A storage of plain functions, which may block."""

    __slots__ = ()

    # The bare returns: a method of nothing but its docstring counts as abstract in a protocol.

    @classmethod
    def open(cls, options: StorageOpenOptions) -> Self:
        """Open what ``options.name`` names. Opening never changes the object.

        Raises:
            StorageNotFoundError, StorageAccessError, StorageError: it cannot be opened.
            ImageInUseError: ``options.lock`` is set and somebody else holds it.
            OptionError: an option is unknown.
        """
        raise UnsupportedOperationError(f"{cls.__name__} cannot be opened by name")

    @classmethod
    def create_open(cls, options: StorageCreateOptions) -> Self:
        """Create it, and open it for writing.

        Raises:
            StorageExistsError: it exists and ``options.overwrite`` is not set.
        """
        raise UnsupportedOperationError(f"{cls.__name__} cannot be created by name")

    @abstractmethod
    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """Fill ``buffers`` with the bytes at ``offset``; past the end with zeroes. Never short.

        Raises:
            StorageError: the bytes cannot be had.
        """

    def try_readv(self, buffers: ReadBuffers, offset: int) -> int | None:
        """Read what can be had without waiting: how many bytes (from the first on), or None.

        None says that this storage cannot tell; the caller then reads in a worker thread. A count
        may be short, and is zero where reading would wait.
        """
        return None

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """Write all of ``buffers`` at ``offset``, growing the object where they cross its end.

        Raises:
            ReadOnlyError: not writable.
            StorageError: not all was written; the range then holds old or new bytes.
        """
        raise ReadOnlyError(f"{self.name()}: opened read-only")

    def write_zeroes(self, offset: int, length: int, allocate: bool = False) -> None:
        """Make the range read as zeroes, without ever changing the object's length.

        With ``allocate`` it stays or becomes reserved on the host. A range that crosses the end is
        cut there.

        Note for implementers: the default writes zeroes, so it is right for every storage.
        """
        end = min(offset + length, self.size())
        zeroes = memoryview(bytes(min(max(end - offset, 0), _ZERO_CHUNK)))
        while offset < end:
            chunk = zeroes[: end - offset]
            self.writev((chunk,), offset)
            offset += len(chunk)

    def discard(self, offset: int, length: int) -> None:
        """Give the range's space back where that is possible; its content is undefined afterwards.

        Never changes the object's length. The default does nothing, which is allowed.
        """
        return

    def extent_at(self, offset: int) -> Extent:
        """Whether data or a hole lies at ``offset`` (inside the object), and how far it reaches.

        The default says that all is data.
        """
        return Extent(length=max(self.size() - offset, 0), is_data=True)

    def flush(self) -> None:
        """Push buffers of this object down to the system. Need not reach the hardware."""
        return

    def sync(self) -> None:
        """Make what was written durable. Only this, and ``barrier``, order writes."""
        return

    def barrier(self) -> None:
        """Order writes to this object: after a power loss none is there without those before it.

        It need not make anything durable. The default does that, with ``sync``; a storage whose
        ``sync`` changes the object as a whole has nothing to do.
        """
        self.sync()

    def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        """Set the length; new bytes read as zeroes.

        Raises:
            UnsupportedOperationError: the object cannot change its length, or not in this mode.
        """
        raise UnsupportedOperationError(f"{self.name()}: cannot be resized")

    def invalidate_cache(self) -> None:
        """Drop buffers without writing them."""
        return

    def abandon(self) -> None:
        """Called before ``close`` when creating an image in it failed: undo ``create_open``.

        An object that ``create_open`` made is removed; one that was there before stays. The default
        leaves it.
        """
        return

    def close(self) -> None:
        """Release everything. Called once, and does not sync."""
        return


class Storage(StorageFacts, Protocol):
    """A storage of coroutines, for a client that lives in an event loop.

    The core awaits every call in the loop in which the storage was opened. Semantics are those of
    ``BlockingStorage``, name by name.
    """

    __slots__ = ()

    @classmethod
    async def open(cls, options: StorageOpenOptions) -> Self:
        """See ``BlockingStorage.open``."""
        raise UnsupportedOperationError(f"{cls.__name__} cannot be opened by name")

    @classmethod
    async def create_open(cls, options: StorageCreateOptions) -> Self:
        """See ``BlockingStorage.create_open``."""
        raise UnsupportedOperationError(f"{cls.__name__} cannot be created by name")

    @abstractmethod
    async def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """See ``BlockingStorage.readv``."""

    async def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """See ``BlockingStorage.writev``."""
        raise ReadOnlyError(f"{self.name()}: opened read-only")

    async def write_zeroes(self, offset: int, length: int, allocate: bool = False) -> None:
        """See ``BlockingStorage.write_zeroes``."""
        end = min(offset + length, self.size())
        zeroes = memoryview(bytes(min(max(end - offset, 0), _ZERO_CHUNK)))
        while offset < end:
            chunk = zeroes[: end - offset]
            await self.writev((chunk,), offset)
            offset += len(chunk)

    async def discard(self, offset: int, length: int) -> None:
        """See ``BlockingStorage.discard``."""
        return

    async def extent_at(self, offset: int) -> Extent:
        """See ``BlockingStorage.extent_at``."""
        return Extent(length=max(self.size() - offset, 0), is_data=True)

    async def flush(self) -> None:
        """See ``BlockingStorage.flush``."""
        return

    async def sync(self) -> None:
        """See ``BlockingStorage.sync``."""
        return

    async def barrier(self) -> None:
        """See ``BlockingStorage.barrier``."""
        await self.sync()

    async def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        """See ``BlockingStorage.resize``."""
        raise UnsupportedOperationError(f"{self.name()}: cannot be resized")

    async def invalidate_cache(self) -> None:
        """See ``BlockingStorage.invalidate_cache``."""
        return

    async def abandon(self) -> None:
        """See ``BlockingStorage.abandon``."""
        return

    async def close(self) -> None:
        """See ``BlockingStorage.close``."""
        return


AnyStorage: TypeAlias = BlockingStorage | Storage


def is_blocking_storage(candidate: object) -> bool:
    """Whether it subclasses ``BlockingStorage`` by name; a structural check is slow and lies."""
    return BlockingStorage in type(candidate).__mro__


def is_storage(candidate: object) -> bool:
    """Whether it subclasses either rung by name."""
    mro = type(candidate).__mro__
    return BlockingStorage in mro or Storage in mro
