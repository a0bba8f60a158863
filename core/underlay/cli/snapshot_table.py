"""The table of an image's internal snapshots, as qemu-img draws it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Final

from underlay.capabilities import Snapshot
from underlay.cli.output import human_size, printable

__all__ = ["snapshot_table"]

_NANOSECONDS: Final = 1_000_000_000


def snapshot_table(snapshots: Sequence[Snapshot]) -> Iterator[str]:
    """A line each, below one that says what the columns are."""
    yield _row("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
    for snapshot in snapshots:
        seconds, nanoseconds = divmod(snapshot.vm_clock_nsec, _NANOSECONDS)
        yield _row(
            printable(snapshot.id),
            printable(snapshot.name),
            human_size(snapshot.vm_state_size),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date_sec)),
            f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            f".{nanoseconds // 1_000_000:03}",
            "" if snapshot.icount is None else str(snapshot.icount),
        )


def _row(*cells: str) -> str:
    return "{:<9} {:<16} {:>8}{:>20}{:>13}{:>11}".format(*cells)
