"""The objects that a storage keeps a disk as: told of, checked, and removed where not needed.

For storages that are ``underlay.maintenance.Maintainable``.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import attrs

from underlay.capabilities import offers
from underlay.errors import OptionError, UnsupportedOperationError
from underlay.face import run_blocking
from underlay.handle import StorageHandle
from underlay.jobs.progress import ProgressCallback, counting
from underlay.maintenance import Collected, Maintainable, ObjectsCheck, Sweepable
from underlay.storage import StorageOpenOptions, is_storage
from underlay.targets import Target, backend_of, open_storage

__all__ = ["StorageInfo", "check_storage", "collect_storage", "storage_info"]


@attrs.frozen(kw_only=True)
class StorageInfo:
    """What a storage says of itself."""

    name: str
    #: Bytes.
    size: int
    #: More, as the storage calls it.
    facts: Mapping[str, object]


def storage_info(
    target: Target, *, storage_options: Mapping[str, object] | None = None
) -> StorageInfo:
    """What a storage of any kind says of itself; nothing of what it holds is looked at.

    Example::

        print(underlay.jobs.storage_info("disk.qcow2").size)

    Raises:
        StorageError: it cannot be opened.
    """
    with _open(target, storage_options) as handle:
        facts = dict(handle.describe())
        if offers(handle.storage, Maintainable):
            facts |= handle.storage.survey()
        return StorageInfo(name=handle.name(), size=handle.size(), facts=facts)


def check_storage(
    target: Target,
    *,
    read_all: bool = False,
    storage_options: Mapping[str, object] | None = None,
    progress: ProgressCallback | None = None,
) -> ObjectsCheck:
    """See whether all objects that a disk needs are there, and as long as they were written.

    ``read_all`` looks at every byte of them. ``progress`` counts objects.

    Example::

        result = underlay.jobs.check_storage("s3+blocks://bucket/disk")
        assert not result.damaged

    Raises:
        UnsupportedOperationError: it is no storage of many objects.
        InvalidImageError: so much is wrong that nothing can be checked.
    """
    with _open(target, storage_options) as handle:
        return _maintainable(handle).check_objects(read_all=read_all, progress=counting(progress))


def collect_storage(
    target: Target,
    *,
    grace: float | None = None,
    take_over: bool = False,
    dry_run: bool = False,
    storage_options: Mapping[str, object] | None = None,
    progress: ProgressCallback | None = None,
) -> Collected:
    """Remove the objects that a disk has not needed for ``grace`` seconds.

    None is the storage's own grace period, in which those may still need them who opened the disk
    before. What is of whoever writes it stays; ``take_over`` shuts him out instead, for one who
    crashed. ``dry_run`` removes nothing. ``progress`` counts objects.

    Of a disk that is one object, uploads are ended that nobody has gone on with for so long: they
    were left by writers that were killed. There may be no such object; ``take_over`` is no use.

    Example::

        collected = underlay.jobs.collect_storage("s3+blocks://bucket/disk")
        print(collected.removed_bytes)

    Raises:
        UnsupportedOperationError: it is no storage of objects.
        StorageChangedError: it was written meanwhile, and ``take_over`` was said; try again.
    """
    if not is_storage(target):
        name, backend = backend_of(target)
        if offers(backend, Sweepable):
            if take_over:
                raise OptionError(f"'{name}' is one object: there is nobody to take it over from")
            options = StorageOpenOptions(name=name, options=dict(storage_options or {}))
            return backend.sweep(options, grace=grace, dry_run=dry_run, progress=counting(progress))
    with _open(target, storage_options) as handle:
        return _maintainable(handle).collect(
            grace=grace, take_over=take_over, dry_run=dry_run, progress=counting(progress)
        )


@contextmanager
def _open(target: Target, storage_options: Mapping[str, object] | None) -> Generator[StorageHandle]:
    handle = run_blocking(open_storage(target, lock=False, storage_options=storage_options))
    try:
        yield handle
    finally:
        run_blocking(handle.close())


def _maintainable(handle: StorageHandle) -> Maintainable:
    if not offers(handle.storage, Maintainable):
        raise UnsupportedOperationError(
            f"'{handle.name()}' is one object: there is nothing to check or to remove beside it"
        )
    return handle.storage
