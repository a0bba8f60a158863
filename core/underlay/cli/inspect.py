"""``underlay inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack

from underlay.blocking import inspect
from underlay.chain import quotable
from underlay.cli import options
from underlay.cli.output import echo, echo_json, human_size
from underlay.errors import printable
from underlay.inspection import InspectionReport

__all__ = ["command"]

_STATUS = {"safe": 0, "unsafe": 2, "unknown": 1}
_MEANING = {
    "safe": "it opens, it names nothing else, and nothing is wrong with it",
    "unsafe": "do not use it as it is",
    "unknown": "whether it is safe could not be told",
}


@options.command("inspect")
@options.output_option
@options.own_access_options
@options.names()
def command(names: tuple[str, ...], *, output: str, **access: Unpack[options.Access]) -> int:
    """Judge an image from a stranger: may it be handed to a machine?

    Reads this one object, whatever it names; takes no lock. Exit status: 0 safe, 2 unsafe, 1 could
    not be told.
    """
    report = inspect(
        options.one_name(names),
        limits=access["limits"],
        storage_options=access["storage_options"],
    )
    if output == "json":
        echo_json(report.as_json())
    else:
        for line in _human(report):
            echo(line)
    return _STATUS[report.verdict]


def _human(report: InspectionReport) -> Iterator[str]:
    yield f"{report.verdict.upper()}: {printable(report.filename)}: {_MEANING[report.verdict]}"
    for reason in report.reasons:
        yield f"  - {printable(reason)}"
    yield f"format: {_formats(report)}"
    size = report.virtual_size
    if size is not None:
        yield f"virtual size: {human_size(size)} ({size} bytes)"
    yield f"file size: {human_size(report.file_size)} ({report.file_size} bytes)"
    for feature in report.features:
        known = "supported" if feature.supported else "not supported"
        yield f"feature: {printable(feature.name)} ({feature.kind}, {known})"
    for reference in report.references:
        as_format = f", as {printable(reference.format)}" if reference.format else ""
        yield f"names: {reference.kind.value} '{quotable(reference.name)}'{as_format}; not opened"


def _formats(report: InspectionReport) -> str:
    if report.guessed:
        return f"{report.format} (a guess: no format matches)"
    return ", ".join(f"{name} ({printable(why)})" for name, why in report.matches.items())
