"""A new image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from underlay.creating import create_image
from underlay.face import run_blocking
from underlay.gate import ImplicitOpenGate
from underlay.jobs.progress import ProgressCallback, counting
from underlay.limits import Limits
from underlay.sync import SyncFormatAccess
from underlay.targets import Target

__all__ = ["create"]


def create(
    target: Target,
    *,
    format: str = "qcow2",
    size: int | str | None = None,
    overwrite: bool = False,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    progress: ProgressCallback | None = None,
    **format_options: Any,
) -> None:
    """Create an image of ``size`` virtual bytes, and close it again; else as ``underlay.create``.

    ``progress`` counts the bytes that are preallocated, where the format has tables of them and the
    host reserves them as well both times. Cancelled, a new image is removed again.

    Example::

        underlay.jobs.create("new.qcow2", size="10G", cluster_size="128k")

    Raises:
        StorageExistsError: the target exists, and ``overwrite`` was not said.
        OptionError: an option is unknown, or its value is.
    """
    making = create_image(
        target,
        format=format,
        size=size,
        overwrite=overwrite,
        gate=gate,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
        options=format_options,
        progress=counting(progress),
    )
    SyncFormatAccess(run_blocking(making)).close()
