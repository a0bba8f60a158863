"""The bitmap directory: which dirty bitmaps there are, and where the table of each one is."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import attrs

from underlay.capabilities import Bitmap
from underlay.errors import (
    ConflictError,
    CorruptImageError,
    OptionError,
    UnsupportedOperationError,
)
from underlay.limits import Limits
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import BitmapsExtension, Header, text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from underlay.handle import StorageHandle
    from underlay_drivers.qcow2.dependencies import Dependencies

__all__ = ["BitmapDirectory", "BitmapEntry", "KeptDirectory", "read_bitmaps"]


@attrs.frozen(kw_only=True)
class BitmapEntry:
    """One entry of the directory, under the specification's names; ``name`` as stored."""

    bitmap_table_offset: int
    bitmap_table_size: int
    flags: int
    type: int
    granularity_bits: int
    extra: bytes
    name: bytes

    @classmethod
    def unpack(cls, data: bytes, at: int) -> tuple[BitmapEntry, int]:
        """The entry at ``at``, and where the next one starts.

        Raises:
            ValueError: it is cut, or its fields make no sense.
        """
        start = at + layout.BITMAP.size
        if start > len(data):
            raise ValueError("is cut")
        offset, size, flags, kind, bits, name_size, extra_size = layout.BITMAP.unpack_from(data, at)
        names = start + extra_size
        end = names + name_size
        if end > len(data):
            raise ValueError("is cut")
        entry = cls(
            bitmap_table_offset=offset,
            bitmap_table_size=size,
            flags=flags,
            type=kind,
            granularity_bits=bits,
            extra=data[start:names],
            name=data[names:end],
        )
        entry._check()
        return entry, end + -(end - at) % 8

    def _check(self) -> None:
        if self.type != layout.DIRTY_TRACKING:
            raise ValueError(f"is of the unknown type {self.type}")
        if self.granularity_bits not in layout.GRANULARITY_BITS:
            raise ValueError(f"has the impossible granularity 2^{self.granularity_bits}")
        if not 0 < len(self.name) <= layout.BITMAP_NAME_MAX:
            raise ValueError(f"has a name of {len(self.name)} bytes")
        if self.flags & ~layout.BITMAP_FLAGS:
            raise ValueError(f"has unknown flags ({self.flags:#x})")
        if self.bitmap_table_size > layout.L1_BYTES_MAX // 8:
            raise ValueError(f"has a table of {self.bitmap_table_size} entries")

    def pack(self) -> bytes:
        """The entry as it stands in the directory, with its padding."""
        fixed = layout.BITMAP.pack(
            self.bitmap_table_offset,
            self.bitmap_table_size,
            self.flags,
            self.type,
            self.granularity_bits,
            len(self.name),
            len(self.extra),
        )
        packed = fixed + self.extra + self.name
        return packed + bytes(-len(packed) % 8)

    @property
    def packed_size(self) -> int:
        """How many bytes that are."""
        return layout.BITMAP.size + len(self.extra) + len(self.name) + 7 & -8

    def usable(self) -> BitmapEntry:
        """This entry, of a bitmap whose content may be used.

        Raises:
            ConflictError: it was not saved properly.
            UnsupportedOperationError: it has extra data, and means nobody knows what.
        """
        if self.flags & layout.BITMAP_IN_USE:
            error = ConflictError(f"Bitmap '{text(self.name)}' is inconsistent and cannot be used")
            error.add_note("Try block-dirty-bitmap-remove to delete this bitmap from disk")
            raise error
        if self.extra and not self.flags & layout.BITMAP_EXTRA_COMPATIBLE:
            raise UnsupportedOperationError(
                f"Bitmap '{text(self.name)}' has extra data that only its maker understands; leave "
                "it to him, or remove it"
            )
        return self

    def public(self) -> Bitmap:
        """The bitmap for people."""
        return Bitmap(
            name=text(self.name),
            granularity=1 << self.granularity_bits,
            in_use=bool(self.flags & layout.BITMAP_IN_USE),
            auto=bool(self.flags & layout.BITMAP_AUTO),
        )


@attrs.frozen(eq=False)
class BitmapDirectory:
    """All entries in their order. Looking one up takes no longer where there are many."""

    entries: tuple[BitmapEntry, ...]
    #: Where each of them starts, and where the last one ends: bytes from the directory's start.
    places: Sequence[int]
    _numbers: Mapping[bytes, int]

    @classmethod
    def of(cls, entries: Iterable[BitmapEntry]) -> BitmapDirectory:
        """The directory that has these entries."""
        listed = tuple(entries)
        return cls(
            listed,
            list(accumulate((entry.packed_size for entry in listed), initial=0)),
            {entry.name: number for number, entry in enumerate(listed)},
        )

    def find(self, name: str) -> int:
        """The number of the entry of this name.

        Raises:
            OptionError: there is none.
        """
        number = self._numbers.get(name.encode("utf-8", "surrogateescape"))
        if number is None:
            raise OptionError(f"Dirty bitmap '{name}' not found", option="name")
        return number

    def replaced(self, field: str, values: Mapping[int, int]) -> BitmapDirectory:
        """The same with other values of a field of the entries of these numbers."""
        entries = list(self.entries)
        for number, value in values.items():
            changes: dict[str, Any] = {field: value}
            entries[number] = attrs.evolve(entries[number], **changes)
        return BitmapDirectory(tuple(entries), self.places, self._numbers)


class KeptDirectory:
    """The directory of an open image: read once, and anew where the image has another.

    Whoever changes it says so. What is kept goes with one header; if there is another one, for
    whatever reason, it is read anew.
    """

    __slots__ = ("_kept", "_limits", "_state")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        #: Another object after each change in place, so that nobody keeps what he read before it.
        self._state = object()
        self._kept: tuple[object, Header, BitmapDirectory] | None = None

    async def read(self, disk: Dependencies) -> BitmapDirectory:
        """What the image says now. Raises as ``read_bitmaps`` does."""
        while True:
            state, header, kept = self._state, disk.header, self._kept
            if kept is not None and kept[0] is state and kept[1] is header:
                return kept[2]
            entries = await read_bitmaps(disk.image, header, self._limits)
            self._kept = state, header, BitmapDirectory.of(entries)

    def keep(self, disk: Dependencies, directory: BitmapDirectory) -> None:
        """The image has this one from now on."""
        state = object()
        self._kept, self._state = (state, disk.header, directory), state

    def forget(self) -> None:
        """Nobody knows which one the image has."""
        self._state = object()


async def read_bitmaps(
    image: StorageHandle, header: Header, limits: Limits
) -> tuple[BitmapEntry, ...]:
    """The whole directory; empty where its autoclear bit says that it is out of date.

    Raises:
        CorruptImageError: the extension or the directory makes no sense.
        LimitExceededError: it, or a name in it, is larger than ``limits`` allow.
    """
    raw = header.extension(layout.EXTENSION_BITMAPS)
    if raw is None or not header.autoclear_features & layout.BITMAPS_CONSISTENT:
        return ()
    name = image.name()
    extension = BitmapsExtension.unpack(raw)
    if extension is None or extension.reserved:
        raise _damage(name, "the bitmaps extension makes no sense", header.header_length)
    offset, size = extension.directory_offset, extension.directory_size
    if not 0 < extension.nb_bitmaps <= layout.BITMAPS_MAX:
        raise _damage(name, f"there are {extension.nb_bitmaps} bitmaps", header.header_length)
    if (
        offset % header.cluster_size
        or not offset
        or size > layout.BITMAP_DIRECTORY_BYTES_MAX
        or offset + size > image.size()
    ):
        raise _damage(name, f"the bitmap directory ({size} bytes) is not inside the file", offset)
    limits.check("metadata", size, what=f"'{name}': the size of the bitmap directory")
    data = bytes(await image.read_bytes(offset, size))
    entries: list[BitmapEntry] = []
    seen: set[bytes] = set()
    at = 0
    for number in range(extension.nb_bitmaps):
        try:
            entry, after = BitmapEntry.unpack(data, at)
            if entry.name in seen:
                raise ValueError("has the name of another one")  # noqa: TRY301
        except ValueError as error:
            raise _damage(name, f"bitmap {number} {error}", offset + at) from None
        limits.check("name", len(entry.name), what=f"'{name}': the name of bitmap {number}")
        seen.add(entry.name)
        entries.append(entry)
        at = after
    if at != size:
        raise _damage(name, f"the bitmap directory has {size} bytes, and its entries {at}", offset)
    return tuple(entries)


def _damage(name: str, what: str, offset: int) -> CorruptImageError:
    return CorruptImageError(
        f"'{name}': {what}; the bitmaps are lost, the disk is not",
        offset=offset,
        field="bitmap directory",
    )
