"""``inspect``: whether an image from a stranger may be handed to a machine, with reasons.

Reads one object and opens nothing else, whatever the image says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from underlay.capabilities import Feature, Inspectable, Inspection, offers
from underlay.chain import quotable
from underlay.driver import FormatOpenOptions
from underlay.errors import (
    PluginConflictError,
    PluginError,
    StorageError,
    UnderlayError,
    UnsupportedFeatureError,
)
from underlay.gate import Reference
from underlay.handle import StorageHandle
from underlay.limits import DEFAULT_LIMITS, Limits
from underlay.plugins import registry
from underlay.probing import ProbeFailure
from underlay.recognition import judge_view, read_view
from underlay.targets import Target, open_storage

__all__ = ["REPORT_VERSION", "InspectionReport", "inspect"]

#: Of ``InspectionReport.as_json``: raised when a field changes its meaning or goes away.
REPORT_VERSION = 1

Verdict = Literal["safe", "unsafe", "unknown"]


@attrs.frozen(kw_only=True)
class InspectionReport:
    """What was found in one object, and what it means."""

    filename: str
    #: ``"safe"``: it opens, names nothing else, and nothing is wrong with it. ``"unsafe"``: it must
    #: not be used as it is. ``"unknown"``: that could not be told.
    verdict: Verdict
    #: One sentence for each thing that is not as it should be; empty where all is well.
    reasons: tuple[str, ...]
    #: The format, or None where none or more than one matches.
    format: str | None
    #: Nothing matched; raw is merely what is left.
    guessed: bool
    #: Every format that matches, with what was recognised.
    matches: Mapping[str, str]
    #: Plug-ins that gave no verdict.
    failures: tuple[ProbeFailure, ...]
    #: Bytes in the object.
    file_size: int
    #: Bytes of the virtual disk, or None where that cannot be told.
    virtual_size: int | None
    encrypted: bool
    features: tuple[Feature, ...]
    #: Every other object that the image names; none of them was opened.
    references: tuple[Reference, ...]
    damage: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as plain values, with the version of this layout."""
        return {
            "version": REPORT_VERSION,
            "filename": self.filename,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "format": self.format,
            "guessed": self.guessed,
            "matches": [{"format": name, "reason": why} for name, why in self.matches.items()],
            "failures": [attrs.asdict(failure) for failure in self.failures],
            "file-size": self.file_size,
            "virtual-size": self.virtual_size,
            "encrypted": self.encrypted,
            "features": [attrs.asdict(feature) for feature in self.features],
            "references": [
                {"kind": ref.kind.value, "name": ref.name, "format": ref.format}
                for ref in self.references
            ],
            "damage": list(self.damage),
        }


async def inspect(
    target: Target,
    *,
    limits: Limits | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> InspectionReport:
    """Judge one untrusted object, reading it and opening nothing else; takes no lock.

    What is wrong with the image is reported, not raised.

    Raises:
        StorageError: the object itself cannot be opened or read.
    """
    limits = limits or DEFAULT_LIMITS
    storage = await open_storage(target, lock=False, storage_options=storage_options)
    try:
        return await _inspect(storage, limits)
    finally:
        await storage.close()


async def _inspect(storage: StorageHandle, limits: Limits) -> InspectionReport:
    view = await read_view(storage)
    judged = judge_view(view)
    result = judged.result
    unsafe: list[str] = []
    unknown: list[str] = []
    inspection = Inspection()
    if len(result.matches) > 1:
        unsafe.append(f"it looks like {' and like '.join(sorted(result.matches))} at once")
    elif result.format is not None:
        inspection = await _look(storage, result.format, limits, unsafe, unknown)
    unknown.extend(
        f"the format '{failure.format}' could not be asked: {failure.reason}"
        for failure in result.failures
    )
    unknown.extend(
        f"it bears the signature of {name}, which no plug-in here knows; to us it is raw"
        for name in judged.foreign
    )
    if not storage.size():
        unknown.append("it is empty")
    _judge(inspection, limits, unsafe, unknown)
    return InspectionReport(
        filename=storage.name(),
        verdict="unsafe" if unsafe else "unknown" if unknown else "safe",
        reasons=(*unsafe, *unknown),
        format=result.format,
        guessed=result.guessed,
        matches=result.matches,
        failures=result.failures,
        file_size=result.size,
        virtual_size=inspection.virtual_size,
        encrypted=inspection.encrypted,
        features=inspection.features,
        references=inspection.references,
        damage=inspection.damage,
    )


async def _look(
    storage: StorageHandle,
    format_name: str,
    limits: Limits,
    unsafe: list[str],
    unknown: list[str],
) -> Inspection:
    """What the driver makes of it: by its own inspection, and by opening it read-only."""
    inspection = Inspection()
    try:
        driver_class = registry().driver(format_name)
        inspectable: object = driver_class
        if offers(inspectable, Inspectable):
            inspection = await inspectable.inspect(storage, limits)
        driver = await driver_class.open(FormatOpenOptions(storage=storage, limits=limits))
        try:
            if not offers(inspectable, Inspectable):
                inspection = Inspection(
                    virtual_size=driver.size(), references=tuple(driver.references())
                )
        finally:
            await driver.close()
    except StorageError:
        raise
    except (PluginError, PluginConflictError) as error:
        unknown.append(f"the format could not be asked: {error}")
    except UnsupportedFeatureError as error:
        # That an encrypted image cannot be judged is said already.
        if not inspection.encrypted:
            unsafe.append(f"it does not open: {error}")
    except UnderlayError as error:
        unsafe.append(f"it does not open: {error}")
    except Exception as error:  # noqa: BLE001 - a stranger's driver may do anything
        unknown.append(f"the driver failed: {type(error).__name__}: {error}")
    return inspection


def _judge(inspection: Inspection, limits: Limits, unsafe: list[str], unknown: list[str]) -> None:
    unsafe.extend(
        f"it names the {reference.kind.value} '{quotable(reference.name)}'"
        for reference in inspection.references
    )
    unsafe.extend(
        f"it needs the unknown feature '{feature.name}'"
        for feature in inspection.features
        if feature.kind == "incompatible" and not feature.supported
    )
    unsafe.extend(inspection.damage)
    if inspection.encrypted:
        unknown.append("it is encrypted, so its data cannot be judged")
    size = inspection.virtual_size
    if size is not None and size > limits.virtual_size:
        unsafe.append(f"its virtual size is {size}, more than the limit {limits.virtual_size}")
