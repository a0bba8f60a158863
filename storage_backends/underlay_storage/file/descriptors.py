"""Getting a descriptor for a path: of a regular file or a block device, and of nothing else."""

from __future__ import annotations

import errno
import os
import stat

from underlay.errors import StorageError, StorageExistsError, storage_error

__all__ = ["create_new", "open_existing", "remove", "sync_folder"]

# O_NONBLOCK: a FIFO would wait for its other end, a device for its carrier, a leased file for the
# holder. It changes nothing for the reads and writes of what is let through.
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def open_existing(path: str, *, writable: bool) -> int:
    """A descriptor of what is there; opening changes nothing.

    Raises:
        StorageNotFoundError, StorageAccessError, StorageError: there is no such file, it may not be
            opened so, or it is of another kind.
    """
    doing = "open"
    try:
        # Opening alone may do something (release the writer of a FIFO, rewind a tape): look first.
        _check_kind(os.stat(path), path)
        descriptor = os.open(path, _FLAGS | (os.O_RDWR if writable else os.O_RDONLY))
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error(error, doing=doing, name=path) from error
    except ValueError as error:
        raise _no_name(path) from error
    try:
        # Another file may have taken the name meanwhile.
        _check_kind(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def create_new(path: str) -> int:
    """A descriptor of a new file.

    Raises:
        StorageExistsError: the name is taken.
        StorageError: it cannot be created.
    """
    try:
        return os.open(path, _FLAGS | os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError as error:
        raise StorageExistsError(
            f"'{path}' exists; choose another name, or allow it to be overwritten", filename=path
        ) from error
    except OSError as error:
        raise storage_error(error, doing="create", name=path) from error
    except ValueError as error:
        raise _no_name(path) from error


def remove(path: str, descriptor: int) -> None:
    """Remove a file just made, unless the name means another one by now."""
    try:
        if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor)):
            os.unlink(path)
    except OSError:
        pass  # it is gone already; the failure that led here is what the caller hears of


def sync_folder(folder: str) -> None:
    """Make the entries of a folder durable, as far as this process may and the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EBADF, errno.EROFS}:
            raise
    finally:
        os.close(descriptor)


def _check_kind(facts: os.stat_result, path: str) -> None:
    mode = facts.st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return
    if stat.S_ISDIR(mode):
        raise StorageError(
            f"'{path}' is a directory, not a disk image", errno=errno.EISDIR, filename=path
        )
    kind = (
        "a named pipe"
        if stat.S_ISFIFO(mode)
        else "a socket"
        if stat.S_ISSOCK(mode)
        else "a character device"
    )
    raise StorageError(
        f"'{path}' is {kind}; only regular files and block devices can be opened",
        errno=errno.EINVAL,
        filename=path,
    )


def _no_name(path: str) -> StorageError:
    return StorageError(
        f"{path!r} cannot be the name of a file: it has a NUL byte or is no text",
        errno=errno.EINVAL,
        filename=path,
    )
