"""A storage that reads as zeroes and forgets what is written, for measuring everything else."""

from __future__ import annotations

from typing import ClassVar, Self

from underlay.buffers import fill_zero, total
from underlay.errors import OptionError, ReadOnlyError
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

__all__ = ["NullStorage", "underlay_storage_backends"]

_SCHEME = "null:"


class NullStorage(BlockingStorage):
    """``size`` bytes of nothing; a write past the end makes them more. The URL is ``null:SIZE``."""

    __slots__ = ("_size", "_writable")

    schemes: ClassVar[tuple[str, ...]] = ("null",)

    def __init__(self, size: int = 0, *, writable: bool = True) -> None:
        if size < 0:
            raise ValueError(f"size is {size}; it cannot be negative")
        self._size = size
        self._writable = writable

    @classmethod
    def has_option(cls, name: str, option: str) -> bool:
        """See ``BlockingStorage.has_option``: there are none."""
        return False

    @classmethod
    def open(cls, options: StorageOpenOptions) -> Self:
        """Open ``null:SIZE``, SIZE being bytes."""
        _check_options(options.options)
        return cls(_size_of(options.name), writable=options.writable)

    @classmethod
    def create_open(cls, options: StorageCreateOptions) -> Self:
        """The same, of ``options.size`` bytes; what the name says counts for nothing."""
        _check_options(options.options)
        return cls(options.size)

    def size(self) -> int:
        """The bytes it pretends to have."""
        return self._size

    def name(self) -> str:
        """``null:SIZE``, with the size of now."""
        return f"{_SCHEME}{self._size}"

    def writable(self) -> bool:
        """Whether it takes writes, to forget them."""
        return self._writable

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """Fill with zeroes."""
        fill_zero([memoryview(buffer) for buffer in buffers])

    def try_readv(self, buffers: ReadBuffers, offset: int) -> int | None:
        """Fill with zeroes, all of it at once."""
        self.readv(buffers, offset)
        return total(buffers)

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """Forget them."""
        self._need_writable()
        self._size = max(self._size, offset + total(buffers))

    def write_zeroes(self, offset: int, length: int, allocate: bool = False) -> None:
        """Nothing to do."""
        self._need_writable()

    def discard(self, offset: int, length: int) -> None:
        """Nothing to do."""
        self._need_writable()

    def extent_at(self, offset: int) -> Extent:
        """A hole to the end."""
        return Extent(length=max(self._size - offset, 0), is_data=False)

    def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        """Pretend another length."""
        self._need_writable()
        self._size = size

    def _need_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyError(f"'{self.name()}' was opened read-only")


def _size_of(name: str) -> int:
    digits = name.removeprefix(_SCHEME)
    if digits.isascii() and digits.isdigit():
        return int(digits)
    raise OptionError(f"'{name}': write null:SIZE, with the size in bytes", option="size")


def _check_options(options: object) -> None:
    if options:
        raise OptionError("null has no options; leave storage_options away")


@hookimpl
def underlay_storage_backends() -> tuple[type[NullStorage]]:
    """Offer the storage to underlay."""
    return (NullStorage,)
