"""What ``info`` tells of a qcow2 image, under the names that qemu-img's JSON has for it."""

from __future__ import annotations

from collections.abc import Sequence

from underlay.capabilities import Bitmap, Feature, ImageDescription, Snapshot
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Header

__all__ = ["bitmap_warnings", "describe", "features", "flagged_damage"]


def features(header: Header) -> tuple[Feature, ...]:
    """Every feature bit that is set; unknown ones under the name that the image's own table has."""
    named = header.feature_names()
    return tuple(
        Feature(
            name=layout.FEATURE_NAMES.get(key)
            or named.get(key)
            or f"unknown {key[0]} bit {key[1]}",
            kind=key[0],
            bit=key[1],
            supported=key in layout.FEATURE_NAMES,
        )
        for key in header.features()
    )


def flagged_damage(header: Header) -> list[str]:
    """What is wrong by the header's own flags, one sentence each."""
    damage: list[str] = []
    if header.incompatible_features & layout.CORRUPT:
        damage.append("The image is marked as corrupt: repair it before trusting its data")
    if header.incompatible_features & layout.DIRTY:
        damage.append("The image was not closed properly: its reference counts may be stale")
    if header.autoclear_features & layout.RAW_EXTERNAL_DATA and header.backing_file is not None:
        damage.append("The data file is said to be raw, and there is a backing image beneath it")
    return damage


def bitmap_warnings(header: Header) -> list[str]:
    """What the flags say about bitmaps; the disk itself is none the worse for it."""
    consistent = header.autoclear_features & layout.BITMAPS_CONSISTENT
    present = header.extension(layout.EXTENSION_BITMAPS) is not None
    if present and not consistent:
        return ["The bitmaps are out of date: a program changed the image without them"]
    if consistent and not present:
        return ["The image is said to have bitmaps, and there are none"]
    return []


def describe(
    header: Header,
    *,
    snapshots: Sequence[Snapshot],
    bitmaps: Sequence[Bitmap],
    warnings: Sequence[str],
) -> ImageDescription:
    """The description of an image with this header."""
    return ImageDescription(
        cluster_size=header.cluster_size,
        dirty=bool(header.incompatible_features & layout.DIRTY),
        corrupt=bool(header.incompatible_features & layout.CORRUPT),
        backing_name=header.backing_file,
        backing_format=header.backing_format,
        data_file=header.data_file,
        snapshots=tuple(snapshots),
        bitmaps=tuple(bitmaps),
        features=features(header),
        warnings=tuple(warnings),
        details=_details(header, bitmaps),
    )


def _details(header: Header, bitmaps: Sequence[Bitmap]) -> dict[str, object]:
    """``format-specific.data``, in the order in which qemu-img prints it."""
    version_2 = header.version == 2  # noqa: PLR2004 (a version is its own best name)
    details: dict[str, object] = {
        "compat": "0.10" if version_2 else "1.1",
        "compression-type": layout.COMPRESSION_TYPES[header.compression_type],
    }
    if version_2:
        details["refcount-bits"] = header.refcount_bits
        return details
    details["lazy-refcounts"] = bool(header.compatible_features & layout.LAZY_REFCOUNTS)
    if bitmaps:
        details["bitmaps"] = [
            {
                "flags": [
                    *(["in-use"] if bitmap.in_use else []),
                    *(["auto"] if bitmap.auto else []),
                ],
                "name": bitmap.name,
                "granularity": bitmap.granularity,
            }
            for bitmap in bitmaps
        ]
    details["refcount-bits"] = header.refcount_bits
    if header.data_file is not None:
        details["data-file"] = header.data_file
    if header.external_data_file:
        details["data-file-raw"] = bool(header.autoclear_features & layout.RAW_EXTERNAL_DATA)
    details["corrupt"] = bool(header.incompatible_features & layout.CORRUPT)
    details["extended-l2"] = header.extended_l2
    return details
