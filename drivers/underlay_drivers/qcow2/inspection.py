"""Looking at an untrusted image that might not even open: what it asks for, what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from underlay.capabilities import Inspection
from underlay.errors import UnderlayError, UnsupportedFeatureError
from underlay.limits import Limits
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.bitmaps import read_bitmaps
from underlay_drivers.qcow2.dependencies import named_objects
from underlay_drivers.qcow2.description import features, flagged_damage
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.loading import examine, load_table
from underlay_drivers.qcow2.snapshots import read_snapshots
from underlay_drivers.qcow2.tables import Geometry
from underlay_drivers.qcow2.validation import check_limits, metadata_regions, write_obstacles

if TYPE_CHECKING:
    from underlay.handle import StorageHandle

__all__ = ["inspect_image"]

#: Faulty L1 entries are counted up to here, beside the first one.
_COUNTED: Final = 1000


async def inspect_image(image: StorageHandle, limits: Limits) -> Inspection:
    """See ``Inspectable.inspect``.

    Reads the header, the L1 table, and the lists of snapshots and bitmaps.
    """
    damage: list[str] = []
    try:
        header, problems = await examine(image)
    except UnderlayError as error:
        return Inspection(damage=(str(error),))
    unsupported = [problem for problem in problems if isinstance(problem, UnsupportedFeatureError)]
    damage += [str(problem) for problem in problems if problem not in unsupported]
    if not damage:
        damage += await _deeper(image, header, limits)
    if not header.crypt_method and header.extension(layout.EXTENSION_ENCRYPTION) is not None:
        damage.append("There is an encryption header, and the image is not encrypted")
    return Inspection(
        virtual_size=header.size,
        encrypted=bool(header.crypt_method),
        features=features(header),
        references=tuple(named_objects(header)),
        damage=tuple(damage),
    )


async def _deeper(image: StorageHandle, header: Header, limits: Limits) -> list[str]:
    """What is wrong with an image whose header makes sense."""
    name = image.name()
    damage = flagged_damage(header)
    marked = header.incompatible_features & layout.CORRUPT
    damage += [
        str(obstacle)
        for obstacle in write_obstacles(header, file_size=image.size(), name=name)
        if not (marked and obstacle.field == "incompatible_features")
    ]
    for read in (read_snapshots, read_bitmaps):
        try:
            await read(image, header, limits)
        except UnderlayError as error:
            damage.append(str(error))
    try:
        limits.check("virtual_size", header.size, what=f"'{name}': the virtual size")
        check_limits(header, limits, name=name)
        damage += await _l1_damage(image, header, limits)
    except UnderlayError as error:
        damage.append(str(error))
    return damage


async def _l1_damage(image: StorageHandle, header: Header, limits: Limits) -> list[str]:
    geometry = Geometry.of(header)
    metadata = frozenset(
        offset
        for region in metadata_regions(header)
        for offset in range(
            region.offset,
            min(region.offset + region.length, image.size()),
            geometry.cluster_size,
        )
    )
    place = header.l1_table_offset, header.l1_size
    table = await load_table(image, *place, limits, what="the L1 table")
    # Nearly all entries of a table that may have millions are sound, and this tells so at once.
    odd = layout.L1_RESERVED | geometry.cluster_size - 1
    last = image.size() - geometry.cluster_size
    damage: list[str] = []
    others = 0
    for number, entry in enumerate(table):
        host = entry & layout.HOST_OFFSET
        if not entry or not (entry & odd or host > last or host in metadata):
            continue
        fault = geometry.l1_fault(entry, file_size=image.size(), metadata=metadata)
        if fault is None:
            continue
        if not damage:
            guest = number << geometry.l1_shift
            damage.append(f"The L1 entry {entry:#x} of guest offset {guest:#x} {fault}")
        elif others < _COUNTED:
            others += 1
        else:
            break
    if others:
        least = "at least " if others == _COUNTED else ""
        damage[0] += f"; and so do {least}{others} other L1 entries"
    return damage
