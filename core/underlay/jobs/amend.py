"""Changing what was chosen when an image was created."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from underlay.capabilities import Amendable, offers
from underlay.driver import OptionSpec
from underlay.errors import UnsupportedOperationError
from underlay.face import run_blocking
from underlay.gate import ImplicitOpenGate
from underlay.jobs.progress import Progress, ProgressCallback
from underlay.limits import Limits
from underlay.opening import open_any, open_image, open_without_references
from underlay.option_values import checked_options
from underlay.plugins import registry
from underlay.sync import SyncFormatAccess
from underlay.targets import Target

__all__ = ["amend", "amend_options"]


def amend_options(format: str) -> Mapping[str, OptionSpec]:
    """What can be changed in images of a format.

    Example::

        for name, option in underlay.jobs.amend_options("qcow2").items():
            print(name, option.help)

    Raises:
        UnsupportedOperationError: nothing.
    """
    driver: object = registry().driver(format)
    if not offers(driver, Amendable):
        raise UnsupportedOperationError(
            f"Format driver '{format}' does not support option amendment"
        )
    return driver.amend_options


def amend(
    target: Target,
    options: Mapping[str, object],
    *,
    format: str | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Change options of an image, each one of its format's ``amend_options``; guest data stays.

    Names of other images are only recorded, and nothing that the image names is opened, unless its
    ``size`` is to change: then all is opened that ``gate`` allows, since data elsewhere counts.
    ``progress`` counts tables instead of bytes.

    Example::

        underlay.jobs.amend("disk.qcow2", {"lazy_refcounts": "on", "refcount_bits": 64})

    Raises:
        UnsupportedOperationError: images of this format cannot be amended.
        OptionError: an option is unknown, or its value impossible for this image; it is unchanged.
    """
    given = {name: value for name, value in options.items() if value is not None}
    opening: dict[str, Any] = {
        "writable": True,
        "limits": limits,
        "lock": lock,
        "storage_options": storage_options,
    }
    if "size" not in given:
        core = open_without_references(target, format=format, **opening)
    elif format is None:
        core = open_any(target, gate=gate, **opening)
    else:
        core = open_image(target, format=format, gate=gate, **opening)
    with SyncFormatAccess(run_blocking(core)) as disk:
        known = amend_options(disk.format_name)
        checked = checked_options(given, known, what=f"amending {disk.format_name}")
        disk.capability(Amendable).amend(checked, _counting(progress))


def _counting(progress: ProgressCallback | None) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(Progress(done, total))
