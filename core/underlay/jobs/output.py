"""The image that a job makes: removed again if the job fails."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from underlay.access import FormatAccess
from underlay.creating import create_image
from underlay.errors import ConflictError, StorageError, UnderlayError
from underlay.face import run_blocking
from underlay.gate import ImplicitOpenGate
from underlay.limits import Limits
from underlay.steps import StepsCallback
from underlay.sync import SyncFormatAccess
from underlay.targets import Target, named_in, open_storage, options_for

__all__ = ["new_image", "refuse_same"]


@contextmanager
def new_image(
    target: Target,
    *,
    format: str,
    size: int,
    options: Mapping[str, Any],
    overwrite: bool,
    limits: Limits | None,
    gate: ImplicitOpenGate | None = None,
    storage_options: Mapping[str, object] | None,
    backing_storage_options: Mapping[str, object] | None = None,
    progress: StepsCallback | None = None,
) -> Generator[SyncFormatAccess]:
    """Create an image, and close it when the ``with`` block ends; an exception removes it again.

    The block makes it durable itself (``Publication``): what fails in closing removes nothing.
    An object that was there before and had to give way (``overwrite``) cannot come back; it is left
    with what it holds by then. An error in creating it has "create" as its ``step``. ``progress``
    counts what is preallocated.
    """
    made: list[FormatAccess] = []
    try:
        making = create_image(
            target,
            format=format,
            size=size,
            overwrite=overwrite,
            gate=gate,
            limits=limits,
            lock=True,
            storage_options=storage_options,
            options=options,
            backing_storage_options=backing_storage_options,
            progress=progress,
            made=made,
        )
        disk = SyncFormatAccess(run_blocking(making))
        yield disk
    except BaseException as error:
        if isinstance(error, UnderlayError) and not made:
            error.step = "create"
        for core in made:
            run_blocking(core.abandon())
        raise
    disk.close()


def refuse_same(
    sources: Sequence[SyncFormatAccess],
    target: SyncFormatAccess | Target,
    *,
    options: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, object] | None,
) -> None:
    """Refuse to write what is being read; ``options`` are those that the target is created with.

    Raises:
        ConflictError: the target, or its data file, is an object that a source, or an image below
            it, is read from.
    """
    data_file = None
    if not isinstance(target, SyncFormatAccess):
        data_file = named_in(options or {}, "data_file", target)
    if data_file is not None:
        own, of_data_file = options_for((target, data_file), storage_options)
        written = _identities(target, own) | _identities(data_file, of_data_file)
    else:
        written = _identities(target, storage_options)
    for disk in sources:
        for storage in disk.collect_storage_dependencies():
            if storage.identity() in written:
                raise ConflictError(
                    f"'{storage.name()}' is read and would be overwritten; choose another target"
                )


def _identities(
    target: SyncFormatAccess | Target, storage_options: Mapping[str, object] | None
) -> set[Hashable]:
    """What is written, as far as it exists and can be told from others."""
    if isinstance(target, SyncFormatAccess):
        handles = target.inner.collect_storage_dependencies()
        return {handle.identity() for handle in handles} - {None}
    try:
        handle = run_blocking(open_storage(target, lock=False, storage_options=storage_options))
    except StorageError:
        return set()  # it does not exist, or opening it for writing says what is wrong with it
    try:
        return {handle.identity()} - {None}
    finally:
        run_blocking(handle.close())
