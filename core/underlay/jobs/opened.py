"""The disk that a job works on: one that is open already, or one that the job opens."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

from underlay.blocking import open_any, open_image
from underlay.face import run_blocking
from underlay.gate import ImplicitOpenGate
from underlay.limits import Limits
from underlay.opening import open_without_references
from underlay.sync import SyncFormatAccess

if TYPE_CHECKING:
    from underlay.targets import Target

__all__ = ["OpeningAlone", "Source", "in_use", "opened", "opened_alone"]

#: An open disk, which stays open, or what ``open_any`` can open.
Source: TypeAlias = "SyncFormatAccess | Target"


@contextmanager
def opened(
    source: Source,
    *,
    format: str | None = None,
    writable: bool = False,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    format_options: Mapping[str, object] | None = None,
) -> Generator[SyncFormatAccess]:
    """The disk, with everything that it lies upon; the arguments are for one given by name.

    ``format_options`` are what its format, and ``open_image`` itself, takes besides.
    """
    if isinstance(source, SyncFormatAccess):
        yield source
        return
    given: dict[str, Any] = {"writable": writable, "gate": gate, "limits": limits}
    given |= {"lock": lock, "storage_options": storage_options, **(format_options or {})}
    disk = (
        open_any(source, **given) if format is None else open_image(source, format=format, **given)
    )
    with disk:
        yield disk


class OpeningAlone(TypedDict, total=False):
    """How an image that is given by name is opened, where nothing that it names is opened."""

    format: str | None
    limits: Limits | None
    lock: bool
    storage_options: Mapping[str, object] | None
    format_options: Mapping[str, object] | None


@contextmanager
def opened_alone(
    source: Source, *, writable: bool = False, **opening: Unpack[OpeningAlone]
) -> Generator[SyncFormatAccess]:
    """The disk, to change or tell its metadata: nothing that the image names is opened."""
    if isinstance(source, SyncFormatAccess):
        yield source
        return
    core = open_without_references(source, writable=writable, **opening)
    with SyncFormatAccess(run_blocking(core)) as disk:
        yield disk


def in_use(disk: object) -> AbstractContextManager[None]:
    """Keep from being closed what is a disk; in another process there is none to keep."""
    return disk.in_use() if isinstance(disk, SyncFormatAccess) else nullcontext()
