"""How large a new image will be, before it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

from underlay.blocking import open_any, open_image
from underlay.capabilities import Bitmap, BitmapStore, Measurable, Measurement, offers
from underlay.errors import UnsupportedOperationError
from underlay.gate import ImplicitOpenGate
from underlay.jobs.progress import ProgressCallback, counting
from underlay.jobs.runs import runs
from underlay.limits import Limits
from underlay.option_values import checked_options
from underlay.plugins import registry
from underlay.steps import Steps
from underlay.sync import SyncFormatAccess
from underlay.targets import Target
from underlay.units import parse_size

__all__ = ["measure"]

_Source: TypeAlias = "SyncFormatAccess | Target | int"

_SECTOR = 512


def measure(
    source: _Source,
    output_format: str = "raw",
    *,
    options: Mapping[str, Any] | None = None,
    format: str | None = None,
    snapshot: str | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    progress: ProgressCallback | None = None,
) -> Measurement:
    """The host bytes that a new image of ``output_format``, created with ``options``, will need.

    ``source`` is what would be converted: an open disk, or what ``open_any`` can open. An int is
    the size in bytes of a disk that has no data yet. ``snapshot`` measures the source as it was
    then. Nothing is read but tables, and what is compressed is counted as if it were not.

    Example::

        measured = underlay.jobs.measure("disk.qcow2", "qcow2", options={"cluster_size": "2M"})
        print(f"{measured.required} bytes, at most {measured.fully_allocated}")

    Raises:
        UnsupportedOperationError: this format cannot say.
        OptionError: an option is unknown or its value impossible, or the disk too large for it.
        CorruptImageError, StorageError: the source's tables cannot be read.
    """
    if isinstance(source, int):
        driver, checked = _target(output_format, options or {})
        return driver.measure(_whole_sectors(parse_size(source)), checked)
    with _open(
        source,
        format,
        {
            "snapshot": snapshot,
            "gate": gate,
            "limits": limits,
            "lock": lock,
            "storage_options": storage_options,
        },
    ) as disk:
        driver, checked = _target(output_format, options or {})
        steps = Steps(counting(progress), disk.size)
        measured = driver.measure(
            _whole_sectors(disk.size), checked, _data(disk, steps), _bitmaps(disk)
        )
        steps.end()
        return measured


def _target(name: str, options: Mapping[str, Any]) -> tuple[Measurable, dict[str, object]]:
    known = registry().driver(name).create_options
    checked = checked_options(options, known, what=f"measuring {name}")
    driver: object = registry().driver(name)
    if not offers(driver, Measurable):
        raise UnsupportedOperationError(f"Block driver '{name}' does not support size measurement")
    return driver, checked


def _open(
    source: SyncFormatAccess | Target, format_name: str | None, given: dict[str, Any]
) -> AbstractContextManager[SyncFormatAccess]:
    if isinstance(source, SyncFormatAccess):
        return nullcontext(source)
    if given["snapshot"] is None:
        del given["snapshot"]
    if format_name is not None:
        return open_image(source, format=format_name, **given)
    return open_any(source, **given)


def _whole_sectors(size: int) -> int:
    """What other programs take for the disk's size."""
    return size + -size % _SECTOR


def _data(disk: SyncFormatAccess, steps: Steps) -> Iterator[tuple[int, int]]:
    """Where the disk holds anything but what is known to be zeroes."""
    for run in runs(disk, 0, disk.size):
        if run.storage is not None or run.special is not None:
            yield run.start, run.length
        steps.reach(run.end)


def _bitmaps(disk: SyncFormatAccess) -> list[Bitmap] | None:
    store = disk.capability(BitmapStore)
    if store is None or not store.can_have_bitmaps():
        return None
    found: list[Bitmap] = list(store.bitmaps())
    return found
