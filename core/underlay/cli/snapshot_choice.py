"""The internal snapshot that ``-l`` chooses: by an ID or a name, or by which of the two it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from underlay.capabilities import Snapshottable
from underlay.cli import options
from underlay.cli.output import complain
from underlay.cli.problems import CommandError
from underlay.errors import OptionError, UnsupportedFeatureError
from underlay.sync import SyncFormatAccess

__all__ = ["disk_opener"]

_FAILED = "Failed to load snapshot"


def disk_opener(snapshot: str | None) -> Callable[..., SyncFormatAccess]:
    """What opens a disk as ``open_disk`` does, or the snapshot of it that a ``-l`` chooses.

    Raises:
        CommandError: that makes no sense; and where it is called, there is no such snapshot.
    """
    return options.open_disk if snapshot is None else _Choice.read(snapshot).open


@attrs.frozen(kw_only=True)
class _Choice:
    """An ID or a name in ``text``; or an ID, a name, or both, which have to fit one snapshot."""

    text: str | None = None
    id: str | None = None
    name: str | None = None

    @classmethod
    def read(cls, text: str) -> _Choice:
        """Take ``snapshot.id=…,snapshot.name=…`` apart; other text is an ID or a name."""
        if not text.startswith("snapshot."):
            return cls(text=text)
        from underlay.cli.block_options import option_pairs

        given = option_pairs(text)
        for name in given:
            if name not in {"snapshot.id", "snapshot.name"}:
                complain(f"Invalid parameter '{name}'")
                raise CommandError(f"Failed in parsing snapshot param '{text}'")
        return cls(id=given.get("snapshot.id"), name=given.get("snapshot.name"))

    def open(self, filename: str, **how: Any) -> SyncFormatAccess:
        wanted = self.text
        try:
            if wanted is None:
                with options.open_disk(filename, **how) as disk:
                    wanted = self._found(disk)
            return options.open_disk(filename, snapshot=wanted, **how)
        except OptionError as error:
            if error.option != "snapshot":
                raise
            raise _not_there() from error
        except UnsupportedFeatureError as error:
            if error.feature != "internal snapshots":
                raise
            with options.open_disk(filename, **how) as disk:
                raise _never_there(disk) from error

    def _found(self, disk: SyncFormatAccess) -> str:
        """The ID of the snapshot that is meant."""
        store: Any = disk.capability(Snapshottable)
        if store is None:
            raise _never_there(disk)
        for snapshot in store.snapshots():
            if self.id in {None, snapshot.id} and self.name in {None, snapshot.name}:
                return str(snapshot.id)
        raise _not_there()


def _not_there() -> CommandError:
    return CommandError(f"{_FAILED}: Can't find snapshot")


def _never_there(disk: SyncFormatAccess) -> CommandError:
    return CommandError(
        f"{_FAILED}: Block format '{disk.format_name}' used by device '' does not support "
        "temporarily loading internal snapshots"
    )
