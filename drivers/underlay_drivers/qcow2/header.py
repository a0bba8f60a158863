"""The header of a qcow2 image: bytes to a frozen value, and back. Pure.

``Header.unpack`` only takes apart; whether what it finds makes sense says ``validation``. What this
driver does not know (additional fields, extensions, feature bits) is kept and written back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, cast

import attrs

from underlay.errors import (
    CorruptImageError,
    InvalidImageError,
    LimitExceededError,
    UnsupportedFeatureError,
)
from underlay_drivers.qcow2 import layout

__all__ = ["BitmapsExtension", "Extension", "Header", "IncompleteHeaderError", "text"]


class IncompleteHeaderError(InvalidImageError):
    """The header area reaches beyond the bytes at hand; ``needed`` bytes hold all of it."""

    details: ClassVar[tuple[str, ...]] = ("needed",)

    def __init__(self, needed: int) -> None:
        super().__init__(f"The qcow2 header area needs the first {needed} bytes of the image")
        self.needed = needed


def text(name: bytes) -> str:
    """A name as stored, with surrogates for what is no UTF-8."""
    return name.decode("utf-8", "surrogateescape")


@attrs.frozen
class Extension:
    """One header extension; ``data`` without its padding."""

    type: int
    data: bytes


@attrs.frozen(kw_only=True)
class BitmapsExtension:
    """Where the bitmap directory is. Offsets and sizes are host bytes."""

    nb_bitmaps: int
    reserved: int
    directory_size: int
    directory_offset: int

    @classmethod
    def unpack(cls, data: bytes) -> BitmapsExtension | None:
        """The extension's fields, or None if it has not the one length that it can have."""
        if len(data) != layout.BITMAPS.size:
            return None
        count, reserved, size, offset = layout.BITMAPS.unpack(data)
        return cls(
            nb_bitmaps=count, reserved=reserved, directory_size=size, directory_offset=offset
        )

    def pack(self) -> bytes:
        """The extension's data."""
        return layout.BITMAPS.pack(
            self.nb_bitmaps, self.reserved, self.directory_size, self.directory_offset
        )


@attrs.frozen(kw_only=True)
class Header:
    """Every field of the header, under the specification's names. Offsets are host bytes."""

    version: int
    backing_file_offset: int = 0
    backing_file_size: int = 0
    cluster_bits: int
    #: The virtual disk's, in bytes.
    size: int
    crypt_method: int = 0
    #: Entries.
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = layout.REFCOUNT_ORDER_V2
    header_length: int
    #: Bytes 104 to ``header_length``: the compression type, and whatever the future has added.
    additional: bytes = b""
    #: In their order, without the end marker.
    extensions: tuple[Extension, ...] = ()
    #: As stored; empty where there is none.
    backing_name: bytes = b""

    # -- bytes to value

    @classmethod
    def unpack(cls, data: bytes, *, name: str = "") -> Header:
        """Take the fixed fields apart, and judge none of them but the version.

        Raises:
            InvalidImageError: no header: too short, or another signature.
            UnsupportedFeatureError: another version.
        """
        where = f"'{name}'" if name else "The image"
        if data[:4] != layout.MAGIC:
            raise InvalidImageError(
                f"{where} is no qcow2 image: it does not start with 'QFI\\xfb'", not_in="qcow2"
            )
        if len(data) < layout.HEADER_V2_LENGTH:
            raise InvalidImageError(f"{where} is cut: {len(data)} bytes hold no qcow2 header")
        fields = layout.HEADER_V2.unpack_from(data)
        version = fields[1]
        if version not in layout.VERSIONS:
            raise UnsupportedFeatureError(
                f"{where} is a qcow2 image of version {version}; only versions 2 and 3 are known",
                feature=f"qcow2 version {version}",
            )
        third: tuple[int, ...] = (0, 0, 0, layout.REFCOUNT_ORDER_V2, layout.HEADER_V2_LENGTH)
        if version > 2:  # noqa: PLR2004 (a version is its own best name)
            if len(data) < layout.HEADER_V3_LENGTH:
                raise InvalidImageError(f"{where} is cut: {len(data)} bytes hold no qcow2 header")
            third = layout.HEADER_V3.unpack_from(data, layout.HEADER_V2_LENGTH)
        return cls(
            version=version,
            backing_file_offset=fields[2],
            backing_file_size=fields[3],
            cluster_bits=fields[4],
            size=fields[5],
            crypt_method=fields[6],
            l1_size=fields[7],
            l1_table_offset=fields[8],
            refcount_table_offset=fields[9],
            refcount_table_clusters=fields[10],
            nb_snapshots=fields[11],
            snapshots_offset=fields[12],
            incompatible_features=third[0],
            compatible_features=third[1],
            autoclear_features=third[2],
            refcount_order=third[3],
            header_length=third[4],
            additional=data[layout.HEADER_V3_LENGTH : third[4]] if version > 2 else b"",  # noqa: PLR2004
        )

    def with_extensions(
        self, data: bytes, *, name: str = ""
    ) -> tuple[Header, CorruptImageError | None]:
        """This header with the extensions behind it in ``data``, and what is wrong with them.

        ``data`` are the image's first bytes. Version 2 has extensions too, where the backing file's
        name leaves room. Needs valid ``cluster_bits`` and ``header_length``.

        Raises:
            IncompleteHeaderError: they reach beyond ``data``.
        """
        found: list[Extension] = []
        problem = None
        try:
            for extension in _extensions(self, data, name):
                found.append(extension)  # noqa: PERF402 (what stands before the damage is wanted)
        except CorruptImageError as error:
            problem = error
        return attrs.evolve(self, extensions=tuple(found)), problem

    def with_backing_name(self, data: bytes) -> Header:
        """This header with the backing file's name, which lies inside the first cluster.

        Raises:
            IncompleteHeaderError: it lies beyond ``data``.
        """
        if not self.backing_file_offset:
            return self
        end = self.backing_file_offset + self.backing_file_size
        if end > len(data):
            raise IncompleteHeaderError(self.cluster_size)
        return attrs.evolve(self, backing_name=data[self.backing_file_offset : end])

    # -- value to bytes

    def to_bytes(self) -> bytes:
        """The header, its extensions and the backing file's name, which is put right behind them.

        Raises:
            LimitExceededError: it does not fit into a cluster.
        """
        area = self.extension_area()
        backing_offset = self.header_length + len(area) if self.backing_name else 0
        placed = attrs.evolve(
            self, backing_file_offset=backing_offset, backing_file_size=len(self.backing_name)
        )
        fixed = placed.fixed_bytes()
        if self.version > 2:  # noqa: PLR2004
            fixed += self.additional
        packed = b"".join((fixed, area, self.backing_name))
        if len(packed) > self.cluster_size:
            raise LimitExceededError(
                f"The header with its extensions and backing name takes {len(packed)} bytes, more "
                f"than a cluster has; use larger clusters or shorter names",
                limit="cluster_size",
                value=len(packed),
                allowed=self.cluster_size,
            )
        return packed

    def extension_area(self) -> bytes:
        """The extensions with their padding and the end marker."""
        chunks: list[bytes] = []
        for extension in self.extensions:
            chunks += (layout.EXTENSION.pack(extension.type, len(extension.data)), extension.data)
            chunks.append(bytes(-len(extension.data) % 8))
        chunks.append(layout.EXTENSION.pack(layout.EXTENSION_END, 0))
        return b"".join(chunks)

    def fixed_bytes(self) -> bytes:
        """The fields that every image of the version has, as they are: within one sector."""
        fixed = layout.HEADER_V2.pack(
            layout.MAGIC,
            self.version,
            self.backing_file_offset,
            self.backing_file_size,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        if self.version > 2:  # noqa: PLR2004
            fixed += layout.HEADER_V3.pack(
                self.incompatible_features,
                self.compatible_features,
                self.autoclear_features,
                self.refcount_order,
                self.header_length,
            )
        return fixed

    # -- what the fields say

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def compression_type(self) -> int:
        """0: zlib (raw deflate), 1: zstd."""
        return self.additional[0] if self.additional else 0

    @property
    def refcount_bits(self) -> int:
        """The width of a reference count."""
        return 1 << self.refcount_order

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries have subcluster bitmaps."""
        return bool(self.incompatible_features & layout.EXTENDED_L2)

    @property
    def external_data_file(self) -> bool:
        """Whether guest data lies in a file of its own."""
        return bool(self.incompatible_features & layout.EXTERNAL_DATA_FILE)

    def extension(self, kind: int) -> bytes | None:
        """The data of the first extension of a type, or None."""
        for extension in self.extensions:
            if extension.type == kind:
                return extension.data
        return None

    @property
    def backing_file(self) -> str | None:
        """The backing image's name, or None."""
        return text(self.backing_name) or None

    @property
    def backing_format(self) -> str | None:
        """The format recorded for the backing image, or None."""
        return text(self.extension(layout.EXTENSION_BACKING_FORMAT) or b"") or None

    @property
    def data_file(self) -> str | None:
        """The external data file's name, or None."""
        return text(self.extension(layout.EXTENSION_DATA_FILE) or b"") or None

    @property
    def bitmaps(self) -> BitmapsExtension | None:
        """The bitmaps extension, or None where there is none that can be understood."""
        data = self.extension(layout.EXTENSION_BITMAPS)
        return None if data is None else BitmapsExtension.unpack(data)

    def features(self) -> Iterator[tuple[str, int]]:
        """The kind and the number of every feature bit that is set."""
        masks = (self.incompatible_features, self.compatible_features, self.autoclear_features)
        for kind, mask in zip(layout.FEATURE_KINDS, masks, strict=True):
            for bit in range(64):
                if mask >> bit & 1:
                    yield kind, bit

    def feature_names(self) -> Mapping[tuple[str, int], str]:
        """What the image's own table calls features, by kind and bit; half an entry is none."""
        table = self.extension(layout.EXTENSION_FEATURE_NAMES) or b""
        names: dict[tuple[str, int], str] = {}
        for at in range(0, len(table) - layout.FEATURE_NAME.size + 1, layout.FEATURE_NAME.size):
            kind, bit, name = cast(
                "tuple[int, int, bytes]", layout.FEATURE_NAME.unpack_from(table, at)
            )
            if kind < len(layout.FEATURE_KINDS):
                readable = name.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
                names.setdefault((layout.FEATURE_KINDS[kind], bit), readable)
        return names


def _extensions(header: Header, data: bytes, name: str) -> Iterator[Extension]:
    """Walk the extension area; finite, since each extension takes at least 8 bytes of it."""
    at = header.header_length
    # A name inside the header is found by validation; here it merely must not hide extensions.
    end = header.backing_file_offset or header.cluster_size
    where = f"'{name}': " if name else ""
    count = 0
    while at < end:
        if min(end, at + layout.EXTENSION.size) > len(data):
            raise IncompleteHeaderError(header.cluster_size)
        length = end
        kind = 0
        start = at + layout.EXTENSION.size
        if start <= end:
            kind, length = layout.EXTENSION.unpack_from(data, at)
        count += 1
        if length > end - start or count > layout.EXTENSIONS_MAX:
            what = "too many" if count > layout.EXTENSIONS_MAX else "one that is too long"
            raise CorruptImageError(
                f"{where}among the header extensions is {what} (type {kind:#010x}, {length} bytes, "
                f"at byte {at}); the header is damaged",
                offset=at,
                field="header extension length",
                value=length,
            )
        if kind == layout.EXTENSION_END:
            return
        if start + length > len(data):
            raise IncompleteHeaderError(header.cluster_size)
        yield Extension(kind, bytes(data[start : start + length]))
        at = start + length + (-length % 8)
