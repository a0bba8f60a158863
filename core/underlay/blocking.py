"""``underlay``'s functions on the blocking face; ``underlay.aio`` has their awaitable twins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import underlay.creating
import underlay.inspection
import underlay.opening
from underlay.chain import FROM_IMAGE, BackingChoice, DataFileChoice
from underlay.face import run_blocking
from underlay.gate import ImplicitOpenGate
from underlay.inspection import InspectionReport
from underlay.limits import Limits
from underlay.probing import ProbeResult
from underlay.sync import SyncFormatAccess
from underlay.targets import Target

__all__ = ["create", "inspect", "open_any", "open_image", "probe"]


def probe(target: Target, *, storage_options: Mapping[str, object] | None = None) -> ProbeResult:
    return run_blocking(underlay.opening.probe(target, storage_options=storage_options))


def inspect(
    target: Target,
    *,
    limits: Limits | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> InspectionReport:
    return run_blocking(
        underlay.inspection.inspect(target, limits=limits, storage_options=storage_options)
    )


def open_any(
    target: Target,
    *,
    writable: bool = False,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    **format_options: Any,
) -> SyncFormatAccess:
    core = underlay.opening.open_any(
        target,
        writable=writable,
        gate=gate,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
        **format_options,
    )
    return SyncFormatAccess(run_blocking(core))


def open_image(
    target: Target,
    *,
    format: str,
    backing: BackingChoice = FROM_IMAGE,
    data_file: DataFileChoice = FROM_IMAGE,
    snapshot: str | None = None,
    writable: bool = False,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    **format_options: Any,
) -> SyncFormatAccess:
    core = underlay.opening.open_image(
        target,
        format=format,
        backing=backing,
        data_file=data_file,
        snapshot=snapshot,
        writable=writable,
        gate=gate,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
        **format_options,
    )
    return SyncFormatAccess(run_blocking(core))


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
) -> SyncFormatAccess:
    core = underlay.creating.create(
        target,
        format=format,
        size=size,
        overwrite=overwrite,
        gate=gate,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
        **format_options,
    )
    return SyncFormatAccess(run_blocking(core))


# Each says what its twin says.
probe.__doc__ = underlay.opening.probe.__doc__
inspect.__doc__ = underlay.inspection.inspect.__doc__
open_any.__doc__ = underlay.opening.open_any.__doc__
open_image.__doc__ = underlay.opening.open_image.__doc__
create.__doc__ = underlay.creating.create.__doc__
