"""``underlay check``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack

import click

from underlay.capabilities import CheckResult, Finding, Repair
from underlay.cli import options
from underlay.cli.output import echo, echo_json, printable, say
from underlay.cli.problems import CommandError
from underlay.cli.progress import progress_options, reporting
from underlay.errors import UnsupportedOperationError
from underlay.jobs.check import check, repair

__all__ = ["command"]

_CORRUPT = 2
_LEAKS = 3
_NO_CHECK = 63

#: The fields in the order in which qemu-img's JSON has them; counts that are zero are left out.
_FIELDS = {
    "image-end-offset": "image_end_offset",
    "compressed-clusters": "compressed_clusters",
    "total-clusters": "total_clusters",
    "corruptions-fixed": "corruptions_fixed",
    "corruptions": "corruptions",
    "check-errors": "check_errors",
    "leaks-fixed": "leaks_fixed",
    "leaks": "leaks",
    "allocated-clusters": "allocated_clusters",
    "filename": None,
    "format": "format",
    "fragmented-clusters": "fragmented_clusters",
}


@options.command("check")
@options.format_option("-f", "--format", "format_name", what="The image's format.")
@options.output_option
@click.option(
    "-r", "--repair", "wanted", metavar="leaks|all", help="Mend leaks, or all that can be mended."
)
@click.option("--dry-run", is_flag=True, help="With -r: only list what would be done.")
@click.option(
    "--findings", is_flag=True, help="List each finding: what, where, found and expected."
)
@options.cache_option("-T", "source_cache")
@progress_options
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@options.force_share
@options.access_options
@options.names()
def command(
    names: tuple[str, ...],
    *,
    format_name: str | None,
    output: str,
    wanted: str | None,
    dry_run: bool,
    findings: bool,
    bar: bool,
    progress: str | None,
    quiet: bool,
    force_share: bool,
    **access: Unpack[options.Access],
) -> int:
    """Say whether an image's metadata are sound, and mend them.

    The image alone is looked at: nothing that it names is opened. Exit status: 0 sound, 1 the check
    failed, 2 corrupt, 3 nothing but leaks, 63 the format cannot be checked.
    """
    _see_sense(wanted, dry_run=dry_run)
    name = options.one_name(names)
    changes = wanted is not None and not dry_run
    target, opening = options.named(
        name, format_name, access, force_share=force_share, writable=changes
    )
    lines = _Lines()
    try:
        with reporting(bar=bar, progress=progress, quiet=quiet, steps=True) as told:
            if wanted is None:
                result = check(target, progress=told, report=lines.show, **opening)
            else:
                result = repair(
                    target,
                    leaks_only=wanted == "leaks",
                    dry_run=dry_run,
                    progress=told,
                    report=lines.show,
                    **opening,
                )
    except UnsupportedOperationError:
        raise CommandError("This image format does not support checks", status=_NO_CHECK) from None
    lines.end(result)
    if not quiet:
        if output == "json":
            echo_json(_as_json(name, result, findings=findings, planned=dry_run))
        else:
            for line in _human(result, findings=findings, planned=dry_run):
                echo(line)
    if result.check_errors:
        raise CommandError("Check failed")
    return _CORRUPT if result.corruptions else _LEAKS if result.leaks else 0


def _see_sense(wanted: str | None, *, dry_run: bool) -> None:
    if wanted not in {None, "leaks", "all"}:
        raise click.UsageError(
            f"Unknown option value for -r (expecting 'leaks' or 'all'): {wanted}"
        )
    if dry_run and wanted is None:
        raise CommandError("--dry-run requires use of -r flag")


class _Lines:
    """qemu-img's line for each finding, on stderr; the plan of a repair is shown at the end."""

    def __init__(self) -> None:
        self._told = 0

    def show(self, found: Finding | Repair) -> None:
        """Say what was found."""
        if isinstance(found, Finding):
            self._told += 1
            for line in (found.line or found.what).splitlines():
                say(printable(line))

    def end(self, result: CheckResult) -> None:
        """Say how many were only counted."""
        untold = len(result.findings) + result.findings_omitted - self._told
        if untold:
            say(f"and {untold} more findings")


def _as_json(name: str, result: CheckResult, *, findings: bool, planned: bool) -> dict[str, object]:
    shown: dict[str, object] = {}
    for field, source in _FIELDS.items():
        value = name if source is None else getattr(result, source)
        if value or field == "check-errors":
            shown[field] = value
    if findings:
        shown["findings"] = [_as_object(finding) for finding in result.findings]
        shown["findings-omitted"] = result.findings_omitted
    if planned:
        shown["repairs"] = [_as_object(repair) for repair in result.repairs]
        shown["repairs-omitted"] = result.repairs_omitted
    return shown


def _as_object(item: Finding | Repair) -> dict[str, object]:
    if isinstance(item, Finding):
        fields: dict[str, object] = {"kind": item.kind, "what": item.what, "offset": item.offset}
        fields |= {"found": item.found, "expected": item.expected}
    else:
        fields = {"what": item.what, "offset": item.offset}
        fields |= {"before": item.before, "after": item.after}
    return {name: value for name, value in fields.items() if value is not None}


def _human(result: CheckResult, *, findings: bool, planned: bool) -> Iterator[str]:
    if findings:
        for finding in result.findings:
            yield printable(f"{finding.kind}: {finding.what}{_values(finding)}")
        if result.findings_omitted:
            yield f"and {result.findings_omitted} more findings"
    if planned:
        yield from _plan(result)
    elif result.corruptions_fixed or result.leaks_fixed:
        yield (
            "The following inconsistencies were found and repaired:\n\n"
            f"    {result.leaks_fixed} leaked clusters\n"
            f"    {result.corruptions_fixed} corruptions\n\n"
            "Double checking the fixed image now..."
        )
    yield from _verdict(result)
    if result.total_clusters and result.allocated_clusters:
        allocated = result.allocated_clusters
        yield (
            f"{allocated}/{result.total_clusters} = "
            f"{allocated * 100 / result.total_clusters:.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        yield f"Image end offset: {result.image_end_offset}"


def _verdict(result: CheckResult) -> Iterator[str]:
    if not (result.corruptions or result.leaks or result.check_errors):
        yield "No errors were found on the image."
    if result.corruptions:
        yield (
            f"\n{result.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if result.leaks:
        yield (
            f"\n{result.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if result.check_errors:
        yield f"\n{result.check_errors} internal errors have occurred during the check."


def _plan(result: CheckResult) -> Iterator[str]:
    yield f"A repair would mend {result.leaks_fixed} leaks and {result.corruptions_fixed} errors:"
    for number, item in enumerate(result.repairs, 1):
        change = "" if item.before is None else f", from {item.before:#x} to {item.after:#x}"
        yield printable(f"{number:6}. at {item.offset:#x}: {item.what}{change}")
    if result.repairs_omitted:
        yield f"        and {result.repairs_omitted} more changes"


def _values(finding: Finding) -> str:
    values = [] if finding.found is None else [f"found {finding.found:#x}"]
    values += [] if finding.expected is None else [f"expected {finding.expected:#x}"]
    return f" ({', '.join(values)})" if values else ""
