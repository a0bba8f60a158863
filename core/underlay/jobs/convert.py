"""A copy of one or more disks as a new image, or into an existing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from underlay.blocking import open_any, open_image
from underlay.capabilities import Bitmap
from underlay.errors import OutOfRangeError
from underlay.gate import ImplicitOpenGate
from underlay.jobs.bitmap_copying import bitmap_steps, check_format, copy_bitmaps, sound_bitmaps
from underlay.jobs.copying import Compress, Copied, Stretch, Zeroes, copy
from underlay.jobs.output import new_image, refuse_same
from underlay.jobs.progress import ProgressCallback, counting
from underlay.jobs.publishing import Publication
from underlay.jobs.salvage import SalvageCallback
from underlay.limits import Limits
from underlay.steps import Steps
from underlay.sync import SyncFormatAccess
from underlay.targets import Target, named_in, options_for

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["Source", "convert"]

#: An open disk, which stays open, or what ``open_any`` can open.
Source: TypeAlias = "SyncFormatAccess | Target"

_SECTOR = 512


def convert(
    sources: Source | Sequence[Source],
    target: Source,
    *,
    output_format: str = "raw",
    options: Mapping[str, Any] | None = None,
    compress: bool = False,
    level: int | None = None,
    sparse_size: int = 4096,
    target_exists: bool = False,
    target_is_zero: bool = False,
    overwrite: bool = False,
    over_backing: bool = False,
    offload: bool = False,
    salvage: SalvageCallback | None = None,
    rate: int | None = None,
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    parallel: int | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    target_storage_options: Mapping[str, object] | None = None,
) -> Copied:
    """Copy the guest bytes of ``sources``, one after the other, into ``target``.

    The target becomes a new image of ``output_format``, created with ``options``; with
    ``overwrite`` in place of one that is there. If the job fails or is cancelled, a new target is
    removed again. Several sources each begin at a whole sector of 512 bytes; the size of the last
    is kept exactly.

    With ``target_exists``, or where ``target`` is an open disk, they are written into that image
    instead; what it holds behind them stays. ``target_is_zero`` says that all of it is zeroes.

    A target with a backing image (``backing_file`` among the options, or ``over_backing`` where it
    exists) gets what the one source holds itself: what shows through there from its own backing
    image is taken to show through in the target too.

    ``compress`` stores data compressed, at ``level``: with zlib from 1 to 9, with zstd to 22, the
    quickest first; None is quick, and of good size. ``sparse_size`` is how many bytes of zeroes
    must stand together to be left out (of compressed data, whole clusters); with 0 all zeroes are
    written. ``offload`` copies from file to file within the system, where holes are all that is
    left out. At most ``rate`` bytes a second are written.

    ``progress`` is one for all of it: bytes that are preallocated count once more, and each bit of
    a bitmap that is copied as 512 of them.

    With ``salvage`` what cannot be read becomes zeroes, and is reported to it. ``bitmaps`` copies
    the one source's persistent dirty bitmaps too; one that was not saved properly is an error,
    unless such are to be skipped.

    ``gate``, ``lock`` and ``storage_options`` are for sources given by name, and those options for
    the target's ``backing_file`` too; ``target_storage_options`` are for the target and its data
    file. Each storage is told the options that it has. The work is done by ``parallel`` threads (1
    to 16), or by those of ``executor``. One of other processes, on other machines too, does all but
    the writing; sources must be found there under the same names.

    Example::

        copied = underlay.jobs.convert("disk.qcow2", "disk.raw")
        print(f"{copied.data} of {copied.size} bytes hold data")
        underlay.jobs.convert("disk.raw", "small.qcow2", output_format="qcow2", compress=True)

    Raises:
        ValueError: there is no source, or options that exclude each other.
        ConflictError: the target is one of the objects that a source is read from.
        StorageExistsError: the target exists; say ``overwrite`` or ``target_exists``.
        OutOfRangeError: the existing target is too small; nothing was written.
        UnsupportedOperationError: the target cannot be compressed, or have bitmaps.
        OptionError: a number is out of its range.
        WorkerError: the processes of ``executor`` died.
        StorageChangedError: they find something else under a source's name.
        CorruptImageError, StorageError: a source cannot be read; says at which guest offset.
        UnderlayError: as opening, creating and writing say.
    """
    listed = _listed(sources)
    options = options or {}
    over_backing = over_backing or options.get("backing_file") is not None
    _check_sources(listed, over_backing=over_backing, bitmaps=bitmaps)
    *told, of_backing = options_for((*listed, _backing(target, options)), storage_options)
    with ExitStack() as opened:
        disks = [
            source
            if isinstance(source, SyncFormatAccess)
            else opened.enter_context(
                open_any(source, gate=gate, limits=limits, lock=lock, storage_options=own)
            )
            for source, own in zip(listed, told, strict=True)
        ]
        stretches, size = _one_after_the_other(disks)
        found: list[Bitmap] = []
        if bitmaps:
            check_format(
                target.format_name if isinstance(target, SyncFormatAccess) else output_format
            )
            found = sound_bitmaps(disks[0], skip_broken=skip_broken_bitmaps)
        refuse_same(disks, target, options=options, storage_options=target_storage_options)
        to_copy = sum(stretch.length for stretch in stretches)
        steps = Steps(counting(progress), to_copy + bitmap_steps(disks[0], found))
        is_new = not target_exists and not isinstance(target, SyncFormatAccess)
        made: AbstractContextManager[SyncFormatAccess]
        if isinstance(target, SyncFormatAccess):
            made = nullcontext(target)
        elif target_exists:
            made = open_image(
                target,
                format=output_format,
                writable=True,
                gate=gate,
                limits=limits,
                storage_options=target_storage_options,
            )
        else:
            made = new_image(
                target,
                format=output_format,
                size=size,
                options=options,
                overwrite=overwrite,
                gate=gate,
                limits=limits,
                storage_options=target_storage_options,
                backing_storage_options=of_backing,
                progress=steps.more(size),
            )
        disk = opened.enter_context(made)
        # An open disk stays its owner's, to be made durable when he likes.
        publication = None if disk is target else Publication(disk, size=size, steps=steps)
        if target_exists:
            refuse_same(disks, disk, storage_options=None)  # now its data file is known too
        _check_room(disk, size)
        zeroes = Zeroes.DISCARD if sparse_size else Zeroes.WRITE
        clean_from = None
        if over_backing:
            clean_from = 0 if disk.backing is None else disk.backing.size
        elif sparse_size and (is_new or target_is_zero):
            zeroes = Zeroes.LEAVE
        copied = copy(
            stretches,
            disk,
            zeroes=zeroes,
            clean_from=clean_from,
            sparse_size=sparse_size,
            layers=1 if over_backing else None,
            offload=offload,
            compress=Compress(level=level) if compress else None,
            salvage=salvage,
            rate=rate,
            parallel=parallel,
            executor=executor,
            progress=steps.part(to_copy),
        )
        if not is_new:
            _fill_sectors(stretches, disk)
        if bitmaps:
            copy_bitmaps(disks[0], found, disk, steps)
        if publication is not None:
            publication.publish()
        steps.end()
        return copied


def _check_sources(sources: Sequence[Source], *, over_backing: bool, bitmaps: bool) -> None:
    if not sources:
        raise ValueError("convert needs at least one source")
    if len(sources) > 1 and over_backing:
        raise ValueError("a target with a backing image can have one source only")
    if len(sources) > 1 and bitmaps:
        raise ValueError("bitmaps can be copied from one source only")


def _backing(target: Source, options: Mapping[str, Any]) -> Target | None:
    """What the new image is to lie upon."""
    if isinstance(target, SyncFormatAccess):
        return None
    return named_in(options, "backing_file", target)


def _listed(sources: Source | Sequence[Source]) -> Sequence[Source]:
    if isinstance(sources, list | tuple):
        return cast("Sequence[Source]", sources)
    return (cast("Source", sources),)


def _one_after_the_other(disks: Sequence[SyncFormatAccess]) -> tuple[list[Stretch], int]:
    """Where each disk goes, and the bytes of all."""
    stretches: list[Stretch] = []
    end = 0
    for disk in disks:
        to = end + _SECTOR - 1 & -_SECTOR
        stretches.append(Stretch(disk=disk, start=0, length=disk.size, to=to))
        end = to + disk.size
    return stretches, end


def _check_room(target: SyncFormatAccess, size: int) -> None:
    if target.size < size:
        raise OutOfRangeError(
            f"The target has {target.size} bytes, too few for the {size} of its sources; "
            "resize it first"
        )


def _fill_sectors(stretches: Sequence[Stretch], target: SyncFormatAccess) -> None:
    """Let each source end in zeroes up to a whole sector, over what the target held there."""
    for stretch in stretches:
        end = stretch.to + stretch.length
        rest = min(-end % _SECTOR, target.size - end)
        if rest > 0:
            target.write(bytes(rest), end)
