"""A storage for members of zip archives: ``zip:ARCHIVE!MEMBER``, read-only.

Stored members are read in place; of a compressed one, a read that goes backwards inflates it from
its beginning again. (What this storage lacks is not needed: every method of the contract but
``size`` and ``readv`` has a default.)
"""

from __future__ import annotations

import threading
import zipfile
import zlib
from collections.abc import Iterable
from typing import ClassVar, Self

from underlay.errors import (
    OptionError,
    StorageAccessError,
    StorageError,
    StorageNotFoundError,
    storage_error,
)
from underlay.hookspecs import hookimpl
from underlay.storage import BlockingStorage, ReadBuffers, Storage, StorageOpenOptions

__all__ = ["ZipMember", "underlay_storage_backends"]

SCHEME = "zip"


class ZipMember(BlockingStorage):
    """One member of one archive."""

    __slots__ = ("_archive", "_lock", "_member", "_name", "_size")

    schemes: ClassVar[tuple[str, ...]] = (SCHEME,)

    def __init__(self, archive: zipfile.ZipFile, member: str, *, name: str) -> None:
        self._archive = archive
        self._name = name
        self._size = archive.getinfo(member).file_size
        self._member = archive.open(member)
        # The contract: calls come from any thread, several at once. A zip member has one position.
        self._lock = threading.Lock()

    @classmethod
    def open(cls, options: StorageOpenOptions) -> Self:
        """``options.name`` is the whole URL. Whatever goes wrong is an error of underlay's."""
        path, mark, member = options.name.removeprefix(f"{SCHEME}:").partition("!")
        if not mark or not member:
            raise StorageNotFoundError(
                f"'{options.name}' names no member: write zip:ARCHIVE!MEMBER"
            )
        if options.options:
            raise OptionError(f"zip: has no storage options, but got {', '.join(options.options)}")
        if options.writable:
            raise StorageAccessError(f"'{options.name}' cannot be written: open it read-only")
        try:
            archive = zipfile.ZipFile(path)
        except OSError as error:
            raise storage_error(error, doing="open", name=path) from error
        except zipfile.BadZipFile as error:
            raise StorageError(f"'{path}' is no zip archive: {error}", filename=path) from error
        try:
            return cls(archive, member, name=options.name)
        except (KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
            archive.close()
            raise StorageNotFoundError(f"'{path}' has no readable '{member}': {error}") from error

    def size(self) -> int:
        """The member's length in bytes."""
        return self._size

    def name(self) -> str:
        """The URL that opens it again."""
        return self._name

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        """Fill every buffer; what lies past the end is zeroes."""
        try:
            with self._lock:
                self._member.seek(min(offset, self._size))
                for buffer in buffers:
                    view = memoryview(buffer)
                    done = 0
                    while done < len(view) and (data := self._member.read(len(view) - done)):
                        view[done : done + len(data)] = data
                        done += len(data)
                    view[done:] = bytes(len(view) - done)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise StorageError(f"'{self._name}' cannot be read at {offset}: {error}") from error

    def close(self) -> None:
        """Called once, when no read is in flight."""
        self._member.close()
        self._archive.close()


@hookimpl
def underlay_storage_backends() -> Iterable[type[BlockingStorage | Storage]]:
    """What this distribution brings."""
    return (ZipMember,)
