"""The qcow2 format: QEMU's copy-on-write images, versions 2 and 3."""

from __future__ import annotations

from collections.abc import Iterable

from underlay.driver import FormatDriverInstance
from underlay.hookspecs import hookimpl
from underlay_drivers.qcow2.driver import Qcow2

__all__ = ["Qcow2", "underlay_format_drivers"]


@hookimpl
def underlay_format_drivers() -> Iterable[type[FormatDriverInstance]]:
    """The one format of this plug-in."""
    return (Qcow2,)
