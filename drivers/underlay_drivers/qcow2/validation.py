"""What must hold in a header before anything else is believed. Pure.

``problems`` finds all that makes an image unusable: opening raises one, inspecting lists them.
``write_obstacles`` finds what does no harm to reading, but would to writing.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from underlay.errors import CorruptImageError, UnderlayError, UnsupportedFeatureError
from underlay.limits import Limits
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Header

__all__ = [
    "Region",
    "check_limits",
    "fatal_problems",
    "metadata_regions",
    "problems",
    "write_obstacles",
]

#: No offset may be so large that adding a table's size to it leaves 63 bits.
_OFFSET_END = 1 << 63


@attrs.frozen
class Region:
    """Host bytes that hold one piece of metadata."""

    what: str
    offset: int
    length: int

    def overlaps(self, other: Region) -> bool:
        """Whether any byte belongs to both."""
        return (
            self.offset < other.offset + other.length and other.offset < self.offset + self.length
        )


def _damage(name: str, what: str, *, offset: int, field: str, value: int) -> CorruptImageError:
    where = f"'{name}': " if name else ""
    return CorruptImageError(
        f"{where}{what}; the header is damaged", offset=offset, field=field, value=value
    )


def fatal_problems(header: Header, name: str) -> Iterator[UnderlayError]:
    """What forbids to read even the extensions: the first cluster's own bounds."""
    bits = header.cluster_bits
    if not layout.CLUSTER_BITS_MIN <= bits <= layout.CLUSTER_BITS_MAX:
        yield _damage(
            name,
            f"cluster_bits is {bits}, and only {layout.CLUSTER_BITS_MIN} to "
            f"{layout.CLUSTER_BITS_MAX} are possible",
            offset=20,
            field="cluster_bits",
            value=bits,
        )
        return
    length = header.header_length
    if header.version > 2 and (  # noqa: PLR2004 (a version is its own best name)
        length < layout.HEADER_V3_LENGTH or length > header.cluster_size or length % 8
    ):
        yield _damage(
            name,
            f"header_length is {length}, which must be a multiple of 8 from "
            f"{layout.HEADER_V3_LENGTH} to {header.cluster_size}",
            offset=100,
            field="header_length",
            value=length,
        )
    if header.backing_file_offset > header.cluster_size:
        yield _damage(
            name,
            f"backing_file_offset is {header.backing_file_offset}, outside the first cluster",
            offset=8,
            field="backing_file_offset",
            value=header.backing_file_offset,
        )
    elif header.backing_file_offset and (
        header.backing_file_size > layout.BACKING_NAME_MAX
        or header.backing_file_offset + header.backing_file_size > header.cluster_size
    ):
        yield _damage(
            name,
            f"the backing file's name has {header.backing_file_size} bytes, more than "
            f"{layout.BACKING_NAME_MAX} or than the first cluster has left",
            offset=16,
            field="backing_file_size",
            value=header.backing_file_size,
        )


def problems(
    header: Header, *, file_size: int, name: str, to_check: bool = False
) -> Iterator[UnderlayError]:
    """What makes an image unusable, in the order of its weight. ``header`` is complete.

    Lengths and offsets are judged against the file, so that nothing is allocated or read that it
    does not hold; ``to_check`` an image, its L1 table may lie beyond.
    """
    yield from _feature_problems(header, name)
    yield from _name_problems(header, name)
    yield from _refcount_table_problems(header, name)
    yield from _snapshot_problems(header, name)
    yield from _l1_problems(header, name)
    if not to_check:
        yield from _l1_misplaced(header, file_size, name)


def _unknown_features(header: Header, name: str) -> Iterator[UnsupportedFeatureError]:
    where = f"'{name}': " if name else ""
    named = header.feature_names()
    names: list[str] = []
    nameless = 0
    for kind, bit in header.features():
        if kind == "incompatible" and not layout.KNOWN_INCOMPATIBLE >> bit & 1:
            if named.get((kind, bit)):
                names.append(named[kind, bit])
            else:
                nameless |= 1 << bit
    if nameless:
        names.append(f"Unknown incompatible feature: {nameless:x}")
    if names:
        feature = ", ".join(names)
        yield UnsupportedFeatureError(
            f"{where}Unsupported qcow2 feature(s): {feature}; open it with a program that has them",
            feature=feature,
        )


def _feature_problems(header: Header, name: str) -> Iterator[UnderlayError]:
    where = f"'{name}': " if name else ""
    yield from _unknown_features(header, name)
    if header.crypt_method:
        method = layout.CRYPT_METHODS.get(header.crypt_method, f"method {header.crypt_method}")
        yield UnsupportedFeatureError(
            f"{where}the image is encrypted ({method}), which is not supported; "
            "decrypt it first with qemu-img convert",
            feature=f"encryption ({method})",
        )
    declared = bool(header.incompatible_features & layout.COMPRESSION_TYPE)
    if header.compression_type not in layout.COMPRESSION_TYPES:
        yield UnsupportedFeatureError(
            f"{where}compression type {header.compression_type} is not known; "
            "open it with a program that has it",
            feature=f"compression type {header.compression_type}",
        )
    elif declared != bool(header.compression_type):
        yield _damage(
            name,
            f"the compression type is {header.compression_type}, and its feature bit "
            f"is {'set' if declared else 'not set'}",
            offset=layout.COMPRESSION_TYPE_OFFSET,
            field="compression_type",
            value=header.compression_type,
        )
    if header.extended_l2 and header.cluster_bits < layout.CLUSTER_BITS_MIN_EXTENDED:
        yield _damage(
            name,
            f"extended L2 entries need clusters of 16 KiB, these have {header.cluster_size} bytes",
            offset=20,
            field="cluster_bits",
            value=header.cluster_bits,
        )
    if header.refcount_order > layout.REFCOUNT_ORDER_MAX:
        yield _damage(
            name,
            f"refcount_order is {header.refcount_order}, more than {layout.REFCOUNT_ORDER_MAX}",
            offset=96,
            field="refcount_order",
            value=header.refcount_order,
        )
    if header.autoclear_features & layout.RAW_EXTERNAL_DATA and not header.external_data_file:
        yield _damage(
            name,
            "the data file is said to be raw, and there is none",
            offset=88,
            field="autoclear_features",
            value=header.autoclear_features,
        )


def _name_problems(header: Header, name: str) -> Iterator[UnderlayError]:
    seen: set[int] = set()
    for extension in header.extensions:
        kind = extension.type
        if kind in layout.EXTENSION_NAMES and kind in seen:
            yield _damage(
                name,
                f"the header extension '{layout.EXTENSION_NAMES[kind]}' stands there twice",
                offset=header.header_length,
                field="header extension type",
                value=kind,
            )
        seen.add(kind)
        if (
            kind == layout.EXTENSION_BACKING_FORMAT
            and len(extension.data) > layout.BACKING_FORMAT_MAX
        ):
            yield _damage(
                name,
                f"the backing file's format name has {len(extension.data)} bytes, more than "
                f"{layout.BACKING_FORMAT_MAX}",
                offset=header.header_length,
                field="header extension length",
                value=len(extension.data),
            )
        if kind == layout.EXTENSION_DATA_FILE and b"\0" in extension.data:
            yield _damage(
                name,
                "the data file's name holds a NUL byte",
                offset=header.header_length,
                field="external data file name",
                value=0,
            )
    if header.backing_file_offset and header.backing_file_offset < header.header_length:
        yield _damage(
            name,
            f"backing_file_offset is {header.backing_file_offset}, inside the header",
            offset=8,
            field="backing_file_offset",
            value=header.backing_file_offset,
        )
    if b"\0" in header.backing_name:
        yield _damage(
            name,
            "the backing file's name holds a NUL byte",
            offset=header.backing_file_offset,
            field="backing file name",
            value=0,
        )


def _refcount_table_problems(header: Header, name: str) -> Iterator[UnderlayError]:
    clusters = header.refcount_table_clusters
    offset = header.refcount_table_offset
    if not 0 < clusters <= layout.REFCOUNT_TABLE_BYTES_MAX >> header.cluster_bits:
        yield _damage(
            name,
            f"the refcount table has {clusters} clusters, none or more than 8 MiB",
            offset=56,
            field="refcount_table_clusters",
            value=clusters,
        )
    elif offset % header.cluster_size or offset + clusters * header.cluster_size > _OFFSET_END:
        yield _damage(
            name,
            f"the refcount table's offset {offset:#x} starts no cluster",
            offset=48,
            field="refcount_table_offset",
            value=offset,
        )


def _snapshot_problems(header: Header, name: str) -> Iterator[UnderlayError]:
    count = header.nb_snapshots
    offset = header.snapshots_offset
    if count > layout.SNAPSHOTS_MAX:
        yield _damage(
            name,
            f"there are {count} snapshots, more than {layout.SNAPSHOTS_MAX}",
            offset=60,
            field="nb_snapshots",
            value=count,
        )
    elif offset % header.cluster_size or offset > _OFFSET_END - layout.SNAPSHOT_TABLE_BYTES_MAX:
        yield _damage(
            name,
            f"the snapshot table's offset {offset:#x} starts no cluster",
            offset=64,
            field="snapshots_offset",
            value=offset,
        )


def _l1_problems(header: Header, name: str) -> Iterator[UnderlayError]:
    entries = header.l1_size
    offset = header.l1_table_offset
    entry_bits = 4 if header.extended_l2 else 3
    covered = entries << (2 * header.cluster_bits - entry_bits)
    if entries * 8 > layout.L1_BYTES_MAX:
        yield _damage(
            name,
            f"the L1 table has {entries} entries, more than 32 MiB",
            offset=36,
            field="l1_size",
            value=entries,
        )
    elif covered < header.size:
        yield _damage(
            name,
            f"the disk has {header.size} bytes, and the L1 table covers {covered}",
            offset=36,
            field="l1_size",
            value=entries,
        )
    elif offset % header.cluster_size or offset > _OFFSET_END - layout.L1_BYTES_MAX:
        yield _damage(
            name,
            f"the L1 table's offset {offset:#x} starts no cluster",
            offset=40,
            field="l1_table_offset",
            value=offset,
        )


def _l1_misplaced(header: Header, file_size: int, name: str) -> Iterator[UnderlayError]:
    entries = header.l1_size
    offset = header.l1_table_offset
    if entries and (not offset or offset + entries * 8 > file_size):
        yield _damage(
            name,
            f"the L1 table at {offset:#x} ({entries} entries) is not inside the file "
            f"of {file_size} bytes",
            offset=40,
            field="l1_table_offset",
            value=offset,
        )


def check_limits(header: Header, limits: Limits, *, name: str) -> None:
    """Judge all that the header itself asks for by what the caller allows.

    Raises:
        LimitExceededError: it asks for more.
    """
    where = f"'{name}': " if name else ""
    names = (header.backing_name, header.extension(layout.EXTENSION_DATA_FILE) or b"")
    bitmaps = header.bitmaps
    limits.check("name", max(map(len, names)), what=f"{where}the longest name in the header")
    for count, what in (
        (header.nb_snapshots, "snapshots"),
        (0 if bitmaps is None else bitmaps.nb_bitmaps, "bitmaps"),
        (len(header.extensions), "header extensions"),
    ):
        limits.check("entries", count, what=f"{where}the number of {what}")
    # The extensions are together smaller than one cluster, and so than the refcount table.
    table = header.refcount_table_clusters << header.cluster_bits
    limits.check("metadata", table, what=f"{where}the size of the refcount table")


def metadata_regions(header: Header) -> tuple[Region, ...]:
    """What the header itself says is metadata, in whole clusters."""
    cluster = header.cluster_size

    def region(what: str, offset: int, length: int) -> Region:
        return Region(what, offset, length + -length % cluster)

    regions = [Region("header", 0, cluster)]
    if header.l1_size:
        regions.append(region("L1 table", header.l1_table_offset, header.l1_size * 8))
    regions.append(
        region(
            "refcount table", header.refcount_table_offset, header.refcount_table_clusters * cluster
        )
    )
    if header.nb_snapshots:
        # At least so long; its entries say how long it really is.
        length = header.nb_snapshots * layout.SNAPSHOT.size
        regions.append(region("snapshot table", header.snapshots_offset, length))
    return tuple(regions)


def write_obstacles(header: Header, *, file_size: int, name: str) -> Iterator[CorruptImageError]:
    """Why the image must not be written, though it can be read."""
    where = f"'{name}': " if name else ""
    if header.incompatible_features & layout.CORRUPT:
        yield CorruptImageError(
            f"{where}the image is marked as corrupt and only opens read-only; repair it first",
            offset=layout.HEADER_V2_LENGTH,
            field="incompatible_features",
            value=header.incompatible_features,
        )
    regions = metadata_regions(header)
    for index, region in enumerate(regions):
        if region.offset + (0 if index == 0 else 1) > file_size:
            yield _damage(
                name,
                f"the {region.what} at {region.offset:#x} lies past the end of the file",
                offset=region.offset,
                field=region.what,
                value=region.offset,
            )
        for other in regions[:index]:
            if region.overlaps(other):
                yield _damage(
                    name,
                    f"the {region.what} at {region.offset:#x} overlaps the {other.what}",
                    offset=region.offset,
                    field=region.what,
                    value=region.offset,
                )
