"""Another size for a disk."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from underlay.errors import OptionError
from underlay.gate import ImplicitOpenGate
from underlay.jobs.opened import Source, opened
from underlay.jobs.progress import ProgressCallback, counting
from underlay.limits import Limits
from underlay.storage import PreallocateMode
from underlay.units import parse_size

__all__ = ["Resized", "resize"]


@attrs.frozen
class Resized:
    """The sizes of the disk, in bytes."""

    before: int
    after: int


def resize(
    source: Source,
    size: int | str,
    *,
    shrink: bool = False,
    preallocation: PreallocateMode | str = PreallocateMode.OFF,
    format: str | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    progress: ProgressCallback | None = None,
) -> Resized:
    """Make a disk ``size`` bytes long: new bytes are zeroes, cut bytes never come back.

    ``shrink`` must be said to make it smaller. ``preallocation`` says what is allocated for the
    bytes that come to it.

    ``progress`` counts the bytes that come or go, as often as they are gone over: in the tables,
    and on the host where space is reserved or given back. Cancelled, a disk that was to grow is as
    it was. One that was to shrink has its old size or the new one, and in that case may keep space
    that nothing needs any more.

    Example::

        resized = underlay.jobs.resize("disk.qcow2", "2G")
        print(resized.after - resized.before)

    Raises:
        OptionError: the disk would get smaller, and ``shrink`` was not said; or preallocation was,
            and it would get smaller.
        UnsupportedOperationError: this image cannot get that size, or be preallocated so.
    """
    wanted = parse_size(size)
    mode = PreallocateMode.parse(preallocation)
    with opened(
        source,
        format=format,
        writable=True,
        gate=gate,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
    ) as disk:
        before = disk.size
        if wanted < before:
            if not shrink:
                raise OptionError(
                    f"The disk has {before} bytes, and would lose all beyond {wanted}; say "
                    "shrink=True if that is wanted",
                    option="shrink",
                )
            if mode is not PreallocateMode.OFF:
                raise OptionError(
                    "Preallocation can only be used for growing images", option="preallocation"
                )
        disk.resize(wanted, mode, counting(progress))
        disk.flush()
        disk.sync()
        return Resized(before, disk.size)
