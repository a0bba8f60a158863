"""A part of a disk as a new image, counted in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import attrs

from underlay.blocking import open_any
from underlay.errors import OptionError
from underlay.gate import ImplicitOpenGate
from underlay.jobs.convert import Source
from underlay.jobs.copying import Stretch, Zeroes, copy
from underlay.jobs.output import new_image, refuse_same
from underlay.jobs.progress import ProgressCallback, counting
from underlay.jobs.publishing import Publication
from underlay.limits import Limits
from underlay.steps import Steps
from underlay.sync import SyncFormatAccess
from underlay.targets import Target

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["DdResult", "dd"]

_SECTOR = 512
_LARGEST_BLOCK = (1 << 31) - 1
_LARGEST = (1 << 63) - 1


@attrs.frozen(kw_only=True)
class DdResult:
    """What was copied."""

    #: The guest bytes copied, from ``start`` of the source on.
    start: int
    length: int
    #: Nothing was copied, since ``skip`` leads past the end of what was to be copied.
    past_end: bool = False


def dd(
    source: Source,
    target: Target,
    *,
    block_size: int = 512,
    count: int | None = None,
    skip: int = 0,
    output_format: str = "raw",
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    parallel: int | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    target_storage_options: Mapping[str, object] | None = None,
) -> DdResult:
    """Copy blocks ``skip`` to ``count`` of a disk into a new image, as ``qemu-img dd`` does.

    That is: ``count`` says where to stop, counted from the start of the source and not from
    ``skip``; a ``skip`` past that makes an empty image. The new image has whole sectors of 512
    bytes. Everything else is as for ``convert``.

    Example::

        underlay.jobs.dd("disk.qcow2", "second-megabyte.raw", block_size=1 << 20, skip=1, count=2)

    Raises:
        OptionError: ``block_size``, ``count`` or ``skip`` is out of its range.
        UnderlayError: as for ``convert``.
    """
    _check("block_size", block_size, 1, _LARGEST_BLOCK)
    _check("skip", skip, 0, _LARGEST)
    if count is not None:
        _check("count", count, 0, _LARGEST)
    with ExitStack() as opened:
        disk = (
            source
            if isinstance(source, SyncFormatAccess)
            else opened.enter_context(
                open_any(
                    source, gate=gate, limits=limits, lock=lock, storage_options=storage_options
                )
            )
        )
        end = _whole_sectors(disk.size)
        if count is not None:
            end = min(end, count * block_size)
        start = skip * block_size
        length = max(0, min(end, disk.size) - start)
        refuse_same([disk], target, options=options, storage_options=target_storage_options)
        size = _whole_sectors(max(0, end - start))
        steps = Steps(counting(progress), length)
        made = opened.enter_context(
            new_image(
                target,
                format=output_format,
                size=size,
                options=options or {},
                overwrite=overwrite,
                limits=limits,
                storage_options=target_storage_options,
                progress=steps.more(size),
            )
        )
        publication = Publication(made, size=size, steps=steps)
        copy(
            [Stretch(disk=disk, start=start, length=length, to=0)] if length else [],
            made,
            zeroes=Zeroes.LEAVE,
            sparse_size=0,
            parallel=parallel,
            executor=executor,
            progress=steps.part(length),
        )
        publication.publish()
        steps.end()
        return DdResult(start=start, length=length, past_end=start > end)


def _whole_sectors(size: int) -> int:
    return size + _SECTOR - 1 & -_SECTOR


def _check(option: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise OptionError(f"{option} is {value}; it can be from {least} to {most}", option=option)
