"""Internal snapshots: what there is, and taking, applying and deleting them.

Nothing that the image names is opened for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from underlay.capabilities import Snapshot, Snapshottable
from underlay.errors import UnsupportedOperationError
from underlay.jobs.opened import Source, opened_alone
from underlay.limits import Limits

if TYPE_CHECKING:
    from underlay.sync import SyncFormatAccess

__all__ = ["apply_snapshot", "create_snapshot", "delete_snapshot", "snapshots"]


def snapshots(
    source: Source,
    *,
    format: str | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
) -> tuple[Snapshot, ...]:
    """The internal snapshots of an image, in its order; none where its format has none.

    Example::

        for snapshot in underlay.jobs.snapshots("disk.qcow2"):
            print(snapshot.id, snapshot.name, snapshot.disk_size)
    """
    with opened_alone(
        source, format=format, limits=limits, lock=lock, storage_options=storage_options
    ) as disk:
        able = disk.capability(Snapshottable)
        return () if able is None else tuple(able.snapshots())


def create_snapshot(
    source: Source,
    name: str,
    *,
    format: str | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
) -> Snapshot:
    """Keep the disk as it is now under a name, which others may have too.

    Example::

        snapshot = underlay.jobs.create_snapshot("disk.qcow2", "before the upgrade")
        print(snapshot.id)

    Raises:
        UnsupportedOperationError: the format has no snapshots.
        OptionError: the name is empty, or too long.
    """
    with opened_alone(
        source,
        format=format,
        writable=True,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
    ) as disk:
        return cast("Snapshot", _able(disk).create_snapshot(name))


def apply_snapshot(
    source: Source,
    id_or_name: str,
    *,
    format: str | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
) -> None:
    """Make the disk what it was then; what it is now is lost.

    Example::

        underlay.jobs.create_snapshot("disk.qcow2", "before")
        underlay.jobs.apply_snapshot("disk.qcow2", "before")

    Raises:
        UnsupportedOperationError: the format has no snapshots.
        OptionError: there is no such snapshot.
    """
    with opened_alone(
        source,
        format=format,
        writable=True,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
    ) as disk:
        _able(disk).apply_snapshot(id_or_name)


def delete_snapshot(
    source: Source,
    id_or_name: str,
    *,
    format: str | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
) -> None:
    """Forget a snapshot, and free what only it needed.

    Example::

        underlay.jobs.create_snapshot("disk.qcow2", "for a moment")
        underlay.jobs.delete_snapshot("disk.qcow2", "for a moment")

    Raises:
        UnsupportedOperationError: the format has no snapshots.
        OptionError: there is no such snapshot.
    """
    with opened_alone(
        source,
        format=format,
        writable=True,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
    ) as disk:
        _able(disk).delete_snapshot(id_or_name)


def _able(disk: SyncFormatAccess) -> Any:
    able = disk.capability(Snapshottable)
    if able is None:
        raise UnsupportedOperationError(
            f"Images of the format {disk.format_name} have no snapshots"
        )
    return able
