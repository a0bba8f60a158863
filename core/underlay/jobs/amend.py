"""Changing what was chosen when an image was created."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Unpack

from underlay.capabilities import Amendable, offers
from underlay.driver import OptionSpec
from underlay.errors import UnsupportedOperationError
from underlay.gate import ImplicitOpenGate
from underlay.jobs.opened import OpeningAlone, Source, opened, opened_alone
from underlay.jobs.progress import ProgressCallback, counting
from underlay.limits import Limits
from underlay.option_values import checked_options
from underlay.plugins import registry
from underlay.sync import SyncFormatAccess

__all__ = ["amend", "amend_options", "opened_to_amend"]


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


def opened_to_amend(
    target: Source,
    options: Mapping[str, object],
    *,
    gate: ImplicitOpenGate | None = None,
    **opening: Unpack[OpeningAlone],
) -> AbstractContextManager[SyncFormatAccess]:
    """The disk, with what it lies upon where these options make that count."""
    if "size" in options:
        return opened(target, writable=True, gate=gate, **opening)
    return opened_alone(target, writable=True, **opening)


def amend(
    target: Source,
    options: Mapping[str, object],
    *,
    format: str | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    format_options: Mapping[str, object] | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Change options of an image, each one of its format's ``amend_options``; guest data stays.

    Names of other images are only recorded, and nothing that the image names is opened, unless its
    ``size`` is to change: then all is opened that ``gate`` allows, since data elsewhere counts.
    ``progress`` counts tables instead of bytes. Cancelled, it has made some of the changes, each of
    them wholly.

    Example::

        underlay.jobs.amend("disk.qcow2", {"lazy_refcounts": "on", "refcount_bits": 64})

    Raises:
        UnsupportedOperationError: images of this format cannot be amended.
        OptionError: an option is unknown, or its value impossible for this image; it is unchanged.
    """
    given = {name: value for name, value in options.items() if value is not None}
    opening: OpeningAlone = {
        "format": format,
        "limits": limits,
        "lock": lock,
        "storage_options": storage_options,
        "format_options": format_options,
    }
    with opened_to_amend(target, given, gate=gate, **opening) as disk:
        known = amend_options(disk.format_name)
        checked = checked_options(given, known, what=f"amending {disk.format_name}")
        disk.capability(Amendable).amend(checked, counting(progress))
