"""Checking whether an image is sound, and repairing it. Names are taken, not open disks.

What is checked is the one image: nothing that it names is opened, so no gate is asked. It is opened
for that alone, for which more may be wrong with it than for reading or writing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs

from underlay.capabilities import Checkable, CheckResult, Finding, Repair, Repairable
from underlay.errors import UnsupportedOperationError
from underlay.face import run_blocking
from underlay.limits import Limits
from underlay.opening import open_without_references
from underlay.steps import StepsCallback
from underlay.sync import SyncFormatAccess
from underlay.targets import Target

__all__ = ["check", "repair"]

C = TypeVar("C")


def check(
    target: Target,
    *,
    format: str | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    format_options: Mapping[str, object] | None = None,
    progress: StepsCallback | None = None,
    report: Callable[[Finding], None] | None = None,
) -> CheckResult:
    """See ``underlay.jobs.check``."""
    with _opened(
        target,
        format,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
        format_options=format_options,
    ) as disk:
        ability = _ability(disk, Checkable)
        result: CheckResult = ability.check(progress, report=report)
        return attrs.evolve(result, format=disk.format_name)


def repair(
    target: Target,
    *,
    format: str | None = None,
    leaks_only: bool = False,
    dry_run: bool = False,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    format_options: Mapping[str, object] | None = None,
    progress: StepsCallback | None = None,
    report: Callable[[Finding | Repair], None] | None = None,
) -> CheckResult:
    """See ``underlay.jobs.repair``."""
    with _opened(
        target,
        format,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
        format_options=format_options,
        writable=not dry_run,
    ) as disk:
        ability = _ability(disk, Repairable)
        result: CheckResult = ability.repair(
            leaks_only=leaks_only, dry_run=dry_run, report=report, progress=progress
        )
        return attrs.evolve(result, format=disk.format_name)


def _opened(
    target: Target,
    format_name: str | None,
    *,
    limits: Limits | None,
    lock: bool,
    storage_options: Mapping[str, object] | None,
    format_options: Mapping[str, object] | None,
    writable: bool = False,
) -> SyncFormatAccess:
    core = open_without_references(
        target,
        format=format_name,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
        format_options=format_options,
        to_check=True,
        writable=writable,
    )
    return SyncFormatAccess(run_blocking(core))


def _ability(disk: SyncFormatAccess, kind: type[C]) -> Any:
    found = disk.capability(kind)
    if found is None:
        what = "checked" if kind is Checkable else "repaired"
        raise UnsupportedOperationError(f"{disk.format_name} images cannot be {what}")
    return found
