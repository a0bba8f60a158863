"""A new image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import underlay.blocking
from underlay.gate import ImplicitOpenGate
from underlay.limits import Limits
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
    **format_options: Any,
) -> None:
    """Create an image of ``size`` virtual bytes, and close it again; else as ``underlay.create``.

    Example::

        underlay.jobs.create("new.qcow2", size="10G", cluster_size="128k")

    Raises:
        StorageExistsError: the target exists, and ``overwrite`` was not said.
        OptionError: an option is unknown, or its value is.
    """
    underlay.blocking.create(
        target,
        format=format,
        size=size,
        overwrite=overwrite,
        gate=gate,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
        **format_options,
    ).close()
