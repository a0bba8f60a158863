"""What a guest offset is mapped to: the values with which drivers answer *where*.

A driver answers with ``ShallowMapping``: it may say "in the backing image". ``FormatAccess``
follows that through the chain and gives its callers a ``Mapping``, which never does. Every mapping
describes ``length`` guest bytes from the offset that was asked for. They are values for callers:
the hot path of a read makes none (``FormatDriverInstance.locate``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

import attrs

from underlay.storage import AnyStorage

if TYPE_CHECKING:
    from underlay.driver import FormatDriverInstance
    from underlay.handle import StorageHandle

__all__ = ["Backing", "Data", "DiskExtent", "Eof", "Mapping", "ShallowMapping", "Special", "Zero"]

#: ``StorageHandle`` between drivers and the core, the bare storage towards callers.
S = TypeVar("S")


@attrs.frozen
class Data(Generic[S]):
    """The bytes are those at ``offset`` of ``storage``, one to one."""

    storage: S
    #: Host bytes.
    offset: int
    length: int
    #: Whether writing there writes the disk.
    writable: bool

    def __str__(self) -> str:
        name = getattr(self.storage, "name", None)
        return f"{name() if name else '?'}:0x{self.offset:x}/{'rw' if self.writable else 'ro'}"


@attrs.frozen
class Zero:
    """The bytes read as zeroes."""

    length: int
    #: The image says so itself; else nothing is mapped there.
    explicit: bool
    #: Host bytes that the image keeps reserved for the range, where it does; nothing reads them.
    offset: int | None = None

    def __str__(self) -> str:
        return f"<zero:{'explicit' if self.explicit else 'unallocated'}>"


@attrs.frozen
class Backing:
    """The bytes are those at guest ``offset`` of another image, further down the chain.

    ``layer`` may be shorter than ``offset + length``: its missing bytes are zeroes.
    """

    layer: FormatDriverInstance
    offset: int
    length: int
    #: Host bytes that the image above keeps reserved for the range, where it does; nothing reads
    #: them.
    reserved: int | None = None

    def __str__(self) -> str:
        return f"<{self.layer.format_name}:0x{self.offset:x}>"


@attrs.frozen
class Special(Generic[S]):
    """The bytes have to be decoded (a compressed cluster).

    Read ``host_length`` bytes at ``offset`` of ``storage``, give them to ``layer.decode`` with a
    buffer of ``unit`` bytes, and the mapped bytes are ``length`` of it from ``skip`` on.
    """

    layer: FormatDriverInstance
    storage: S
    #: Host bytes.
    offset: int
    host_length: int
    length: int
    #: Decoded bytes before the offset that was asked for.
    skip: int
    #: Bytes that one whole unit decodes to.
    unit: int

    def __str__(self) -> str:
        return f"<special:0x{self.offset:x}+{self.host_length}>"


@attrs.frozen
class Eof:
    """The offset is at or past the end of the disk."""

    length: int = 0

    def __str__(self) -> str:
        return "<eof>"


#: What a driver answers.
ShallowMapping: TypeAlias = "Data[StorageHandle] | Zero | Backing | Special[StorageHandle] | Eof"
#: What ``FormatAccess.get_mapping`` answers: no ``Backing``, and the storages themselves.
Mapping: TypeAlias = "Data[AnyStorage] | Zero | Special[AnyStorage] | Eof"


@attrs.frozen(kw_only=True)
class DiskExtent:
    """A run of a disk, as ``extents()`` lists them: in order, without gaps, through the chain."""

    #: Guest bytes.
    start: int
    length: int
    #: The image of the chain that decides: 0 is the opened one, 1 its backing image, …
    depth: int
    mapping: Mapping
    #: Plain data that lies in a hole of its storage, so that it reads as zeroes.
    hole: bool = False
    #: Zeroes because the image at ``depth`` is shorter than the one above it.
    past_backing: bool = False

    @property
    def is_zero(self) -> bool:
        """Whether the bytes are known to read as zeroes."""
        return self.hole or isinstance(self.mapping, Zero)
