"""How many host bytes a new image will need: QEMU's own reckoning, to the byte. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from underlay.capabilities import Measurement
from underlay.errors import OptionError
from underlay.storage import PreallocateMode
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.bitmap_data import BitmapShape
from underlay_drivers.qcow2.create import COMPAT, DEFAULT_CLUSTER_SIZE, check_cluster_size

if TYPE_CHECKING:
    from underlay.capabilities import Bitmap

__all__ = ["measure_image"]


def measure_image(
    size: int,
    options: Mapping[str, object],
    data: Iterable[tuple[int, int]] | None,
    bitmaps: Sequence[Bitmap] | None,
) -> Measurement:
    """See ``Measurable.measure``.

    Raises:
        OptionError: a value is impossible, or the disk too large for it.
    """
    geometry = _Geometry.of(options)
    try:
        preallocation = PreallocateMode(options.get("preallocation", PreallocateMode.OFF))
    except ValueError:
        wrong = options["preallocation"]
        raise OptionError(f"invalid parameter value: {wrong}", option="preallocation") from None
    geometry.check_size(size)
    room = _up(size, geometry.cluster_size)
    fully = room + geometry.metadata(room)
    if preallocation in {PreallocateMode.FALLOC, PreallocateMode.FULL}:
        needed = room
    elif data is None:
        needed = 0
    elif "backing_file" in options:
        needed = room  # how much of it the backing image will have nobody knows
    else:
        needed = _touched(data, geometry.cluster_size)
    stored = None
    if bitmaps is not None and geometry.version > 2:  # noqa: PLR2004 (its own best name)
        stored = geometry.bitmaps(size, bitmaps)
    return Measurement(required=fully - room + needed, fully_allocated=fully, bitmaps=stored)


def _up(number: int, unit: int) -> int:
    """The next multiple of a unit."""
    return number + -number % unit


def _touched(data: Iterable[tuple[int, int]], cluster_size: int) -> int:
    """The bytes of all clusters that have data, which comes in order."""
    reached = found = 0
    for start, length in data:
        first = max(start - start % cluster_size, reached)
        reached = max(_up(start + length, cluster_size), reached)
        found += max(reached - first, 0)
    return found


@attrs.frozen(kw_only=True)
class _Geometry:
    """The options that count."""

    version: int
    cluster_size: int
    refcount_bits: int
    extended_l2: bool

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> _Geometry:
        """What the options say.

        Raises:
            OptionError: a value is impossible.
        """
        cluster = options.get("cluster_size", DEFAULT_CLUSTER_SIZE)
        extended = options.get("extended_l2", False)
        check_cluster_size(cluster, extended_l2=extended)
        compat = options.get("compat", "v3")
        if compat not in COMPAT:
            raise OptionError(f"Invalid compatibility level: '{compat}'", option="compat")
        bits = options.get("refcount_bits", 1 << layout.REFCOUNT_ORDER_V2)
        if not 1 <= bits <= 1 << layout.REFCOUNT_ORDER_MAX or bits & (bits - 1):
            raise OptionError(
                "Refcount width must be a power of two and may not exceed 64 bits",
                option="refcount_bits",
            )
        version = COMPAT[compat]
        if version == 2 and bits != 1 << layout.REFCOUNT_ORDER_V2:  # noqa: PLR2004
            raise OptionError(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                "(use compat=1.1 or greater)",
                option="refcount_bits",
            )
        return cls(version=version, cluster_size=cluster, refcount_bits=bits, extended_l2=extended)

    def check_size(self, size: int) -> None:
        """Refuse a disk whose L1 table would be too large.

        Raises:
            OptionError: it is too large.
        """
        covered = self.cluster_size * (self.cluster_size // (16 if self.extended_l2 else 8))
        if -(-size // covered) * 8 > layout.L1_BYTES_MAX:
            raise OptionError(
                "The image size is too large (try using a larger cluster size)", option="size"
            )

    def metadata(self, size: int) -> int:
        """The bytes that a disk of ``size`` bytes takes besides its own, all of it allocated."""
        cluster, entry = self.cluster_size, 16 if self.extended_l2 else 8
        tables = _up(size // cluster * entry, cluster)
        l1 = _up(tables // cluster * 8, cluster)
        return cluster + l1 + tables + self._refcounts((cluster + l1 + tables + size) // cluster)

    def _refcounts(self, clusters: int) -> int:
        """The bytes of a refcount table and blocks that count so many clusters and themselves."""
        per_block = self.cluster_size * 8 // self.refcount_bits
        table = blocks = 0
        while True:
            needed = -(-(clusters + table + blocks) // per_block)
            room = -(-needed * 8 // self.cluster_size)
            if (needed, room) == (blocks, table):
                return (blocks + table) * self.cluster_size
            blocks, table = needed, room

    def bitmaps(self, size: int, bitmaps: Sequence[Bitmap]) -> int:
        """The bytes of the directory, the tables and the bits of all bitmaps."""
        cluster = self.cluster_size
        directory = total = 0
        for bitmap in bitmaps:
            shape = BitmapShape(
                disk_size=size,
                granularity_bits=bitmap.granularity.bit_length() - 1,
                cluster_bits=cluster.bit_length() - 1,
            )
            name = bitmap.name.encode("utf-8", "surrogateescape")
            directory += _up(layout.BITMAP.size + len(name), 8)
            total += _up(shape.length, cluster) + _up(shape.entries * 8, cluster)
        return total + _up(directory, cluster)
