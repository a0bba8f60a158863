"""``FileStorage``: positional reads and writes on a descriptor."""

from __future__ import annotations

import errno
import os
import stat
import threading
import warnings
from collections.abc import Generator, Hashable, Mapping
from contextlib import contextmanager
from typing import ClassVar, NoReturn, Self

from underlay.buffers import aligned_buffer, fill_zero, split_at, total
from underlay.errors import (
    ClosedError,
    OptionError,
    ReadOnlyError,
    StorageError,
    StorageExistsError,
    UnsupportedOperationError,
    storage_error,
)
from underlay.space import Space, extent, lives_in_memory
from underlay.storage import (
    BlockingStorage,
    Extent,
    PreallocateMode,
    ReadBuffers,
    Reopening,
    StorageCreateOptions,
    StorageOpenOptions,
    WriteBuffers,
)
from underlay_storage.file import descriptors, locks
from underlay_storage.file.direct import Alignment, direct_option, enable, set_direct
from underlay_storage.file.naming import folder_of, path_of

__all__ = ["FileStorage"]

# Looked up once: these two carry every read and write.
_preadv = os.preadv
_pwritev = os.pwritev

#: Read what is in the page cache, wait for nothing.
_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)
#: How a filesystem says that it does not know ``RWF_NOWAIT``.
_NO_NOWAIT = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})

_ZERO_CHUNK = 1 << 20
_BYTEWISE = Alignment(request=1, memory=1)


class FileStorage(BlockingStorage):
    """A regular file or a block device.

    Storage options: ``direct`` (bool), past the page cache.
    """

    __slots__ = (
        "_alignment",
        "_direct",
        "_fd",
        "_folder",
        "_identity",
        "_is_device",
        "_locked",
        "_made",
        "_name_is_volatile",
        "_nowait",
        "_path",
        "_space",
        "_switching",
        "_writable",
    )

    schemes: ClassVar[tuple[str, ...]] = ("file",)

    def __init__(
        self, descriptor: int, path: str, *, writable: bool, lock: bool, direct: bool
    ) -> None:
        """Take over an open descriptor; ``open`` and ``create_open`` are the ways in.

        Raises:
            ImageInUseError: ``lock`` is set and somebody else holds it.
            UnsupportedOperationError: ``direct`` is set and impossible.
        """
        self._fd = -1  # until all is well: a failure leaves the descriptor to the caller
        self._path = path
        self._folder = folder_of(path)
        self._writable = writable
        self._direct = direct
        facts = os.fstat(descriptor)
        self._is_device = stat.S_ISBLK(facts.st_mode)
        self._identity: Hashable = (
            ("block device", facts.st_rdev) if self._is_device else (facts.st_dev, facts.st_ino)
        )
        self._locked = lock and locks.lock(descriptor, writable=writable, path=path)
        self._alignment = enable(descriptor, path) if direct else _BYTEWISE
        # Direct I/O goes to the device, and waits for it.
        self._nowait = None if direct else _NOWAIT
        self._space = Space()
        self._switching = threading.Lock()
        #: Whether the file is this object's own making, and its name not yet durable.
        self._made = self._name_is_volatile = False
        self._fd = descriptor

    # -- coming to be

    @classmethod
    def has_option(cls, name: str, option: str) -> bool:
        """See ``BlockingStorage.has_option``."""
        return option == "direct"

    @classmethod
    def open(cls, options: StorageOpenOptions) -> Self:
        """See ``BlockingStorage.open``."""
        direct = direct_option(options.options)
        path = path_of(options.name)
        descriptor = descriptors.open_existing(path, writable=options.writable)
        try:
            return cls(
                descriptor, path, writable=options.writable, lock=options.lock, direct=direct
            )
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def create_open(cls, options: StorageCreateOptions) -> Self:
        """See ``BlockingStorage.create_open``. A create that fails leaves no new file behind."""
        direct = direct_option(options.options)
        if options.size < 0:
            raise OptionError(f"size is {options.size}; it cannot be negative", option="size")
        path = path_of(options.name)
        try:
            descriptor, is_new = descriptors.create_new(path), True
        except StorageExistsError:
            if not options.overwrite:
                raise
            # Not O_TRUNC: the old content goes when the lock is ours, and not before.
            descriptor, is_new = descriptors.open_existing(path, writable=True), False
        try:
            storage = cls(descriptor, path, writable=True, lock=options.lock, direct=direct)
        except BaseException:
            if is_new:
                descriptors.remove(path, descriptor)
            os.close(descriptor)
            raise
        storage._made = storage._name_is_volatile = is_new
        try:
            storage._make_empty(options.size)
            if not storage._is_device:
                storage.resize(options.size, options.preallocation)
        except BaseException:
            storage.abandon()
            storage.close()
            raise
        return storage

    def _make_empty(self, size: int) -> None:
        """Let nothing of the old content survive; refuse an impossible size while it is there."""
        old = self.size()
        if self._is_device:
            if size > old:
                raise UnsupportedOperationError(
                    f"'{self._path}' is a block device of {old} bytes; {size} do not fit"
                )
            self.write_zeroes(0, old)
        elif old:
            if size > old:
                self._truncate(size)
            self._truncate(0)

    # -- facts

    def size(self) -> int:
        """The length in bytes, as the system knows it now."""
        try:
            if self._is_device:
                return os.lseek(self._fd, 0, os.SEEK_END)
            return os.fstat(self._fd).st_size
        except OSError as error:
            self._fail(error, "find the size of")

    def name(self) -> str:
        """The path as it was given."""
        return self._path

    def identity(self) -> Hashable:
        """Device and inode; of a block device the device that it is."""
        return self._identity

    def reopening(self) -> Reopening | None:
        """The path, and when the file was changed; a block device is this machine's alone."""
        if self._folder is None:
            return None
        try:
            facts = os.fstat(self._fd)
            state: Hashable = facts.st_mtime_ns
            if self._is_device:
                with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                    state = facts.st_rdev, file.read()
        except OSError as error:
            self._fail(error, "look at")
        return Reopening(
            name=os.path.join(self._folder, os.path.basename(self._path)),
            options={"direct": True} if self._direct else {},
            state=(self.size(), state),
        )

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._writable

    def mem_align(self) -> int:
        """1, or what direct I/O wants."""
        return self._alignment.memory

    def req_align(self) -> int:
        """1, or what direct I/O wants."""
        return self._alignment.request

    def descriptor(self) -> int | None:
        """The file's own; None with direct I/O, which not everybody's requests can take."""
        return None if self._direct or self._fd < 0 else self._fd

    def real_path(self) -> str | None:
        """The path of the open file, as the system tells it; with direct I/O too."""
        try:
            return None if self._fd < 0 else os.readlink(f"/proc/self/fd/{self._fd}")
        except OSError:
            return None

    def resolve_relative(self, name: str) -> str:
        """The path of ``name`` from the folder of the path that was opened.

        Symbolic links in that path are not resolved, which is how QEMU does it; the name is never
        taken for a URL.
        """
        if "\0" in name:
            raise UnsupportedOperationError(
                f"'{self._path}': {name!r} cannot be the name of a file"
            )
        if os.path.isabs(name):
            return name
        if self._folder is None:
            raise UnsupportedOperationError(
                f"'{self._path}': cannot resolve '{name}': the current folder was deleted"
            )
        return os.path.join(self._folder, name)

    def describe(self) -> Mapping[str, object]:
        """``locked``: whether locks keep other users away."""
        return {"locked": self._locked}

    # -- reading

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """See ``BlockingStorage.readv``."""
        try:
            done = _preadv(self._fd, buffers, offset)
        except OSError as error:
            self._fail(error, f"read {total(buffers)} bytes at {offset} of")
        if done != (len(buffers[0]) if len(buffers) == 1 else total(buffers)):
            self._read_rest(buffers, offset, done)

    def try_readv(self, buffers: ReadBuffers, offset: int) -> int | None:
        """See ``BlockingStorage.try_readv``: what is in the page cache."""
        if self._nowait is None:
            return None
        try:
            done = _preadv(self._fd, buffers, offset, self._nowait)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno in _NO_NOWAIT:
                # A filesystem that is memory never waits for a device: there any read will do.
                self._nowait = 0 if lives_in_memory(self._fd) else None
                return None
            self._fail(error, f"read {total(buffers)} bytes at {offset} of")
        wanted = len(buffers[0]) if len(buffers) == 1 else total(buffers)
        if done < wanted and offset + done >= self.size():
            fill_zero(split_at([memoryview(buffer) for buffer in buffers], done)[1])
            return wanted
        return done

    def _read_rest(self, buffers: ReadBuffers, offset: int, done: int) -> None:
        """Go on after a short read: the end of the file, or more than one call can carry."""
        views = [memoryview(buffer) for buffer in buffers]
        wanted = total(buffers)
        while done < wanted:
            if offset + done >= self.size():
                fill_zero(split_at(views, done)[1])
                return
            # Direct I/O goes on at a block only.
            start = done & -self._alignment.request
            try:
                got = _preadv(self._fd, split_at(views, start)[1], offset + start)
            except OSError as error:
                self._fail(error, f"read {wanted - start} bytes at {offset + start} of")
            if start + got <= done and offset + done < self.size():
                raise StorageError(
                    f"Could not read {wanted} bytes at {offset} of '{self._path}': "
                    f"the system gave no more than {done}",
                    errno=errno.EIO,
                    filename=self._path,
                )
            done = max(done, start + got)

    def extent_at(self, offset: int) -> Extent:
        """See ``BlockingStorage.extent_at``; a filesystem that cannot tell has data everywhere."""
        try:
            return extent(self._fd, offset, self.size())
        except OSError as error:
            self._fail(error, f"look for data at {offset} of")

    # -- writing

    def writev(self, buffers: WriteBuffers, offset: int) -> None:
        """See ``BlockingStorage.writev``."""
        try:
            done = _pwritev(self._fd, buffers, offset)
        except OSError as error:
            self._fail(error, f"write {total(buffers)} bytes at {offset} of", writing=True)
        wanted = len(buffers[0]) if len(buffers) == 1 else total(buffers)
        while done < wanted:
            rest = split_at([memoryview(buffer) for buffer in buffers], done)[1]
            try:
                done += _pwritev(self._fd, rest, offset + done)
            except OSError as error:
                self._fail(error, f"write {wanted - done} bytes at {offset + done} of")

    def write_zeroes(self, offset: int, length: int, allocate: bool = False) -> None:
        """See ``BlockingStorage.write_zeroes``: by a hole, unless ``allocate``."""
        self._need_writable("write zeroes to")
        length = min(length, self.size() - offset)
        if length <= 0:
            return
        try:
            if not allocate and self._space.punch(self._fd, offset, length):
                return
            if self._space.zero(self._fd, offset, length):
                return
        except OSError as error:
            self._fail(error, f"zero {length} bytes at {offset} of")
        self._write_zero_bytes(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """See ``BlockingStorage.discard``: by a hole; nothing where there can be none."""
        self._need_writable("discard from")
        length = min(length, self.size() - offset)
        if length <= 0:
            return
        try:
            self._space.punch(self._fd, offset, length)
        except OSError as error:
            self._fail(error, f"discard {length} bytes at {offset} of")

    def sync(self) -> None:
        """See ``BlockingStorage.sync``; for a new file its name is made durable too."""
        self._need_open("sync")
        try:
            os.fdatasync(self._fd)
            if self._name_is_volatile and self._folder is not None:
                descriptors.sync_folder(self._folder)
                self._name_is_volatile = False
        except OSError as error:
            self._fail(error, "sync")

    def resize(self, size: int, preallocation: PreallocateMode = PreallocateMode.OFF) -> None:
        """See ``BlockingStorage.resize``. What cannot be reserved leaves the length as it was."""
        self._need_writable("resize")
        old = self.size()
        if self._is_device:
            if size != old:
                raise UnsupportedOperationError(
                    f"'{self._path}' is a block device: it stays {old} bytes long"
                )
            return
        if size <= old or preallocation in {PreallocateMode.OFF, PreallocateMode.METADATA}:
            self._truncate(size)
            return
        try:
            if preallocation is PreallocateMode.FALLOC:
                with self._page_cache():
                    os.posix_fallocate(self._fd, old, size - old)
            else:
                self._truncate(size)
                self._write_zero_bytes(old, size - old)
        except BaseException as error:
            self._truncate(old)
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                self._fail(error, f"reserve {size - old} bytes for")
            raise

    def _write_zero_bytes(self, offset: int, length: int) -> None:
        zeroes = aligned_buffer(min(length, _ZERO_CHUNK))
        with self._page_cache():
            while length:
                chunk = zeroes[:length]
                self.writev((chunk,), offset)
                offset += len(chunk)
                length -= len(chunk)

    @contextmanager
    def _page_cache(self) -> Generator[None]:
        """For requests that keep to no alignment; direct ones beside them stay right."""
        if not self._direct:
            yield
            return
        with self._switching:
            set_direct(self._fd, on=False)
            try:
                yield
            finally:
                set_direct(self._fd, on=True)

    def _truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            self._fail(error, f"set to {size} bytes the length of")

    # -- the end

    def abandon(self) -> None:
        """See ``BlockingStorage.abandon``."""
        if self._made and self._folder is not None:
            path = os.path.join(self._folder, os.path.basename(self._path))
            descriptors.remove(path, self._fd)

    def close(self) -> None:
        """Give the descriptor back, and the locks with it. May be called again."""
        descriptor, self._fd = self._fd, -1
        if descriptor < 0:
            return
        try:
            os.close(descriptor)
        except OSError as error:
            raise storage_error(error, doing="close", name=self._path) from error

    def __del__(self) -> None:
        if self._fd >= 0:
            try:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            finally:
                self.close()

    def __repr__(self) -> str:
        return f"<FileStorage {self._path!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an open file cannot be pickled: send its name")

    # -- helpers

    def _need_open(self, doing: str) -> None:
        if self._fd < 0:
            raise ClosedError(f"Could not {doing} '{self._path}': it is closed")

    def _need_writable(self, doing: str) -> None:
        if not self._writable:
            raise ReadOnlyError(f"Could not {doing} '{self._path}': it was opened read-only")

    def _fail(self, error: OSError, doing: str, *, writing: bool = False) -> NoReturn:
        """Say what a failed system call means."""
        self._need_open(doing)
        if writing:
            self._need_writable(doing)
        raise storage_error(error, doing=doing, name=self._path) from error
