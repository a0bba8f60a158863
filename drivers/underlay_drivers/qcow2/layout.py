"""The on-disk structures of qcow2: constants, masks and formats, each with its section.

Sections are those of the specification, ``docs/interop/qcow2.rst`` in QEMU's repository. All
numbers are big-endian. Nothing here does anything.
"""

from __future__ import annotations

import struct
from typing import Final

# -- "Header"

MAGIC: Final = b"QFI\xfb"
VERSIONS: Final = (2, 3)

#: Bytes 0-71, versions 2 and 3: magic, version, backing_file_offset, backing_file_size,
#: cluster_bits, size, crypt_method, l1_size, l1_table_offset, refcount_table_offset,
#: refcount_table_clusters, nb_snapshots, snapshots_offset.
HEADER_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
#: Bytes 72-103, version 3: incompatible_features, compatible_features, autoclear_features,
#: refcount_order, header_length.
HEADER_V3: Final = struct.Struct(">QQQII")
HEADER_V2_LENGTH: Final = HEADER_V2.size
HEADER_V3_LENGTH: Final = HEADER_V2_LENGTH + HEADER_V3.size

INCOMPATIBLE_FEATURES_OFFSET: Final = 72
AUTOCLEAR_FEATURES_OFFSET: Final = 88

#: "Additional fields": one byte, present where header_length reaches beyond it.
COMPRESSION_TYPE_OFFSET: Final = 104

CLUSTER_BITS_MIN: Final = 9
#: QEMU's limit, and ours: 2 MiB.
CLUSTER_BITS_MAX: Final = 21
#: With extended L2 entries: 32 subclusters of 512 bytes.
CLUSTER_BITS_MIN_EXTENDED: Final = 14

#: Version 2 has no refcount_order field.
REFCOUNT_ORDER_V2: Final = 4
REFCOUNT_ORDER_MAX: Final = 6

BACKING_NAME_MAX: Final = 1023
#: QEMU's limits, and ours.
L1_BYTES_MAX: Final = 32 << 20
REFCOUNT_TABLE_BYTES_MAX: Final = 8 << 20
SNAPSHOTS_MAX: Final = 65_536
SNAPSHOT_TABLE_BYTES_MAX: Final = 64 << 20
SNAPSHOT_EXTRA_MAX: Final = 1 << 10
BITMAPS_MAX: Final = 65_535
BITMAP_DIRECTORY_BYTES_MAX: Final = 64 << 20
BITMAP_NAME_MAX: Final = 1023

#: crypt_method.
CRYPT_METHODS: Final = {0: "none", 1: "AES", 2: "LUKS"}

# -- "Header": feature bits, as masks

DIRTY: Final = 1 << 0
CORRUPT: Final = 1 << 1
EXTERNAL_DATA_FILE: Final = 1 << 2
COMPRESSION_TYPE: Final = 1 << 3
EXTENDED_L2: Final = 1 << 4

LAZY_REFCOUNTS: Final = 1 << 0

BITMAPS_CONSISTENT: Final = 1 << 0
RAW_EXTERNAL_DATA: Final = 1 << 1

#: The names of a feature bit's kind, by the number that the feature name table has for it.
FEATURE_KINDS: Final = ("incompatible", "compatible", "autoclear")
#: What every bit that this driver knows is called, by kind and bit.
FEATURE_NAMES: Final = {
    ("incompatible", 0): "dirty bit",
    ("incompatible", 1): "corrupt bit",
    ("incompatible", 2): "external data file",
    ("incompatible", 3): "compression type",
    ("incompatible", 4): "extended L2 entries",
    ("compatible", 0): "lazy refcounts",
    ("autoclear", 0): "bitmaps",
    ("autoclear", 1): "raw external data",
}
KNOWN_INCOMPATIBLE: Final = DIRTY | CORRUPT | EXTERNAL_DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2

COMPRESSION_TYPES: Final = {0: "zlib", 1: "zstd"}

# -- "Header extensions"

#: Type, length of the data; the data is padded to a multiple of 8.
EXTENSION: Final = struct.Struct(">II")
EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_FEATURE_NAMES: Final = 0x6803F857
EXTENSION_BITMAPS: Final = 0x23852875
EXTENSION_ENCRYPTION: Final = 0x0537BE77
EXTENSION_DATA_FILE: Final = 0x44415441
#: Of our own: a gap to be skipped, there only while a header is rewritten.
EXTENSION_GAP: Final = 0x756E6467
EXTENSION_NAMES: Final = {
    EXTENSION_BACKING_FORMAT: "backing file format",
    EXTENSION_FEATURE_NAMES: "feature name table",
    EXTENSION_BITMAPS: "bitmaps",
    EXTENSION_ENCRYPTION: "full disk encryption header",
    EXTENSION_DATA_FILE: "external data file name",
}
#: As many as a header of ours is allowed to have; the specification knows five.
EXTENSIONS_MAX: Final = 4096
BACKING_FORMAT_MAX: Final = 15

#: "Feature name table": kind, bit, name.
FEATURE_NAME: Final = struct.Struct(">BB46s")
#: "Bitmaps extension": nb_bitmaps, reserved, bitmap_directory_size, bitmap_directory_offset.
BITMAPS: Final = struct.Struct(">IIQQ")

# -- "Host cluster management": refcount table entries

REFCOUNT_BLOCK_OFFSET: Final = 0xFFFF_FFFF_FFFF_FE00

# -- "Cluster mapping": L1 and L2 entries

#: Bits 9-55: where an L2 table or a data cluster starts.
HOST_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
#: Bit 63: the refcount of what the entry points to is exactly one.
COPIED: Final = 1 << 63
#: Bit 62 of an L2 entry.
COMPRESSED: Final = 1 << 62
#: Bit 0 of a standard cluster descriptor, version 3 without extended L2 entries.
ZERO: Final = 1 << 0
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
#: Bits 1-8 and 56-61 of a standard cluster descriptor.
L2_RESERVED: Final = 0x3F00_0000_0000_01FE
#: "Compressed Clusters Descriptor": bits of its offset that no host offset may have.
HOST_OFFSET_LIMIT: Final = 1 << 56
SECTOR: Final = 512

# -- "Extended L2 Entries"

SUBCLUSTERS: Final = 32
SUBCLUSTER_BITS: Final = 5
#: The low half of the bitmap says what is allocated, the high half what reads as zeroes.
ALL_ALLOCATED: Final = (1 << 32) - 1
ALL_ZERO: Final = ALL_ALLOCATED << 32

# -- "Snapshots"

#: l1_table_offset, l1_size, id_str_size, name_size, date_sec, date_nsec, vm_clock_nsec,
#: vm_state_size, extra_data_size.
SNAPSHOT: Final = struct.Struct(">QIHHIIQII")
#: Extra data: vm_state_size, disk_size, icount; each present where the extra data reaches over it.
SNAPSHOT_EXTRA: Final = struct.Struct(">QQQ")
#: Version 3 needs extra data up to the disk size.
SNAPSHOT_EXTRA_V3: Final = 16
NO_ICOUNT: Final = (1 << 64) - 1

# -- "Bitmap directory"

#: bitmap_table_offset, bitmap_table_size, flags, type, granularity_bits, name_size,
#: extra_data_size.
BITMAP: Final = struct.Struct(">QIIBBHI")
BITMAP_IN_USE: Final = 1 << 0
BITMAP_AUTO: Final = 1 << 1
BITMAP_EXTRA_COMPATIBLE: Final = 1 << 2
BITMAP_FLAGS: Final = BITMAP_IN_USE | BITMAP_AUTO | BITMAP_EXTRA_COMPATIBLE
DIRTY_TRACKING: Final = 1
#: Where the flags are in an entry.
BITMAP_FLAGS_OFFSET: Final = 12
#: QEMU's limit, and ours.
BITMAP_BYTES_MAX: Final = 512 << 20
GRANULARITY_BITS: Final = range(9, 32)

# -- "Bitmap table"

#: Of an entry without a host offset: its cluster reads as ones.
BITMAP_ONES: Final = 1
BITMAP_TABLE_RESERVED: Final = 0xFF00_0000_0000_01FE
