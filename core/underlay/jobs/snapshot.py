"""Internal snapshots: what there is, and taking, applying and deleting them.

Nothing that the image names is opened for it. ``progress`` counts guest bytes, as often as they are
gone over. A change that is cancelled has happened or has not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack, cast

from underlay.capabilities import Snapshot, Snapshottable
from underlay.errors import UnsupportedOperationError
from underlay.jobs.opened import OpeningAlone, Source, opened_alone
from underlay.jobs.progress import ProgressCallback, counting

if TYPE_CHECKING:
    from underlay.sync import SyncFormatAccess

__all__ = ["apply_snapshot", "create_snapshot", "delete_snapshot", "snapshots"]


def snapshots(source: Source, **opening: Unpack[OpeningAlone]) -> tuple[Snapshot, ...]:
    """The internal snapshots of an image, in its order; none where its format has none.

    Example::

        for snapshot in underlay.jobs.snapshots("disk.qcow2"):
            print(snapshot.id, snapshot.name, snapshot.disk_size)
    """
    with opened_alone(source, **opening) as disk:
        able = disk.capability(Snapshottable)
        return () if able is None else tuple(able.snapshots())


def create_snapshot(
    source: Source,
    name: str,
    *,
    progress: ProgressCallback | None = None,
    **opening: Unpack[OpeningAlone],
) -> Snapshot:
    """Keep the disk as it is now under a name, which others may have too.

    Example::

        snapshot = underlay.jobs.create_snapshot("disk.qcow2", "before the upgrade")
        print(snapshot.id)

    Raises:
        UnsupportedOperationError: the format has no snapshots.
        OptionError: the name is empty, or too long.
    """
    with opened_alone(source, writable=True, **opening) as disk:
        return cast("Snapshot", _able(disk).create_snapshot(name, counting(progress)))


def apply_snapshot(
    source: Source,
    id_or_name: str,
    *,
    progress: ProgressCallback | None = None,
    **opening: Unpack[OpeningAlone],
) -> None:
    """Make the disk what it was then; what it is now is lost.

    Example::

        underlay.jobs.create_snapshot("disk.qcow2", "before")
        underlay.jobs.apply_snapshot("disk.qcow2", "before")

    Raises:
        UnsupportedOperationError: the format has no snapshots.
        OptionError: there is no such snapshot.
    """
    with opened_alone(source, writable=True, **opening) as disk:
        _able(disk).apply_snapshot(id_or_name, counting(progress))


def delete_snapshot(
    source: Source,
    id_or_name: str,
    *,
    progress: ProgressCallback | None = None,
    **opening: Unpack[OpeningAlone],
) -> None:
    """Forget a snapshot, and free what only it needed.

    Example::

        underlay.jobs.create_snapshot("disk.qcow2", "for a moment")
        underlay.jobs.delete_snapshot("disk.qcow2", "for a moment")

    Raises:
        UnsupportedOperationError: the format has no snapshots.
        OptionError: there is no such snapshot.
    """
    with opened_alone(source, writable=True, **opening) as disk:
        _able(disk).delete_snapshot(id_or_name, counting(progress))


def _able(disk: SyncFormatAccess) -> Any:
    able = disk.capability(Snapshottable)
    if able is None:
        raise UnsupportedOperationError(
            f"Images of the format {disk.format_name} have no snapshots"
        )
    return able
