"""``underlay plugins``."""

from __future__ import annotations

from collections.abc import Iterator

from underlay.cli import options
from underlay.cli.output import echo, echo_json
from underlay.errors import printable
from underlay.plugins import PluginRecord, Registry, registry

__all__ = ["command"]

#: Of the JSON layout: raised when a field changes its meaning or goes away.
VERSION = 1


@options.command("plugins")
@options.output_option
def command(*, output: str) -> int:
    """List what is loaded and from where, and what is not and why."""
    known = registry()
    if output == "json":
        echo_json(_as_json(known))
    else:
        for line in _human(known):
            echo(printable(line))
    return 0


def _human(known: Registry) -> Iterator[str]:
    rows = [("PLUG-IN", "FROM", "MODULE", "OFFERS")]
    rows += [(one.name, one.origin, one.value, _offers(one)) for one in known.records]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        yield "  ".join((*cells, row[3]))
    for name, claimants in known.conflicts().items():
        yield f"Conflict: {name} is claimed by {' and by '.join(claimants)}"


def _offers(record: PluginRecord) -> str:
    if record.error is not None:
        return f"not loaded: {record.error}"
    offers = [f"format {name}" for name in record.formats]
    offers += [f"storage {scheme}:" for scheme in record.schemes]
    return ", ".join(offers) or "nothing"


def _as_json(known: Registry) -> dict[str, object]:
    return {
        "version": VERSION,
        "plugins": [
            {
                "name": record.name,
                "module": record.value,
                "distribution": record.distribution,
                "distribution-version": record.version,
                "formats": record.formats,
                "schemes": record.schemes,
                "error": record.error,
            }
            for record in known.records
        ],
        "conflicts": [
            {
                "kind": "scheme" if name.endswith(":") else "format",
                "name": name.removesuffix(":"),
                "claimants": claimants,
            }
            for name, claimants in known.conflicts().items()
        ],
    }
