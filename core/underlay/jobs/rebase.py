"""Another backing image under an overlay, which goes on showing the same guest bytes."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from underlay.blocking import open_any, open_image
from underlay.capabilities import Amendable
from underlay.errors import ConflictError, OptionError, UnderlayError, UnsupportedOperationError
from underlay.gate import ImplicitOpenGate
from underlay.jobs.opened import opened, opened_alone
from underlay.jobs.progress import Progress, ProgressCallback
from underlay.jobs.replacing import keep_content
from underlay.limits import Limits
from underlay.plugins import registry
from underlay.sync import SyncFormatAccess
from underlay.targets import Target, named_for, options_for, scheme_of

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["Rebased", "rebase"]

#: The option by which a format changes the name of the backing image.
_NAME = "backing_file"


@attrs.frozen(kw_only=True)
class Rebased:
    """What the overlay had to get of its own, in guest bytes."""

    size: int
    #: Written as data.
    data: int
    #: Marked as zeroes.
    zeroed: int


def rebase(
    target: Target,
    backing: str | None,
    *,
    backing_format: str | None = None,
    unsafe: bool = False,
    format: str | None = None,
    parallel: int | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    lock_backing: bool = True,
    storage_options: Mapping[str, object] | None = None,
    format_options: Mapping[str, object] | None = None,
) -> Rebased:
    """Let an image lie upon another backing image, or with None upon none.

    ``backing`` is recorded as it is, with ``backing_format``, and seen from the image's own folder;
    it is the caller's word and passes no gate, but what it names in turn does, and so does what the
    image names so far. What the two backing images do not have in common is written to the image
    first and made durable; then the name is changed, by one write. An image that is larger than its
    backing image has zeroes behind that. If the job fails or is cancelled, the image has its old
    backing image, and shows the same bytes.

    With ``unsafe`` nothing but the name changes, and no other image is opened: the guest's bytes
    change as the backing images differ. That is how to follow one that was moved.

    The image is given by its name or storage, since an open disk would go on over what it has open.
    ``lock_backing`` says whether to lock the new backing image, ``format_options`` are those of
    opening the image; a ``backing`` among them is taken for what it names so far. Of
    ``storage_options`` the image and the new backing image each get those that its storage has.

    An error's ``step`` is ``"backing"`` where the new backing image could not be opened, and
    ``"reference"`` where its name could not be recorded, ``"format"`` where nobody has its format.

    Example::

        underlay.create("old.qcow2", size="1M").close()
        underlay.create("overlay.qcow2", backing_file="old.qcow2", backing_fmt="qcow2").close()
        gate = underlay.DirectoryGate()
        done = underlay.jobs.rebase("overlay.qcow2", "b.raw", backing_format="raw", gate=gate)
        print(f"{done.data} bytes were copied")

    Raises:
        OptionError: there is no ``backing_format``, or the name is too long for the image.
        UnsupportedOperationError: this format cannot change its backing image.
        ConflictError: the image would lie upon itself.
        UnderlayError: as opening, reading and writing say.
    """
    name = backing or None
    opening: dict[str, Any] = {"format": format, "writable": True, "limits": limits, "lock": lock}
    upon = None if unsafe or name is None else named_for(target, name)
    own, told = options_for((target, upon), storage_options)
    opening |= {"storage_options": own, "format_options": format_options}
    if unsafe:
        with opened_alone(target, **opening) as disk:
            _check_format(backing_format)
            _check(disk, name, backing_format)
            if progress is not None:
                progress(Progress(0, disk.size))
            _record(disk, name, backing_format)
            if progress is not None:
                progress(Progress(disk.size, disk.size))
            return Rebased(size=disk.size, data=0, zeroed=0)
    below = {"gate": gate, "limits": limits, "lock": lock_backing, "storage_options": told}
    with (
        opened(target, gate=gate, **opening) as disk,
        _opened_below(disk, name, backing_format, below) as new,
    ):
        _check(disk, name, backing_format)
        data, zeroed = keep_content(
            disk, new, parallel=parallel, executor=executor, progress=progress
        )
        disk.flush()
        disk.sync()
        _record(disk, name, backing_format)
        return Rebased(size=disk.size, data=data, zeroed=zeroed)


@contextmanager
def _opened_below(
    disk: SyncFormatAccess, name: str | None, format: str | None, opening: Mapping[str, Any]
) -> Generator[SyncFormatAccess | None]:
    """The new backing image, or None."""
    _check_format(format)
    if name is None:
        yield None
        return
    image = disk.inner.collect_storage_dependencies()[0]
    try:
        target = name if scheme_of(name) is not None else image.resolve_relative(name)
        if format is None:
            new = open_any(target, **opening)
        else:
            new = open_image(target, format=format, **opening)
    except UnderlayError as error:
        error.step = "backing"
        raise
    with new:
        _refuse_itself(disk, new)
        yield new


def _check_format(name: str | None) -> None:
    try:
        if name is not None:
            registry().driver(name)
    except UnderlayError as error:
        error.step = "format"
        raise


def _refuse_itself(disk: SyncFormatAccess, new: SyncFormatAccess) -> None:
    own = {handle.identity() for handle in disk.inner.collect_storage_dependencies()} - {None}
    for storage in new.collect_storage_dependencies():
        if storage.identity() in own:
            error = ConflictError(
                f"'{storage.name()}' would lie upon itself; choose another backing image"
            )
            error.step = "backing"
            raise error


def _check(disk: SyncFormatAccess, name: str | None, format: str | None) -> None:
    """Refuse what could not be recorded in the end."""
    error: UnderlayError | None = None
    amendable = disk.capability(Amendable)
    if name is not None and format is None:
        error = OptionError("backing format must be specified", option="backing_format")
    elif amendable is None or _NAME not in amendable.amend_options:
        error = UnsupportedOperationError("Operation not supported")
    if error is not None:
        error.step = "reference"
        raise error


def _record(disk: SyncFormatAccess, name: str | None, format: str | None) -> None:
    options = {_NAME: ""} if name is None else {_NAME: name, "backing_fmt": format}
    try:
        disk.capability(Amendable).amend(options)
    except UnderlayError as error:
        error.step = "reference"
        raise
