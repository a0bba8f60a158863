"""A sparse object in memory: for tests, for work that needs no file, and shared by name.

``MemoryStorage(b"…")`` is an object of its own. The URL ``memory:NAME`` names an object of this
process: created once, then opened by any number of handles, which see one content. It lives until
``MemoryStorage.remove(name)``.
"""

from __future__ import annotations

import errno
import posixpath
import threading
from bisect import bisect_left
from collections.abc import Hashable, Mapping
from typing import ClassVar, NoReturn, Self

from underlay.buffers import fill_zero, total
from underlay.errors import (
    ImageInUseError,
    OptionError,
    ReadOnlyError,
    StorageError,
    StorageExistsError,
    StorageNotFoundError,
)
from underlay.hookspecs import hookimpl
from underlay.storage import (
    BlockingStorage,
    Extent,
    PreallocateMode,
    ReadBuffers,
    StorageCreateOptions,
    StorageOpenOptions,
    WriteBuffers,
)

__all__ = ["MemoryStorage", "underlay_storage_backends"]

_SCHEME = "memory:"
_BLOCK = 64 << 10


class _Content:
    """Bytes in blocks; a block that is not there reads as zeroes. Its users hold ``lock``."""

    __slots__ = ("_blocks", "_sorted", "lock", "readers", "size", "writers")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        #: Bytes.
        self.size = 0
        #: How many handles with a lock have it open.
        self.readers = 0
        self.writers = 0
        self._blocks: dict[int, bytearray] = {}
        #: The numbers of the blocks in order, or None when they have changed since.
        self._sorted: list[int] | None = []

    def read(self, view: memoryview, offset: int) -> None:
        done, length = 0, len(view)
        while done < length:
            number, start = divmod(offset + done, _BLOCK)
            count = min(length - done, _BLOCK - start)
            block = self._blocks.get(number)
            if block is None:
                fill_zero((view[done : done + count],))
            else:
                view[done : done + count] = memoryview(block)[start : start + count]
            done += count

    def write(self, view: memoryview, offset: int) -> None:
        done, length = 0, len(view)
        while done < length:
            number, start = divmod(offset + done, _BLOCK)
            count = min(length - done, _BLOCK - start)
            self._block(number)[start : start + count] = view[done : done + count]
            done += count
        self.size = max(self.size, offset + length)

    def zero(self, start: int, end: int, *, keep: bool) -> None:
        """Make a range zero; its whole blocks stay, or come to be, only with ``keep``."""
        for number in self._numbers(start, end, missing_too=keep):
            first, last = number * _BLOCK, (number + 1) * _BLOCK
            if not keep and start <= first and last <= end:
                del self._blocks[number]
                self._sorted = None
            else:
                left, right = max(start, first) - first, min(end, last) - first
                self._block(number)[left:right] = bytes(right - left)

    def resize(self, size: int) -> None:
        if size < self.size:
            # To the end of the last block: growing again must not show what is cut.
            self.zero(size, -(-self.size // _BLOCK) * _BLOCK, keep=False)
        self.size = size

    def extent_at(self, offset: int) -> Extent:
        if offset >= self.size:
            return Extent(length=0, is_data=False)
        number = offset // _BLOCK
        is_data = number in self._blocks
        if is_data:
            while number in self._blocks:
                number += 1
        else:
            numbers = self._in_order()
            at = bisect_left(numbers, number)
            number = numbers[at] if at < len(numbers) else self.size // _BLOCK + 1
        return Extent(length=min(number * _BLOCK, self.size) - offset, is_data=is_data)

    def _block(self, number: int) -> bytearray:
        block = self._blocks.get(number)
        if block is None:
            block = self._blocks[number] = bytearray(_BLOCK)
            self._sorted = None
        return block

    def _numbers(self, start: int, end: int, *, missing_too: bool) -> list[int]:
        """The blocks that a range touches."""
        first, last = start // _BLOCK, -(-end // _BLOCK)
        if missing_too:
            return list(range(first, last))
        numbers = self._in_order()
        return numbers[bisect_left(numbers, first) : bisect_left(numbers, last)]

    def _in_order(self) -> list[int]:
        if self._sorted is None:
            self._sorted = sorted(self._blocks)
        return self._sorted


class _Named:
    """The objects of this process that have names."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.contents: dict[str, _Content] = {}


_named = _Named()


class MemoryStorage(BlockingStorage):
    """A handle on an object in memory."""

    __slots__ = ("_content", "_locked", "_made", "_name", "_writable")

    schemes: ClassVar[tuple[str, ...]] = ("memory",)

    def __init__(self, content: bytes | int = 0, *, writable: bool = True) -> None:
        """A new object without a name, holding these bytes, or this many zero bytes."""
        self._content = _Content()
        self._locked = self._made = False
        self._name: str | None = None
        self._writable = writable
        if isinstance(content, int):
            if content < 0:
                raise ValueError(f"size is {content}; it cannot be negative")
            self._content.size = content
        else:
            self._content.write(memoryview(content), 0)

    @classmethod
    def has_option(cls, name: str, option: str) -> bool:
        """See ``BlockingStorage.has_option``: there are none."""
        return False

    @classmethod
    def open(cls, options: StorageOpenOptions) -> Self:
        """Open ``memory:NAME``; see ``BlockingStorage.open``."""
        _check_options(options.options)
        name = options.name.removeprefix(_SCHEME)
        with _named.lock:
            content = _named.contents.get(name)
            if content is None:
                raise _not_found(name)
            return cls._attach(content, name, writable=options.writable, lock=options.lock)

    @classmethod
    def create_open(cls, options: StorageCreateOptions) -> Self:
        """Create ``memory:NAME``, or with ``memory:`` an object without a name."""
        _check_options(options.options)
        if options.size < 0:
            raise OptionError(f"size is {options.size}; it cannot be negative", option="size")
        name = options.name.removeprefix(_SCHEME)
        with _named.lock:
            content = _named.contents.get(name)
            if content is not None and not options.overwrite:
                raise StorageExistsError(
                    f"'{_SCHEME}{name}' exists; choose another name, or allow it to be overwritten",
                    filename=_SCHEME + name,
                )
            is_new = content is None
            if content is None:
                content = _Content()
            storage = cls._attach(content, name, writable=True, lock=options.lock)
            try:
                storage.resize(0)
                storage.resize(options.size, options.preallocation)
            except BaseException:
                storage.close()
                raise
            if name and is_new:
                _named.contents[name] = content
            storage._made = is_new  # noqa: SLF001 - its own class's
        return storage

    @classmethod
    def remove(cls, name: str) -> None:
        """Forget the object that is called ``memory:NAME``; open handles keep it.

        Raises:
            StorageNotFoundError: there is none.
        """
        name = name.removeprefix(_SCHEME)
        with _named.lock:
            if _named.contents.pop(name, None) is None:
                raise _not_found(name)

    @classmethod
    def _attach(cls, content: _Content, name: str, *, writable: bool, lock: bool) -> Self:
        """A handle on an object that is there, locked as a file would be."""
        storage = cls(writable=writable)
        storage._content = content
        storage._name = _SCHEME + name if name else None
        if lock:
            with content.lock:
                if content.writers or (writable and content.readers):
                    raise ImageInUseError(
                        f"'{storage.name()}' is in use: close it there first, or open it without "
                        "locks (lock=False) if you know better",
                        filename=storage.name(),
                    )
                if writable:
                    content.writers += 1
                else:
                    content.readers += 1
            storage._locked = True
        return storage

    # -- facts

    def size(self) -> int:
        """The object's length in bytes."""
        return self._content.size

    def name(self) -> str:
        """``memory:NAME``, or something for messages."""
        return self._name or "<memory>"

    def identity(self) -> Hashable:
        """The same for all handles on one object."""
        return self._content

    def writable(self) -> bool:
        """Whether this handle may write."""
        return self._writable

    def resolve_relative(self, name: str) -> str:
        """``b`` as seen from ``memory:dir/a`` is ``memory:dir/b``; ``memory:…`` stays itself."""
        if name.startswith(_SCHEME):
            return name
        folder = posixpath.dirname((self._name or "").removeprefix(_SCHEME))
        return _SCHEME + posixpath.normpath(posixpath.join(folder, name))

    def describe(self) -> Mapping[str, object]:
        """``locked``: whether other handles are kept away."""
        return {"locked": self._locked}

    # -- I/O

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """See ``BlockingStorage.readv``."""
        content = self._content
        with content.lock:
            for buffer in buffers:
                content.read(memoryview(buffer), offset)
                offset += len(buffer)

    def try_readv(self, buffers: ReadBuffers, offset: int) -> int | None:
        """All of it: memory never waits."""
        self.readv(buffers, offset)
        return total(buffers)

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """See ``BlockingStorage.writev``."""
        self._need_writable()
        content = self._content
        with content.lock:
            try:
                for buffer in buffers:
                    content.write(memoryview(buffer), offset)
                    offset += len(buffer)
            except MemoryError as error:
                self._no_memory(error)

    def write_zeroes(self, offset: int, length: int, allocate: bool = False) -> None:
        """See ``BlockingStorage.write_zeroes``: whole blocks are given back."""
        self._need_writable()
        content = self._content
        with content.lock:
            end = min(offset + length, content.size)
            if offset < end:
                content.zero(offset, end, keep=allocate)

    def discard(self, offset: int, length: int) -> None:
        """The same as zeroing."""
        self.write_zeroes(offset, length)

    def extent_at(self, offset: int) -> Extent:
        """See ``BlockingStorage.extent_at``."""
        with self._content.lock:
            return self._content.extent_at(offset)

    def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        """See ``BlockingStorage.resize``; what is to be reserved is taken from memory at once."""
        self._need_writable()
        content = self._content
        with content.lock:
            old = content.size
            content.resize(size)
            if preallocation in {PreallocateMode.FALLOC, PreallocateMode.FULL} and size > old:
                try:
                    content.zero(old, size, keep=True)
                except MemoryError as error:
                    content.resize(old)
                    self._no_memory(error)

    def abandon(self) -> None:
        """See ``BlockingStorage.abandon``."""
        name = self.name().removeprefix(_SCHEME)
        with _named.lock:
            if self._made and _named.contents.get(name) is self._content:
                del _named.contents[name]

    def close(self) -> None:
        """Let go of the object. May be called again."""
        if self._locked:
            self._locked = False
            with self._content.lock:
                if self._writable:
                    self._content.writers -= 1
                else:
                    self._content.readers -= 1

    # -- helpers

    def _need_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyError(f"'{self.name()}' was opened read-only")

    def _no_memory(self, error: MemoryError) -> NoReturn:
        raise StorageError(
            f"'{self.name()}' does not fit into memory", errno=errno.ENOMEM, filename=self.name()
        ) from error


def _not_found(name: str) -> StorageNotFoundError:
    return StorageNotFoundError(
        f"There is no '{_SCHEME}{name}' in this process; create it first",
        errno=errno.ENOENT,
        filename=_SCHEME + name,
    )


def _check_options(options: object) -> None:
    if options:
        raise OptionError("memory has no options; leave storage_options away")


@hookimpl
def underlay_storage_backends() -> tuple[type[MemoryStorage]]:
    """Offer the storage to underlay."""
    return (MemoryStorage,)
