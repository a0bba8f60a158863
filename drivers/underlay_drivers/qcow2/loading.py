"""Reading a header and tables: in few requests, and never more than the file holds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from underlay.errors import UnderlayError, UnsupportedFeatureError
from underlay_drivers.qcow2.header import Header, IncompleteHeaderError
from underlay_drivers.qcow2.tables import Table, empty_table, swap
from underlay_drivers.qcow2.validation import fatal_problems, problems

if TYPE_CHECKING:
    from underlay.handle import StorageHandle
    from underlay.limits import Limits
    from underlay_drivers.qcow2.bulk import Words

__all__ = ["examine", "load_header", "load_table", "load_words"]

#: What is read of an image first: in nearly all of them the whole header area.
_HEAD: Final = 64 << 10


async def examine(
    image: StorageHandle, *, to_check: bool = False
) -> tuple[Header, list[UnderlayError]]:
    """The header as far as it can be read, and all that is wrong with it, the weightiest first.

    ``to_check`` an image, less of it must be right.

    Raises:
        InvalidImageError, UnsupportedFeatureError: there is no header of a known version.
    """
    name = image.name()
    file_size = image.size()
    head = bytes(await image.read_bytes(0, _HEAD))
    header = Header.unpack(head[:file_size], name=name)
    fatal = list(fatal_problems(header, name))
    if fatal:
        return header, fatal
    try:
        return _complete(header, head, file_size=file_size, name=name, to_check=to_check)
    except IncompleteHeaderError as more:
        head = bytes(await image.read_bytes(0, more.needed))
        return _complete(header, head, file_size=file_size, name=name, to_check=to_check)


def _complete(
    header: Header, head: bytes, *, file_size: int, name: str, to_check: bool
) -> tuple[Header, list[UnderlayError]]:
    header, extension_problem = header.with_extensions(head, name=name)
    header = header.with_backing_name(head)
    found = list(problems(header, file_size=file_size, name=name, to_check=to_check))
    if extension_problem is not None:
        found.insert(0, extension_problem)
    # A feature that is not known may change what all the rest means.
    found.sort(key=lambda problem: not isinstance(problem, UnsupportedFeatureError))
    return header, found


async def load_header(image: StorageHandle, *, to_check: bool = False) -> Header:
    """The header of an image that can be used, or at least be checked.

    Raises:
        InvalidImageError, UnsupportedFeatureError: it cannot be.
    """
    header, found = await examine(image, to_check=to_check)
    if found:
        raise found[0]
    return header


async def load_table(
    image: StorageHandle, offset: int, entries: int, limits: Limits, *, what: str
) -> Table:
    """A table of 64-bit words that lies inside the file; ``what`` says which.

    Raises:
        LimitExceededError: it is larger than ``limits.metadata``.
    """
    limits.check("metadata", entries * 8, what=f"'{image.name()}': the size of {what}")
    table = empty_table(entries)
    if entries:
        await image.readv((memoryview(table).cast("B"),), offset)
        swap(table)
    return table


async def load_words(image: StorageHandle, offset: int, count: int) -> Words:
    """Some 64-bit words for numpy, no more of them than are known to be allowed."""
    import numpy as np

    words = np.empty(count, np.uint64)
    if count:
        await image.readv((words.data.cast("B"),), offset)
        if sys.byteorder == "little":
            words.byteswap(inplace=True)
    return words
