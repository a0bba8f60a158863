"""What an overlay has, written into an image below it."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import attrs

from underlay.capabilities import Describable, Emptiable, ImageDescription
from underlay.errors import (
    ConflictError,
    OptionError,
    ReadOnlyError,
    StorageError,
    UnderlayError,
    UnsupportedOperationError,
)
from underlay.face import run_blocking
from underlay.gate import ImplicitOpenGate, Reference
from underlay.jobs.copying import Stretch, Zeroes, copy
from underlay.jobs.opened import Source
from underlay.jobs.progress import ProgressCallback, counting
from underlay.limits import Limits
from underlay.opening import open_to_commit
from underlay.sync import SyncFormatAccess

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from underlay.handle import StorageHandle

__all__ = ["Committed", "commit", "find_base"]


@attrs.frozen(kw_only=True)
class Committed:
    """What a commit did, in guest bytes."""

    #: The size of the image that was written, before and after: it grows to the overlay's.
    size_before: int
    size: int
    #: Bytes written to it as data.
    data: int
    #: Whether the overlay gave back what it had.
    emptied: bool


def commit(
    source: Source,
    *,
    base: str | None = None,
    keep: bool = False,
    rate: int | None = None,
    format: str | None = None,
    parallel: int | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    format_options: Mapping[str, object] | None = None,
) -> Committed:
    """Write what an overlay has into its backing image, and then empty the overlay.

    ``base`` names an image further down the chain, as it is stored, or seen from the folder of the
    image that names it: what lies between is committed too. The images between it and the overlay
    are of no use by themselves afterwards. With ``base`` or ``keep`` the overlay stays as it is. A
    base that is smaller grows to the overlay's size. At most ``rate`` bytes a second are written.

    The overlay shows the same bytes at any time, whether the job ends, fails or is cancelled: it is
    emptied when all that it had is durable below.

    The base is opened for writing, and locked so; the gate is asked for it as a reference that is
    ``writable``. ``format_options`` are those of opening the image. An open disk is taken as it is,
    and so is a ``backing`` among these: the base must have been opened for writing, as by
    ``open_image(…, backing=a_writable_disk)``.

    Example::

        underlay.create("overlay.qcow2", backing_file="disk.qcow2", backing_fmt="qcow2").close()
        done = underlay.jobs.commit("overlay.qcow2", gate=underlay.DirectoryGate())
        print(f"{done.data} of {done.size} bytes were written")

    Raises:
        OptionError: no image of the chain is called ``base``.
        UnsupportedOperationError: the image has no backing image, or its format cannot be emptied.
        ReadOnlyError: the base, or an overlay that is to be emptied, is not open for writing.
        InvalidImageError: the base's format is not recorded.
        ImplicitOpenDeniedError: the gate does not allow an image of the chain.
        UnderlayError: as opening, reading and writing say.
    """
    opening: dict[str, Any] = {"format": format, "gate": gate, "limits": limits, "lock": lock}
    opening |= {"storage_options": storage_options, "format_options": format_options}
    with _opened_to_commit(source, base, opening) as (disk, depth):
        work = _Commit(disk=disk, depth=depth, empty=base is None and not keep)
        return work.run(rate=rate, parallel=parallel, executor=executor, progress=progress)


@contextmanager
def _opened_to_commit(
    source: Source, base: str | None, opening: Mapping[str, Any]
) -> Generator[tuple[SyncFormatAccess, int]]:
    """The disk, and how many images below it the one lies that is to be written."""
    if isinstance(source, SyncFormatAccess):
        yield source, 1 if base is None else find_base(source, base)
        return
    chosen = _Chosen(base)
    core = run_blocking(open_to_commit(source, written=chosen, **opening))
    with SyncFormatAccess(core) as disk:
        depth = chosen.depth
        if depth is None:  # there is none, or the caller opened it
            depth = 1 if base is None else find_base(disk, base)
        yield disk, depth


@attrs.define
class _Chosen:
    """Finds the image that is to be written while a chain is opened."""

    base: str | None
    depth: int | None = None

    def __call__(self, above: StorageHandle, reference: Reference, depth: int) -> bool:
        if self.depth is None and (
            self.base is None
            or _is_called(self.base, above, reference.name, _seen_from(above, reference.name))
        ):
            self.depth = depth
        return self.depth == depth


def find_base(disk: SyncFormatAccess, name: str) -> int:
    """How many images below the disk one lies that is called so.

    Raises:
        OptionError: none is; the disk itself does not count.
    """
    for depth, (above, below) in enumerate(pairwise(disk.chain()), 1):
        naming, named = (image.inner.collect_storage_dependencies()[0] for image in (above, below))
        if _is_called(name, naming, _description(above).backing_name, named.name()):
            return depth
    raise OptionError(f"Did not find '{name}' in the backing chain of {disk!r}", option="base")


def _is_called(name: str, above: StorageHandle, stored: str | None, place: str | None) -> bool:
    """Whether ``name`` means the image at ``place`` that ``above`` has ``stored`` as its own."""
    if not name:
        return False
    if stored == name:
        return True
    seen = _seen_from(above, name)
    if seen is None or place is None:
        return False
    return os.path.realpath(seen) == os.path.realpath(place)


def _seen_from(image: StorageHandle, name: str) -> str | None:
    try:
        return image.resolve_relative(name)
    except (UnderlayError, ValueError):
        return None


def _description(disk: SyncFormatAccess) -> ImageDescription:
    describable = disk.capability(Describable)
    return ImageDescription() if describable is None else describable.describe()


@attrs.frozen(kw_only=True)
class _Commit:
    disk: SyncFormatAccess
    depth: int
    empty: bool

    def run(
        self,
        *,
        rate: int | None,
        parallel: int | None,
        executor: Executor | None,
        progress: ProgressCallback | None,
    ) -> Committed:
        disk = self.disk
        chain = disk.chain()
        if len(chain) <= self.depth:
            raise UnsupportedOperationError("Image does not have a backing file")
        base = chain[self.depth]
        for image, what in ((base, "The image to commit to"), (disk, "The image to empty")):
            if not image.writable and (image is base or self.empty):
                raise ReadOnlyError(f"{what} is open read-only; open it with writable=True")
        before = base.size
        base.resize_grow(disk.size)
        copied = copy(
            [Stretch(disk=disk, start=0, length=disk.size, to=0)],
            base,
            zeroes=Zeroes.DISCARD,
            clean_from=before,
            layers=self.depth,
            rate=rate,
            parallel=parallel,
            executor=executor,
            progress=counting(progress),
        )
        _make_durable(base)
        if self.empty:
            _empty(disk)
        return Committed(size_before=before, size=base.size, data=copied.data, emptied=self.empty)


def _empty(disk: SyncFormatAccess) -> None:
    """Let the overlay have nothing of its own, and give its space back."""
    emptiable = disk.capability(Emptiable)
    if emptiable is not None:
        try:
            emptiable.make_empty()
        except (UnsupportedOperationError, ConflictError, StorageError):
            pass  # the storage may be full, say, and have no room beside what goes
        else:
            return
    disk.discard_to_backing(0, disk.size)
    _make_durable(disk)


def _make_durable(disk: SyncFormatAccess) -> None:
    disk.flush()
    disk.sync()
