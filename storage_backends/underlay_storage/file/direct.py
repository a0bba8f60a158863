"""Direct I/O: past the page cache, for requests that are aligned to what the device wants."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Mapping

import attrs

from underlay.buffers import aligned_buffer
from underlay.errors import OptionError, UnsupportedOperationError

__all__ = ["Alignment", "direct_option", "enable", "set_direct"]

_SMALLEST = 512
_USUAL = 4096
_LARGEST = 64 << 10

# From the manual page of statx.
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_SIZE = 256
_MEM_ALIGN_AT = 0x98
_OFFSET_ALIGN_AT = 0x9C


@attrs.frozen(kw_only=True)
class Alignment:
    """What requests must be multiples of, in bytes."""

    #: Offsets and lengths.
    request: int
    #: Buffer addresses and lengths.
    memory: int


def direct_option(options: Mapping[str, object]) -> bool:
    """Whether the storage options ask for direct I/O.

    Raises:
        OptionError: there is another option, or it has another value.
    """
    for option in options:
        if option != "direct":
            raise OptionError(f"file has no option '{option}'; it has: direct", option=option)
    value = options.get("direct", False)
    if isinstance(value, str):
        value = {"on": True, "true": True, "off": False, "false": False}.get(value.lower(), value)
    if isinstance(value, bool):
        return value
    raise OptionError(f"direct is {value!r}; it can be on or off", option="direct")


def set_direct(descriptor: int, *, on: bool) -> None:
    """Switch direct I/O on or off for an open file.

    Raises:
        OSError: the filesystem has none.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
    fcntl.fcntl(descriptor, fcntl.F_SETFL, wanted)


def enable(descriptor: int, path: str) -> Alignment:
    """Switch direct I/O on, and find out what it wants, by asking or by reading.

    Raises:
        UnsupportedOperationError: it is impossible here.
    """
    try:
        set_direct(descriptor, on=True)
    except OSError as error:
        raise UnsupportedOperationError(
            f"'{path}': its filesystem has no direct I/O; open it without direct=True"
        ) from error
    alignment = _asked(descriptor) or _tried(descriptor)
    if alignment is None:
        raise UnsupportedOperationError(
            f"'{path}': no alignment up to {_LARGEST} bytes satisfies direct I/O; "
            "open it without direct=True"
        )
    return alignment


def _asked(descriptor: int) -> Alignment | None:
    """What the kernel says (Linux 6.1 and later, on filesystems that tell)."""
    import ctypes

    try:
        statx = ctypes.CDLL(None).statx
    except (OSError, AttributeError):
        return None
    facts = ctypes.create_string_buffer(_STATX_SIZE)
    if statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, facts):
        return None
    known = _number(facts.raw, 0) & _STATX_DIOALIGN
    memory = _number(facts.raw, _MEM_ALIGN_AT)
    request = _number(facts.raw, _OFFSET_ALIGN_AT)
    if not known or not memory or not request:
        return None
    return Alignment(request=request, memory=memory)


def _number(raw: bytes, at: int) -> int:
    import sys

    return int.from_bytes(raw[at : at + 4], sys.byteorder)


def _tried(descriptor: int) -> Alignment | None:
    """The smallest alignment with which data can be read; the usual one if there are none."""
    try:
        # A read in a hole succeeds with any alignment: it says nothing.
        data = os.lseek(descriptor, 0, os.SEEK_DATA)
    except OSError:
        data = 0
    memory = aligned_buffer(_LARGEST)
    size = _SMALLEST
    while size <= _LARGEST:
        try:
            if os.preadv(descriptor, (memory[:size],), data & -size) == 0:
                return Alignment(request=_USUAL, memory=_USUAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                return Alignment(request=_USUAL, memory=_USUAL)
            size *= 2
        else:
            return Alignment(request=size, memory=size)
    return None
