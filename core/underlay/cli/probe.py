"""``underlay probe``."""

from __future__ import annotations

from typing import Unpack

import attrs

from underlay.blocking import probe
from underlay.cli import options
from underlay.cli.output import echo, echo_json
from underlay.errors import printable
from underlay.probing import ProbeResult

__all__ = ["command"]

#: Of the JSON layout: raised when a field changes its meaning or goes away.
VERSION = 1


@options.command("probe")
@options.output_option
@options.own_access_options
@options.names()
def command(names: tuple[str, ...], *, output: str, **access: Unpack[options.Access]) -> int:
    """Say what format an object has, and why; opens nothing else, and takes no lock.

    The answer holds for this moment: whoever can write to the object can change it. Exit status 1
    if more than one format matches.
    """
    name = options.one_name(names)
    result = probe(name, storage_options=access["storage_options"])
    if output == "json":
        echo_json(_as_json(name, result))
    else:
        echo(_human(name, result))
    return 1 if result.format is None else 0


def _human(name: str, result: ProbeResult) -> str:
    lines = [f"{printable(name)}: {' or '.join(result.matches) or result.format}"]
    lines += [f"  {format_name}: {why}" for format_name, why in result.matches.items()]
    if result.guessed:
        lines.append("  no format matches, so it is taken to be raw: that is a guess")
    if result.format is None:
        lines.append("  more than one format matches: say which with -f")
    for failure in result.failures:
        lines.append(f"  {failure.format} could not be asked: {printable(failure.reason)}")
    return "\n".join(lines)


def _as_json(name: str, result: ProbeResult) -> dict[str, object]:
    return {
        "version": VERSION,
        "filename": name,
        "format": result.format,
        "guessed": result.guessed,
        "matches": [{"format": name, "reason": why} for name, why in result.matches.items()],
        "failures": [attrs.asdict(failure) for failure in result.failures],
        "file-size": result.size,
    }
