"""Checking whether an image is sound, and repairing it. Names are taken, not open disks.

What is checked is the one image: nothing that it names is opened, so no gate is asked. It is opened
for that alone, for which more may be wrong with it than for reading or writing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, Unpack

import attrs

from underlay.capabilities import Checkable, CheckResult, Finding, Repair, Repairable
from underlay.errors import UnsupportedOperationError
from underlay.face import run_blocking
from underlay.jobs.opened import OpeningAlone
from underlay.jobs.progress import ProgressCallback, counting
from underlay.opening import open_without_references
from underlay.sync import SyncFormatAccess
from underlay.targets import Target

__all__ = ["check", "repair"]

C = TypeVar("C")


def check(
    target: Target,
    *,
    progress: ProgressCallback | None = None,
    report: Callable[[Finding], None] | None = None,
    **opening: Unpack[OpeningAlone],
) -> CheckResult:
    """Check the metadata of an image, which stays as it is, and open nothing that it names.

    ``progress`` counts tables instead of bytes. ``report`` is called with each finding at once, of
    qcow2 with the first 100,000; the result holds the first thousand, and how many there were.

    Example::

        result = underlay.jobs.check("disk.qcow2")
        for finding in result.findings:
            print(finding.kind, finding.what, finding.offset)
        assert not result.corruptions

    Raises:
        UnsupportedOperationError: images of this format cannot be checked.
        CorruptImageError: so much is wrong that nothing can be checked.
        LimitExceededError: the image has more clusters than ``limits.metadata`` bytes can count.
    """
    with _opened(target, opening) as disk:
        ability = _ability(disk, Checkable)
        result: CheckResult = ability.check(counting(progress), report=report)
        return attrs.evolve(result, format=disk.format_name)


def repair(
    target: Target,
    *,
    leaks_only: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
    report: Callable[[Finding | Repair], None] | None = None,
    **opening: Unpack[OpeningAlone],
) -> CheckResult:
    """Mend what a check finds, and check again; or with ``dry_run`` say what would be done.

    A crash at any point leaves the image no worse than it was, and so does cancelling it. What
    cannot be mended without guessing is left alone: the result's ``corruptions`` and ``leaks`` are
    what is left. With ``dry_run`` the image is opened read-only, and they are what there is.
    ``leaks_only`` gives lost clusters back and does nothing else. ``progress`` counts tables, once
    for each time that all are gone over.

    Example::

        planned = underlay.jobs.repair("disk.qcow2", dry_run=True)
        for change in planned.repairs:
            print(change.what, change.offset)
        underlay.jobs.repair("disk.qcow2", leaks_only=True)

    Raises:
        UnsupportedOperationError: images of this format cannot be repaired.
        CorruptImageError: so much is wrong that nothing can be mended.
    """
    with _opened(target, opening, writable=not dry_run) as disk:
        result: CheckResult = _ability(disk, Repairable).repair(
            leaks_only=leaks_only, dry_run=dry_run, report=report, progress=counting(progress)
        )
        return attrs.evolve(result, format=disk.format_name)


def _opened(target: Target, opening: OpeningAlone, *, writable: bool = False) -> SyncFormatAccess:
    core = open_without_references(target, to_check=True, writable=writable, **opening)
    return SyncFormatAccess(run_blocking(core))


def _ability(disk: SyncFormatAccess, kind: type[C]) -> Any:
    found = disk.capability(kind)
    if found is None:
        what = "checked" if kind is Checkable else "repaired"
        raise UnsupportedOperationError(f"{disk.format_name} images cannot be {what}")
    return found
