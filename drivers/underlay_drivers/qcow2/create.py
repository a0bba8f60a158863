"""Creating an image: the smallest one there can be, which is then grown to its size.

Header, refcount table and first refcount block stand where QEMU puts them, and so does what growing
adds, so that new images of both makers are the same byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs

from underlay.driver import FormatCreateOptions, FormatOpenOptions
from underlay.errors import OptionError
from underlay.gate import Reference, ReferenceKind
from underlay.steps import Steps
from underlay.storage import PreallocateMode
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.counts import Counts
from underlay_drivers.qcow2.header import Extension, Header

if TYPE_CHECKING:
    from underlay_drivers.qcow2.driver import Qcow2

__all__ = [
    "COMPAT",
    "DEFAULT_CLUSTER_SIZE",
    "NewImage",
    "check_backing_name",
    "check_cluster_size",
    "check_size",
    "create_image",
    "creation_facts",
    "feature_names",
    "has_names",
    "new_image",
]

#: Versions by the names that they go by.
COMPAT: Final = {"v2": 2, "0.10": 2, "v3": 3, "1.1": 3}
_COMPRESSION: Final = {name: number for number, name in layout.COMPRESSION_TYPES.items()}
DEFAULT_CLUSTER_SIZE: Final = 65536
#: In smaller clusters QEMU leaves the table of feature names out.
_CLUSTER_SIZE_WITH_NAMES: Final = 8192


def _refuse(what: str, option: str) -> OptionError:
    return OptionError(what, option=option)


@attrs.frozen(kw_only=True)
class NewImage:
    """The options of a new image, made sense of."""

    version: int
    cluster_size: int
    refcount_bits: int
    compression_type: int
    extended_l2: bool
    lazy_refcounts: bool
    data_file: str | None
    data_file_raw: bool
    backing_file: str | None
    backing_fmt: str | None
    preallocation: PreallocateMode

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            OptionError: a value, or a combination of values, is impossible.
        """
        self._check_geometry()
        self._check_version()
        self._check_files()

    def _check_geometry(self) -> None:
        check_cluster_size(self.cluster_size, extended_l2=False)
        bits = self.refcount_bits
        if not 1 <= bits <= 1 << layout.REFCOUNT_ORDER_MAX or bits & (bits - 1):
            raise _refuse(
                "Refcount width must be a power of two and may not exceed 64 bits", "refcount_bits"
            )
        check_cluster_size(self.cluster_size, extended_l2=self.extended_l2)

    def _check_version(self) -> None:
        if self.version > 2:  # noqa: PLR2004 (a version is its own best name)
            return
        level = "compatibility level 1.1 and above (use version=v3 or greater)"
        if self.lazy_refcounts:
            raise _refuse(f"Lazy refcounts only supported with {level}", "lazy_refcounts")
        if self.refcount_bits != 1 << layout.REFCOUNT_ORDER_V2:
            raise _refuse(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                "(use version=v3 or greater)",
                "refcount_bits",
            )
        if self.data_file is not None:
            raise _refuse(f"External data files are only supported with {level}", "data_file")
        if self.extended_l2:
            raise _refuse(f"Extended L2 entries are only supported with {level}", "extended_l2")
        if self.compression_type:
            raise _refuse(
                f"Non-zlib compression type is only supported with {level}", "compression_type"
            )

    def _check_files(self) -> None:
        if self.data_file_raw and self.data_file is None:
            raise _refuse("data-file-raw requires data-file", "data_file_raw")
        if self.backing_file is None:
            if self.backing_fmt is not None:
                raise _refuse("Backing format cannot be used without backing file", "backing_fmt")
            return
        if self.backing_fmt is None:
            raise _refuse("Backing file specified without backing format", "backing_fmt")
        check_backing_name(self.backing_file, self.backing_fmt)
        if self.data_file_raw:
            raise _refuse(
                "Backing file and data-file-raw cannot be used at the same time", "data_file_raw"
            )
        if self.preallocation is not PreallocateMode.OFF and not self.extended_l2:
            raise _refuse(
                "Backing file and preallocation can only be used at the same time if extended_l2 "
                "is on",
                "preallocation",
            )

    def check_size(self, size: int) -> None:
        """Refuse a disk of so many bytes that such an image cannot hold.

        Raises:
            OptionError: it is too large.
        """
        check_size(size, cluster_size=self.cluster_size, extended_l2=self.extended_l2)

    def header(self) -> Header:
        """The header of the smallest such image, whose disk has no bytes."""
        extensions: list[Extension] = []
        if self.backing_fmt is not None:
            extensions.append(Extension(layout.EXTENSION_BACKING_FORMAT, _stored(self.backing_fmt)))
        if self.data_file is not None:
            extensions.append(Extension(layout.EXTENSION_DATA_FILE, _stored(self.data_file)))
        version_3 = self.version > 2  # noqa: PLR2004
        if version_3 and has_names(self.cluster_size):
            extensions.append(Extension(layout.EXTENSION_FEATURE_NAMES, feature_names()))
        incompatible = 0
        if self.data_file is not None:
            incompatible |= layout.EXTERNAL_DATA_FILE
        if self.compression_type:
            incompatible |= layout.COMPRESSION_TYPE
        if self.extended_l2:
            incompatible |= layout.EXTENDED_L2
        additional = bytes((self.compression_type, *bytes(7))) if version_3 else b""
        return Header(
            version=self.version,
            cluster_bits=self.cluster_size.bit_length() - 1,
            size=0,
            l1_size=0,
            l1_table_offset=0,
            refcount_table_offset=self.cluster_size,
            refcount_table_clusters=1,
            incompatible_features=incompatible,
            compatible_features=layout.LAZY_REFCOUNTS if self.lazy_refcounts else 0,
            autoclear_features=layout.RAW_EXTERNAL_DATA if self.data_file_raw else 0,
            refcount_order=self.refcount_bits.bit_length() - 1,
            header_length=layout.HEADER_V3_LENGTH + len(additional)
            if version_3
            else layout.HEADER_V2_LENGTH,
            additional=additional,
            extensions=tuple(extensions),
            backing_name=b"" if self.backing_file is None else _stored(self.backing_file),
        )


def new_image(options: FormatCreateOptions) -> NewImage:
    """The options as they were given.

    Raises:
        OptionError: a value, or a combination of values, is impossible.
    """
    given: Mapping[str, Any] = options.options
    compat = given.get("compat", "v3")
    compression = given.get("compression_type", "zlib")
    if compat not in COMPAT:
        raise _refuse(f"Parameter 'version' does not accept value '{compat}'", "compat")
    if compression not in _COMPRESSION:
        raise _refuse(
            f"Parameter 'compression-type' does not accept value '{compression}'",
            "compression_type",
        )
    image = NewImage(
        version=COMPAT[compat],
        cluster_size=given.get("cluster_size", DEFAULT_CLUSTER_SIZE),
        refcount_bits=given.get("refcount_bits", 1 << layout.REFCOUNT_ORDER_V2),
        compression_type=_COMPRESSION[compression],
        extended_l2=given.get("extended_l2", False),
        lazy_refcounts=given.get("lazy_refcounts", False),
        data_file=given.get("data_file"),
        data_file_raw=given.get("data_file_raw", False),
        backing_file=given.get("backing_file"),
        backing_fmt=given.get("backing_fmt"),
        preallocation=options.preallocation,
    )
    image.check()
    return image


def creation_facts(options: FormatCreateOptions) -> dict[str, object]:
    """See ``FormatDriverInstance.creation_facts``."""
    facts: dict[str, object] = {
        "cluster_size": DEFAULT_CLUSTER_SIZE,
        "extended_l2": False,
        "preallocation": None,
        "compression_type": "zlib",
        "size": options.size,
        "compat": None,
        "backing_file": None,
        "backing_fmt": None,
        "data_file": None,
        "data_file_raw": None,
        "lazy_refcounts": False,
        "refcount_bits": 1 << layout.REFCOUNT_ORDER_V2,
    }
    return facts | dict(options.options)


def check_backing_name(name: str, format_name: str) -> None:
    """Refuse names that no header can hold.

    Raises:
        OptionError: one is too long.
    """
    if len(_stored(name)) > layout.BACKING_NAME_MAX:
        raise _refuse(
            f"The backing file's name has more than {layout.BACKING_NAME_MAX} bytes",
            "backing_file",
        )
    if len(_stored(format_name)) > layout.BACKING_FORMAT_MAX:
        raise _refuse(
            f"The backing format's name has more than {layout.BACKING_FORMAT_MAX} bytes",
            "backing_fmt",
        )


def has_names(cluster_size: int) -> bool:
    """Whether a header in clusters of this size has the table of feature names."""
    return cluster_size >= _CLUSTER_SIZE_WITH_NAMES


def feature_names() -> bytes:
    """The table of feature names that new images get."""
    return b"".join(
        layout.FEATURE_NAME.pack(layout.FEATURE_KINDS.index(kind), bit, name.encode())
        for (kind, bit), name in layout.FEATURE_NAMES.items()
    )


def check_cluster_size(size: int, *, extended_l2: bool) -> None:
    """Refuse clusters of a size that no image has.

    Raises:
        OptionError: they are too small or too large.
    """
    least, most = 1 << layout.CLUSTER_BITS_MIN, 1 << layout.CLUSTER_BITS_MAX
    if not least <= size <= most or size & (size - 1):
        raise _refuse(
            f"Cluster size must be a power of two between {least} and {most >> 10}k",
            "cluster_size",
        )
    least = 1 << layout.CLUSTER_BITS_MIN_EXTENDED
    if extended_l2 and size < least:
        raise _refuse(
            f"Extended L2 entries are only supported with cluster sizes of at least {least} bytes",
            "extended_l2",
        )


def check_size(size: int, *, cluster_size: int, extended_l2: bool) -> None:
    """Refuse a disk of so many bytes where the L1 table would be too large for it.

    Raises:
        OptionError: it is too large.
    """
    entry_bytes = 16 if extended_l2 else 8
    covered = cluster_size * (cluster_size // entry_bytes)
    if -(-size // covered) * 8 > layout.L1_BYTES_MAX:
        raise _refuse(
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            "size",
        )


async def create_image(driver: type[Qcow2], options: FormatCreateOptions) -> None:
    """Write a new image into ``options.storage``, which is empty."""
    image = new_image(options)
    image.check_size(options.size)
    storage = options.storage
    assert storage is not None
    header = image.header()
    cluster = image.cluster_size
    counts = Counts(refcount_bits=image.refcount_bits, cluster_size=cluster)
    block = bytearray(cluster)
    counts.fill(block, 0, 3)
    table = (2 * cluster).to_bytes(8, "big").ljust(cluster, b"\0")
    await storage.write(header.to_bytes().ljust(cluster, b"\0") + table + block, 0)
    preallocation = image.preallocation
    if image.data_file_raw and preallocation is PreallocateMode.OFF:
        preallocation = PreallocateMode.METADATA  # a raw file has no other way to say what is where
    steps = Steps(options.progress, options.size)
    disk = await driver.open(
        FormatOpenOptions(storage=storage, writable=True, limits=options.limits)
    )
    try:
        # What the backing image holds is to show, so it must not be there while the disk grows.
        disk.attach(Reference(kind=ReferenceKind.BACKING, name=""), None)
        if image.data_file is not None:
            name = Reference(kind=ReferenceKind.DATA_FILE, name=image.data_file)
            disk.attach(name, options.data_file)
        if options.size:
            await disk.resize_grow(options.size, preallocation, steps.part(options.size))
        await disk.flush()
        if image.data_file is not None:
            await disk.sync()
        else:
            # Durable at once where that shows nothing: not where an image is published whole, and
            # takes the place of one that is there.
            await storage.barrier()
    finally:
        await disk.close()
    steps.end()


def _stored(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
