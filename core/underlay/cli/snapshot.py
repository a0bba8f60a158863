"""``underlay snapshot``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import click

from underlay.capabilities import Snapshottable
from underlay.cli import options
from underlay.cli.output import echo, echo_json
from underlay.cli.problems import CommandError, explain
from underlay.cli.progress import progress_options, reporting
from underlay.cli.snapshot_table import snapshot_table
from underlay.errors import OptionError, UnderlayError, UnsupportedOperationError
from underlay.jobs.info import snapshot_json
from underlay.jobs.opened import opened_alone
from underlay.jobs.progress import ProgressCallback
from underlay.jobs.snapshot import apply_snapshot, create_snapshot, delete_snapshot, snapshots
from underlay.sync import SyncFormatAccess

__all__ = ["command"]

#: Of the layout of the JSON.
_VERSION = 1


@options.command("snapshot")
@click.option("-l", "listing", count=True, help="List them.")
@click.option("-c", "create", metavar="NAME", multiple=True, help="Take one of the disk as it is.")
@click.option("-a", "apply", metavar="ID|NAME", multiple=True, help="Make the disk what it was.")
@click.option("-d", "delete", metavar="NAME", multiple=True, help="Forget one.")
@options.output_option
@progress_options
@click.option("-q", "quiet", is_flag=True, help="Print nothing but errors.")
@options.force_share
@options.access_options
@options.names()
def command(
    names: tuple[str, ...],
    *,
    listing: int,
    create: tuple[str, ...],
    apply: tuple[str, ...],
    delete: tuple[str, ...],
    output: str,
    bar: bool,
    progress: str | None,
    quiet: bool,
    force_share: bool,
    **access: Unpack[options.Access],
) -> int:
    """List, take, apply or delete internal snapshots.

    Nothing that the image names is opened. JSON has those that there are afterwards.
    """
    if listing + len(create) + len(apply) + len(delete) > 1:
        raise click.UsageError("Cannot mix '-l', '-a', '-c', '-d'")
    name = options.one_name(names)
    changes = bool(create or apply or delete)
    target, opening = options.named(name, None, access, force_share=force_share, writable=changes)
    with opened_alone(target, writable=changes, **opening) as disk:
        if changes:
            with reporting(bar=bar, progress=progress, quiet=quiet) as report:
                _change(disk, create, apply, delete, report)
        if output == "json":
            entries = [snapshot_json(snapshot) for snapshot in snapshots(disk)]
            echo_json({"version": _VERSION, "filename": name, "snapshots": entries})
        elif listing:
            _list(disk)
    return 0


def _list(disk: SyncFormatAccess) -> None:
    if found := snapshots(disk):
        echo("Snapshot list:")
        for line in snapshot_table(found):
            echo(line)


def _change(
    disk: SyncFormatAccess,
    create: Sequence[str],
    apply: Sequence[str],
    delete: Sequence[str],
    report: ProgressCallback | None,
) -> None:
    """One of the three; what cannot be done is told in qemu-img's words."""
    able = disk.capability(Snapshottable) is not None
    for name in create:
        try:
            create_snapshot(disk, name, progress=report)
        except UnsupportedOperationError:
            raise CommandError(
                f"Could not create snapshot '{name}': -95 (Operation not supported)"
            ) from None
        except UnderlayError as error:
            raise CommandError(f"Could not create snapshot '{name}': {explain(error)}") from error
    for name in apply:
        if not able:
            raise CommandError(
                f"Could not apply snapshot '{name}': Block driver does not support snapshots"
            )
        try:
            apply_snapshot(disk, name, progress=report)
        except OptionError:
            raise CommandError(
                f"Could not apply snapshot '{name}': Failed to load snapshot: "
                "No such file or directory"
            ) from None
    for name in delete:
        # By its name: an ID is none, since the wrong one would be gone for good.
        meant = next((one.id for one in snapshots(disk) if one.name == name), None)
        if meant is None:
            raise CommandError(f"Could not delete snapshot '{name}': snapshot not found")
        delete_snapshot(disk, meant, progress=report)
