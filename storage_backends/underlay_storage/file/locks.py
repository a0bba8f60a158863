"""The locks on an image file that QEMU honours, and we honour of QEMU.

They are open-file-description locks (they belong to the open file, not to the process) on single
bytes: byte ``_USED + p`` says "I use permission p", byte ``_UNSHARED + p`` "nobody else may".
Everyone takes read locks, which exclude nobody, and then looks whether somebody else's contradict
them: taking first and testing then means that of two who come at once at least one sees the other.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from underlay.errors import ImageInUseError, storage_error

__all__ = ["lock"]

_USED = 100
_UNSHARED = 200

# Permissions, by their number.
_READ = 0
_WRITE = 1
_RESIZE = 3
_NAMES = {_READ: "read", _WRITE: "write", _RESIZE: "resize"}

_WRITER_USES = (_READ, _WRITE, _RESIZE)
_READER_USES = (_READ,)
#: Neither reader nor writer lets others change the image.
_NOBODY_ELSE_MAY = (_WRITE, _RESIZE)

#: struct flock: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi0q")

#: How a filesystem or a kernel says that it has no such locks.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def lock(descriptor: int, *, writable: bool, path: str) -> bool:
    """Lock an open image until the descriptor is closed.

    Returns whether it is locked: False on a filesystem that has no locks.

    Raises:
        ImageInUseError: somebody else's use contradicts ours; nothing stays locked.
    """
    uses = _WRITER_USES if writable else _READER_USES
    own = [_USED + permission for permission in uses]
    own += [_UNSHARED + permission for permission in _NOBODY_ELSE_MAY]
    try:
        for byte in own:
            _set(descriptor, fcntl.F_RDLCK, byte)
        for permission in uses:
            if _held_by_others(descriptor, _UNSHARED + permission):
                name = _NAMES[permission]
                raise _in_use(path, f"its user does not share '{name}'", lock=f'"{name}"')
        for permission in _NOBODY_ELSE_MAY:
            if _held_by_others(descriptor, _USED + permission):
                name = _NAMES[permission]
                raise _in_use(path, f"its user holds '{name}'", lock=f'shared "{name}"')
    except ImageInUseError:
        _unlock(descriptor, own)
        raise
    except OSError as error:
        _unlock(descriptor, own)
        if error.errno in _NO_LOCKS:
            return False
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            raise _in_use(path, "it is locked whole") from error
        raise storage_error(error, doing="lock", name=path) from error
    return True


def _unlock(descriptor: int, own: list[int]) -> None:
    for byte in own:
        try:
            _set(descriptor, fcntl.F_UNLCK, byte)
        except OSError:
            return  # no locks here; closing the descriptor drops what there may be


def _set(descriptor: int, kind: int, byte: int) -> None:
    request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)


def _held_by_others(descriptor: int, byte: int) -> bool:
    """Whether a write lock on the byte, which excludes everything, would be refused."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, request)
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _in_use(path: str, why: str, *, lock: str | None = None) -> ImageInUseError:
    return ImageInUseError(
        f"'{path}' is in use, perhaps by a running virtual machine ({why}): stop that first, or "
        "open it without locks (lock=False, -U on the command line) if you know better",
        filename=path,
        lock=lock,
    )
