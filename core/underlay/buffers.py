"""Buffers: flat views, lists of them cut to size, and memory that is aligned for direct I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "AnyBuffer",
    "address_of",
    "aligned_buffer",
    "copy_into",
    "fill_zero",
    "flat",
    "flat_writable",
    "join",
    "split_at",
    "total",
]

#: Anything with the buffer protocol: bytes, bytearray, memoryview, array, mmap, a numpy array.
AnyBuffer: TypeAlias = "Buffer | bytes | bytearray | memoryview"

_ZERO_CHUNK = 1 << 20


def aligned_buffer(size: int) -> memoryview:
    """A writable buffer of ``size`` zero bytes that starts on a page, as direct I/O needs it."""
    import mmap

    return memoryview(mmap.mmap(-1, max(size, 1)))[:size]


def flat(buffer: AnyBuffer) -> memoryview:
    """A view of the bytes of any C-contiguous buffer, whatever its items are.

    Raises:
        TypeError: it is no buffer, or not contiguous.
    """
    view = memoryview(buffer)
    if view.format == "B" and view.ndim == 1 and view.c_contiguous:
        return view
    if not view.c_contiguous:
        raise TypeError("the buffer is not contiguous")
    if not view.nbytes:
        return memoryview(b"")
    try:
        return view.cast("B")
    except ValueError:
        # Items that a cast does not know: another byte order, a structure.
        from pickle import PickleBuffer

        return PickleBuffer(view).raw()


def flat_writable(buffer: AnyBuffer) -> memoryview:
    """As ``flat``, for a buffer that is to be filled.

    Raises:
        TypeError: also if it is read-only.
    """
    view = flat(buffer)
    if view.readonly and view.nbytes:
        raise TypeError("the buffer is read-only and cannot be read into")
    return view


def total(buffers: Sequence[memoryview | bytearray | bytes]) -> int:
    """The bytes in a list of flat buffers."""
    return sum(map(len, buffers))


def split_at(views: Sequence[memoryview], length: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first ``length`` bytes of a list of flat views, and the rest."""
    head: list[memoryview] = []
    for index, view in enumerate(views):
        if length < len(view):
            tail = [view[length:], *views[index + 1 :]]
            if length:
                head.append(view[:length])
            return head, tail
        head.append(view)
        length -= len(view)
    return head, []


def copy_into(views: Iterable[memoryview | bytearray], data: memoryview) -> None:
    """Fill a list of flat writable views from the start of ``data``."""
    at = 0
    for view in views:
        view[:] = data[at : at + len(view)]
        at += len(view)


def join(views: Sequence[memoryview | bytearray | bytes], into: memoryview) -> None:
    """Copy a list of flat views one after the other to the start of ``into``."""
    at = 0
    for view in views:
        into[at : at + len(view)] = view
        at += len(view)


def fill_zero(views: Iterable[memoryview]) -> None:
    """Set all bytes of flat writable views to zero."""
    for view in views:
        for at in range(0, len(view), _ZERO_CHUNK):
            chunk = view[at : at + _ZERO_CHUNK]
            chunk[:] = bytes(len(chunk))


def address_of(buffer: memoryview | bytearray | bytes) -> int | None:
    """Where a writable buffer lies in memory, or None for a read-only one."""
    import ctypes

    view = memoryview(buffer)
    if view.readonly or not view.nbytes:
        return None
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
