"""Lies in the header: classes 1 to 62."""

from __future__ import annotations

from collections.abc import Callable

from underlay_drivers.qcow2 import layout

from .bases import IMAGE
from .editing import Image
from .recipe import HARMLESS, REFUSED, Reading, Recipe, Rule, Writing

__all__ = ["RECIPES"]

Damage = Callable[[Image], object]

_CLUSTER = 64 << 10
_MIB = 1 << 20
#: Only reading; what it would take to write makes no sense.
_UNWRITABLE = Rule(writing=Writing.REFUSED)

#: A file of the host; one that not even root can write to: whoever is taken in would write there.
_HOST_FILE = b"/proc/version"

#: The offsets of the fields, by the specification's names.
_INCOMPATIBLE, _COMPATIBLE, _AUTOCLEAR = 72, 80, 88


def _field(offset: int, form: str, *values: int) -> Damage:
    return lambda image: image.put(offset, form, *values)


def _incompatible(*bits: int) -> Damage:
    def damage(image: Image) -> None:
        for bit in bits:
            image.set_bit(_INCOMPATIBLE, bit)

    return damage


def _cut(length: int) -> Damage:
    return lambda image: image.data.__delitem__(slice(length, None))


def _both(*steps: Damage) -> Damage:
    def damage(image: Image) -> None:
        for step in steps:
            step(image)

    return damage


def _recipe(
    number: int,
    name: str,
    lie: str,
    damage: Damage,
    *,
    rule: Rule = REFUSED,
    base: str = "plain",
) -> Recipe:
    return Recipe(number=number, name=name, lie=lie, base=base, damage=damage, rule=rule)


_BEGINNING = [
    _recipe(1, "magic", "the magic is that of no format", _field(0, "I", 0x514649FC)),
    _recipe(2, "empty", "the file is empty", _cut(0)),
    _recipe(3, "40-bytes", "the file ends after 40 bytes", _cut(40)),
    _recipe(4, "80-bytes", "the file ends after 80 bytes", _cut(80)),
    _recipe(5, "version-0", "the version is 0", _field(4, "I", 0)),
    _recipe(5, "version-1", "the version is 1", _field(4, "I", 1)),
    _recipe(6, "version-4", "the version is 4", _field(4, "I", 4)),
    *(
        _recipe(number, f"cluster-bits-{bits}", f"cluster_bits is {bits}", _field(20, "I", bits))
        for number, bits in zip(range(7, 13), (0, 8, 22, 31, 63, 2**32 - 1), strict=True)
    ),
]

_SIZE = [
    _recipe(13, "size-2-63", "the virtual size is 2^63", _field(24, "Q", 1 << 63)),
    _recipe(14, "size-2-64", "the virtual size is 2^64 - 1", _field(24, "Q", 2**64 - 1)),
    _recipe(
        15,
        "size-beyond-l1",
        "the virtual size is a byte more than the L1 table covers",
        _field(24, "Q", (512 << 20) + 1),
    ),
    _recipe(
        16,
        "size-odd",
        "the virtual size is no multiple of a sector",
        _field(24, "Q", _MIB + 17),
        rule=HARMLESS,
    ),
    _recipe(17, "size-0", "the virtual size is 0", _field(24, "Q", 0), rule=_UNWRITABLE),
]

_ENCRYPTION = [
    _recipe(18, "crypt-3", "crypt_method is 3, which is none", _field(32, "I", 3)),
    _recipe(
        19, "crypt-luks", "it is encrypted with LUKS and has no LUKS header", _field(32, "I", 2)
    ),
    _recipe(20, "crypt-aes", "it is encrypted with AES", _field(32, "I", 1)),
]

_L1 = [
    _recipe(21, "l1-size-0", "the L1 table has no entries", _field(36, "I", 0)),
    _recipe(22, "l1-size-2-32", "the L1 table has 2^32 - 1 entries", _field(36, "I", 2**32 - 1)),
    _recipe(
        23,
        "l1-size-over-32m",
        "the L1 table is an entry larger than 32 MiB",
        _field(36, "I", (4 << 20) + 1),
    ),
    _recipe(
        24,
        "l1-size-32m",
        "the L1 table has 32 MiB, and ends past the end of the file",
        _field(36, "I", 4 << 20),
    ),
    _recipe(25, "l1-unaligned", "the L1 table starts inside a cluster", _field(40, "Q", 0x30200)),
    _recipe(26, "l1-at-0", "the L1 table is at offset 0", _field(40, "Q", 0)),
    _recipe(
        27, "l1-past-end", "the L1 table starts past the end of the file", _field(40, "Q", 1 << 40)
    ),
    _recipe(28, "l1-at-2-63", "the L1 table is at offset 2^63", _field(40, "Q", 1 << 63)),
]

_REFCOUNTS = [
    _recipe(
        29,
        "reftable-at-0",
        "the refcount table is at offset 0",
        _field(48, "Q", 0),
        rule=_UNWRITABLE,
    ),
    _recipe(
        30,
        "reftable-unaligned",
        "the refcount table starts inside a cluster",
        _field(48, "Q", 0x10200),
    ),
    _recipe(
        31,
        "reftable-past-end",
        "the refcount table starts past the end of the file",
        _field(48, "Q", 1 << 40),
        rule=_UNWRITABLE,
    ),
    _recipe(
        32,
        "reftable-wraps",
        "the refcount table ends past 2^64",
        _field(48, "Q", 2**64 - _CLUSTER),
    ),
    _recipe(33, "reftable-clusters-0", "the refcount table has no clusters", _field(56, "I", 0)),
    _recipe(
        34,
        "reftable-clusters-2-32",
        "the refcount table has 2^32 - 1 clusters",
        _field(56, "I", 2**32 - 1),
    ),
    _recipe(
        35,
        "reftable-over-8m",
        "the refcount table is a cluster larger than 8 MiB",
        _field(56, "I", 129),
    ),
    _recipe(
        36,
        "reftable-is-l1",
        "the refcount table lies where the L1 table does",
        _field(48, "Q", 0x30000),
        rule=_UNWRITABLE,
    ),
    _recipe(
        36,
        "reftable-over-refblock",
        "the refcount table's second cluster is the refcount block",
        _field(56, "I", 2),
        rule=_UNWRITABLE,
    ),
]

_SNAPSHOTS = [
    _recipe(37, "snapshots-2-32", "there are 2^32 - 1 snapshots", _field(60, "I", 2**32 - 1)),
    _recipe(38, "snapshots-65537", "there are 65,537 snapshots", _field(60, "I", 65_537)),
    _recipe(
        39,
        "snapshots-at-0",
        "there is a snapshot, and the table is at offset 0",
        _field(60, "I", 1),
        rule=_UNWRITABLE,
    ),
    _recipe(
        40,
        "snapshots-unaligned",
        "the snapshot table starts inside a cluster",
        _field(60, "IQ", 1, 0x10200),
    ),
    _recipe(
        40,
        "no-snapshots-unaligned",
        "the empty snapshot table starts inside a cluster",
        _field(64, "Q", 0x10200),
    ),
    _recipe(
        41,
        "snapshots-past-end",
        "the snapshot table starts past the end of the file",
        _field(60, "IQ", 1, 1 << 40),
        rule=_UNWRITABLE,
    ),
]

_FEATURES = [
    _recipe(42, "incompatible-5", "it needs feature 5, which nobody knows", _incompatible(5)),
    _recipe(43, "incompatible-63", "it needs feature 63, which nobody knows", _incompatible(63)),
    _recipe(
        44,
        "dirty",
        "it was not closed: its refcounts may be wrong",
        _incompatible(0),
        rule=HARMLESS,
    ),
    _recipe(
        44,
        "dirty-lazy",
        "it was not closed, and keeps refcounts lazily",
        _incompatible(0),
        rule=HARMLESS,
        base="dirty",
    ),
    _recipe(45, "corrupt", "it is marked as corrupt", _incompatible(1), rule=_UNWRITABLE),
    _recipe(
        46,
        "data-file-nameless",
        "its data are in another file, and it does not say in which",
        _incompatible(2),
    ),
    _recipe(
        46,
        "data-file-nul",
        "the data file's name holds a NUL byte",
        lambda image: image.extensions((layout.EXTENSION_DATA_FILE, b"data\0.raw")),
        base="data-file",
    ),
    _recipe(
        46,
        "data-file-missing",
        "there is no data file of the name that it says",
        lambda image: image.extensions((layout.EXTENSION_DATA_FILE, b"none.raw")),
        base="data-file",
    ),
    _recipe(
        46,
        "data-file-itself",
        "it is its own data file",
        lambda image: image.extensions((layout.EXTENSION_DATA_FILE, IMAGE.encode())),
        base="data-file",
    ),
    _recipe(
        46,
        "data-file-absolute",
        "its data file is a file of the host",
        lambda image: image.extensions((layout.EXTENSION_DATA_FILE, _HOST_FILE)),
        base="data-file",
    ),
    _recipe(
        46,
        "data-file-json",
        "its data file is a block device in JSON",
        lambda image: image.extensions(
            (layout.EXTENSION_DATA_FILE, b'json:{"driver":"file","filename":"%b"}' % _HOST_FILE)
        ),
        base="data-file",
    ),
    _recipe(47, "compression-bit", "a compression type is declared, and is 0", _incompatible(3)),
    _recipe(
        48,
        "compression-undeclared",
        "the compression type is zstd, and not declared",
        _field(104, "B", 1),
    ),
    _recipe(
        49,
        "compression-2",
        "the compression type is 2, which is none",
        _both(_incompatible(3), _field(104, "B", 2)),
    ),
    _recipe(
        50,
        "extended-l2-bit",
        "its L2 entries are said to have bitmaps, which they do not have",
        _incompatible(4),
        rule=Rule(reading=Reading.ANY, damaged=(0, 4 * _MIB), writing=Writing.EITHER),
    ),
    _recipe(
        50,
        "extended-l2-small",
        "its L2 entries have bitmaps, for which clusters of 512 bytes are too small",
        _incompatible(4),
        base="small-clusters",
    ),
    _recipe(
        51,
        "compatible-40",
        "it has the compatible feature 40, which nobody knows",
        lambda image: image.set_bit(_COMPATIBLE, 40),
        rule=HARMLESS,
    ),
    _recipe(
        52,
        "autoclear-40",
        "it has the autoclear feature 40, which nobody knows",
        lambda image: image.set_bit(_AUTOCLEAR, 40),
        rule=HARMLESS,
    ),
    _recipe(
        53,
        "bitmaps-bit",
        "its bitmaps are said to be valid, and there are none",
        lambda image: image.set_bit(_AUTOCLEAR, 0),
        rule=HARMLESS,
    ),
    _recipe(
        54,
        "raw-data-bit",
        "its data file is said to be raw, and there is none",
        lambda image: image.set_bit(_AUTOCLEAR, 1),
    ),
]

_REST = [
    _recipe(55, "refcount-order-7", "refcount_order is 7", _field(96, "I", 7)),
    _recipe(56, "refcount-order-2-32", "refcount_order is 2^32 - 1", _field(96, "I", 2**32 - 1)),
    _recipe(
        57,
        "refcount-order-3",
        "refcount_order is 3, and the refcounts have 16 bits",
        _field(96, "I", 3),
        rule=_UNWRITABLE,
    ),
    *(
        _recipe(
            number,
            f"header-length-{length}",
            f"header_length is {length}",
            _field(100, "I", length),
        )
        for number, length in (
            (58, 72),
            (59, 103),
            (60, 105),
            (61, _CLUSTER + 8),
            (62, 2**31 - 1),
        )
    ),
]

RECIPES: list[Recipe] = [
    *_BEGINNING,
    *_SIZE,
    *_ENCRYPTION,
    *_L1,
    *_REFCOUNTS,
    *_SNAPSHOTS,
    *_FEATURES,
    *_REST,
]
