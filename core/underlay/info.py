"""What a disk tells about itself."""

from __future__ import annotations

import os
from collections.abc import Mapping

import attrs

from underlay.capabilities import Describable, ImageDescription, offers
from underlay.driver import FormatDriverInstance
from underlay.errors import UnderlayError, UnsupportedOperationError
from underlay.handle import StorageHandle

__all__ = ["ImageInfo", "describe_image", "host_bytes"]


@attrs.frozen(kw_only=True)
class ImageInfo:
    """One image of a chain: its name, format, sizes (bytes), and what its format says of it."""

    filename: str
    format: str
    virtual_size: int
    #: What the host stores for it, or None where that cannot be told.
    actual_size: int | None
    description: ImageDescription
    #: Facts about the storage, such as ``{"locked": False}``.
    storage: Mapping[str, object]
    #: The full name of the backing file as it would be opened, or None.
    full_backing_name: str | None = None


def host_bytes(storage: StorageHandle) -> int | None:
    """The bytes that the host has allocated for an object, or None where that cannot be told."""
    descriptor = storage.descriptor()
    if descriptor is not None:
        return os.fstat(descriptor).st_blocks * 512
    told = storage.describe().get("actual-size")
    return told if isinstance(told, int) else None


async def describe_image(driver: FormatDriverInstance) -> ImageInfo:
    """Gather it; opens nothing."""
    storages = driver.collect_storage_dependencies()
    if not storages:
        raise UnsupportedOperationError(f"This {driver.format_name} disk lies on no storage")
    storage = storages[0]
    description = ImageDescription()
    describable: object = driver
    if offers(describable, Describable):
        description = await describable.describe()
    return ImageInfo(
        filename=storage.name(),
        format=driver.format_name,
        virtual_size=driver.size(),
        actual_size=host_bytes(storage),
        description=description,
        storage=storage.describe(),
        full_backing_name=_full_name(storage, description.backing_name),
    )


def _full_name(storage: StorageHandle, name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return storage.resolve_relative(name)
    except (UnderlayError, ValueError):
        return name
