"""Whether an image is sound, and mending it.

The work is in ``underlay.checking``, which needs none of the machinery of the other jobs, so that
``underlay check`` starts quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import underlay.checking
from underlay.capabilities import CheckResult, Finding
from underlay.checking import repair
from underlay.jobs.progress import Progress, ProgressCallback
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
    counted: Callable[[int, int], None] | None = None
    if progress is not None:
        counted = _counting(progress)
    return underlay.checking.check(
        target,
        format=format,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
        progress=counted,
        report=report,
    )


def _counting(progress: ProgressCallback) -> Callable[[int, int], None]:
    return lambda done, total: progress(Progress(done, total))
