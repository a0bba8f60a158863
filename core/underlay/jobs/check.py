"""Whether an image is sound, and mending it.

The work is in ``underlay.checking``, which needs none of the machinery of the other jobs, so that
``underlay check`` starts quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import underlay.checking
from underlay.capabilities import CheckResult, Finding, Repair
from underlay.jobs.progress import ProgressCallback, counting
from underlay.limits import Limits
from underlay.targets import Target

__all__ = ["check", "repair"]


def check(
    target: Target,
    *,
    format: str | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    format_options: Mapping[str, object] | None = None,
    progress: ProgressCallback | None = None,
    report: Callable[[Finding], None] | None = None,
) -> CheckResult:
    """Check the metadata of an image, which stays as it is, and open nothing that it names.

    ``progress`` counts tables instead of bytes. ``report`` is called with each finding at once; the
    result holds the first thousand, and how many there were.

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
    return underlay.checking.check(
        target,
        format=format,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
        format_options=format_options,
        progress=counting(progress),
        report=report,
    )


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
    progress: ProgressCallback | None = None,
    report: Callable[[Finding | Repair], None] | None = None,
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
    return underlay.checking.repair(
        target,
        format=format,
        leaks_only=leaks_only,
        dry_run=dry_run,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
        format_options=format_options,
        progress=counting(progress),
        report=report,
    )
