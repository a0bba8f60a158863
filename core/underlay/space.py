"""Space in a file: zeroing and giving back without writing, where the filesystem can."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable

from underlay.storage import Extent

__all__ = ["Space", "extent", "lives_in_memory"]

# fallocate(2): modes, none of which lets the file grow.
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02 | _KEEP_SIZE
_ZERO_RANGE = 0x10 | _KEEP_SIZE

#: It will never work on this file.
_NEVER = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.ENOTTY, errno.ESPIPE})
#: Not for this range: a block device takes whole sectors only.
_NOT_NOW = errno.EINVAL

#: TMPFS_MAGIC and RAMFS_MAGIC of statfs(2).
_MEMORY_FILESYSTEMS = frozenset({0x0102_1994, 0x8584_58F6})


class Space:
    """What ``fallocate`` can do for one open file, as far as it was found out."""

    __slots__ = ("_impossible",)

    def __init__(self) -> None:
        self._impossible: set[int] = set()

    def punch(self, descriptor: int, offset: int, length: int) -> bool:
        """Make a hole, which reads as zeroes. False if that is impossible here.

        Raises:
            OSError: it failed.
        """
        return self._fallocate(descriptor, _PUNCH_HOLE, offset, length)

    def zero(self, descriptor: int, offset: int, length: int) -> bool:
        """Make a range read as zeroes that stays reserved. False if that is impossible here.

        Raises:
            OSError: it failed.
        """
        return self._fallocate(descriptor, _ZERO_RANGE, offset, length)

    def _fallocate(self, descriptor: int, mode: int, offset: int, length: int) -> bool:
        if mode in self._impossible:
            return False
        function = _libc_fallocate()
        failure = errno.ENOSYS if function is None else function(descriptor, mode, offset, length)
        if not failure:
            return True
        if failure in _NEVER:
            self._impossible.add(mode)
            return False
        if failure == _NOT_NOW:
            return False
        raise OSError(failure, os.strerror(failure))


def extent(descriptor: int, offset: int, end: int) -> Extent:
    """Whether data or a hole lies at ``offset`` of a file of ``end`` bytes, and how far it reaches.

    All is data where the filesystem cannot tell. The descriptor's position moves; nobody uses it.

    Raises:
        OSError: it failed.
    """
    length = max(end - offset, 0)
    try:
        data = os.lseek(descriptor, offset, os.SEEK_DATA)
        if data > offset:
            return Extent(length=min(data - offset, length), is_data=False)
        hole = os.lseek(descriptor, offset, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return Extent(length=length, is_data=False)
        if error.errno in {errno.EINVAL, errno.EOPNOTSUPP}:
            return Extent(length=length, is_data=True)
        raise
    # Not 0, should the data have become a hole between the two calls.
    return Extent(length=max(hole - offset, 1), is_data=True)


@functools.cache
def lives_in_memory(descriptor: int) -> bool:
    """Whether the file is on a filesystem that keeps its files in memory (tmpfs, ramfs)."""
    import ctypes

    # The filesystem's type is the first word of struct statfs, which is 120 bytes; room to spare.
    facts = (ctypes.c_long * 64)()
    try:
        failed = ctypes.CDLL(None).fstatfs(descriptor, facts)
    except (OSError, AttributeError):
        return False
    return not failed and facts[0] in _MEMORY_FILESYSTEMS


def _libc_fallocate() -> Callable[[int, int, int, int], int] | None:
    """The C library's ``fallocate``, which returns an errno here; ``os`` has none with a mode."""
    import ctypes

    try:
        library = ctypes.CDLL(None, use_errno=True)
        function = getattr(library, "fallocate64", None) or library.fallocate
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int

    def fallocate(descriptor: int, mode: int, offset: int, length: int) -> int:
        while function(descriptor, mode, offset, length):
            failure = ctypes.get_errno()
            if failure != errno.EINTR:
                return failure
        return 0

    return fallocate
