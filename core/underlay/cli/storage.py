"""``underlay storage``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import attrs
import click

from underlay.cli import options
from underlay.cli.output import echo, echo_json, human_size
from underlay.cli.problems import CommandError
from underlay.cli.progress import progress_options, reporting
from underlay.errors import printable
from underlay.jobs.storage import StorageInfo, check_storage, collect_storage, storage_info
from underlay.maintenance import Collected, ObjectsCheck

__all__ = ["command"]

#: Of the layout of the JSON: raised when a field changes its meaning or goes away.
VERSION = 1

_DAMAGED = 2
#: Facts that are bytes.
_BYTES = frozenset({"size", "block-size", "stored-bytes", "unneeded-bytes", "removed-bytes"})
#: What each option is for.
_FOR = {"read_all": "check", "grace": "gc", "take_over": "gc", "dry_run": "gc"}


def _read_grace(_context: object, _parameter: object, value: str | None) -> float | None:
    try:
        seconds = None if value is None else float(value)
    except ValueError:
        seconds = -1
    if seconds is not None and not seconds >= 0:
        raise CommandError(f"--grace: '{value}' is no number of seconds")
    return seconds


@options.command("storage")
@click.option("--read-all", is_flag=True, help="check: look at every byte of every object.")
@click.option(
    "--grace",
    metavar="SECONDS",
    callback=_read_grace,
    help="gc: how long what is not needed is kept for those who opened the disk before.",
)
@click.option(
    "--take-over",
    is_flag=True,
    help="gc: remove what a writer left who crashed, too. One who still writes is shut out.",
)
@click.option("--dry-run", is_flag=True, help="gc: only tell what would be removed.")
@options.output_option
@progress_options
@options.storage_option
@options.names("info|check|gc NAME")
def command(
    names: tuple[str, ...],
    *,
    read_all: bool,
    grace: float | None,
    take_over: bool,
    dry_run: bool,
    output: str,
    bar: bool,
    progress: str | None,
    storage_options: dict[str, object],
) -> int:
    """Tell of, check or tidy up the objects that a disk is kept as.

    info tells of any storage, whatever it holds. check sees whether all objects are there that the
    disk needs; exit status 2 if one is not. gc removes those that it does not need any more; of a
    single object (s3://), uploads that nobody has gone on with for so long.
    """
    if len(names) != 2 or names[0] not in {"info", "check", "gc"}:  # noqa: PLR2004 - just those
        raise click.UsageError("Expecting info, check or gc, and one name")
    action, name = names
    given = {"read_all": read_all, "grace": grace, "take_over": take_over, "dry_run": dry_run}
    for option, value in given.items():
        if value not in {None, False} and _FOR[option] != action:
            raise CommandError(f"--{option.replace('_', '-')} is for {_FOR[option]}")
    if action == "info":
        facts = _of_info(storage_info(name, storage_options=storage_options))
        status = 0
    else:
        with reporting(bar=bar, progress=progress, quiet=False, steps=True) as told:
            if action == "check":
                checked = check_storage(
                    name, read_all=read_all, storage_options=storage_options, progress=told
                )
                facts, status = _of_check(checked), _DAMAGED if checked.damaged else 0
            else:
                collected = collect_storage(
                    name,
                    grace=grace,
                    take_over=take_over,
                    dry_run=dry_run,
                    storage_options=storage_options,
                    progress=told,
                )
                facts, status = {"dry-run": dry_run, **_of_collection(collected)}, 0
    if output == "json":
        echo_json({"version": VERSION, "filename": name, **facts})
    else:
        echo(f"storage: {printable(name)}")
        for line in _human(facts):
            echo(line)
    return status


def _of_info(info: StorageInfo) -> dict[str, object]:
    return {"size": info.size, "facts": dict(info.facts)}


def _of_check(checked: ObjectsCheck) -> dict[str, object]:
    return {
        "objects": checked.objects,
        "stored-bytes": checked.stored,
        "damaged-objects": checked.damaged,
        "damages": [attrs.asdict(damage) for damage in checked.damages],
        "unneeded-objects": checked.unneeded,
        "unneeded-bytes": checked.unneeded_bytes,
    }


def _of_collection(collected: Collected) -> dict[str, object]:
    return {
        "removed-objects": collected.removed,
        "removed-bytes": collected.removed_bytes,
        "kept-for-readers": collected.waiting,
        "kept-for-the-writer": collected.writers,
    }


def _human(facts: Mapping[str, object]) -> Iterator[str]:
    """A line for each fact; sizes as people read them, too."""
    for name, value in facts.items():
        label = name.replace("-", " ")
        if isinstance(value, Mapping):
            yield from _human(cast("Mapping[str, object]", value))
        elif isinstance(value, list):
            for damage in cast("list[dict[str, str]]", value):
                yield printable(f"damaged: {damage['name']} {damage['what']}")
        elif isinstance(value, bool):
            yield f"{label}: {'yes' if value else 'no'}"
        elif isinstance(value, int) and name in _BYTES:
            yield f"{label}: {human_size(value)} ({value} bytes)"
        elif value is not None:
            yield printable(f"{label}: {value}")
