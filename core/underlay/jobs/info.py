"""What an image, or each image of its chain, says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from underlay.blocking import open_any, open_image
from underlay.capabilities import ImageDescription, Snapshot
from underlay.face import run_blocking
from underlay.gate import (
    Allow,
    Deny,
    DenyImplicitOpenGate,
    GateDecision,
    ImplicitOpenGate,
    ImplicitOpenRequest,
    OpenedObject,
    ReferenceKind,
    Substitute,
)
from underlay.info import ImageInfo
from underlay.limits import Limits
from underlay.naming import full_name, shown_name
from underlay.opening import open_without_references
from underlay.storage import BlockingStorage, ReadBuffers
from underlay.sync import SyncFormatAccess
from underlay.targets import Target

__all__ = ["image_info_json", "info", "snapshot_json"]

_NANOSECONDS = 1_000_000_000


def info(
    target: Target,
    *,
    format: str | None = None,
    backing_chain: bool = False,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    format_options: Mapping[str, object] | None = None,
) -> list[ImageInfo]:
    """What an image says of itself; opens exactly one object, whatever the image names.

    With ``backing_chain`` the images below follow, the top first. Each of them passes ``gate``.
    ``format_options`` are those of opening the image.

    Example::

        (image,) = underlay.jobs.info("disk.qcow2")
        print(image.format, image.virtual_size, image.description.backing_name)

    Raises:
        ImplicitOpenDeniedError: with ``backing_chain``, ``gate`` does not allow a backing image.
        UnderlayError: as ``underlay.open_any`` does.
    """
    common: dict[str, Any] = {
        "limits": limits,
        "lock": lock,
        "storage_options": storage_options,
    }
    if not backing_chain:
        core = run_blocking(
            open_without_references(target, format=format, format_options=format_options, **common)
        )
        with SyncFormatAccess(core) as disk:
            return _named([disk.info()])
    common["gate"] = _BackingOnly(gate or DenyImplicitOpenGate())
    common |= format_options or {}
    opened = (
        open_any(target, **common)
        if format is None
        else open_image(target, format=format, **common)
    )
    with opened as disk:
        return _named([layer.info() for layer in disk.chain()])


class _BackingOnly(ImplicitOpenGate):
    """The caller's gate for backing images; nothing else is opened, since no data is looked at."""

    __slots__ = ("_gate",)

    def __init__(self, gate: ImplicitOpenGate) -> None:
        self._gate = gate

    def decide(self, request: ImplicitOpenRequest) -> GateDecision:
        if request.reference.kind is ReferenceKind.BACKING:
            return self._gate.decide(request)
        return Substitute(_NotOpened(request.reference.name))

    def confirm(self, request: ImplicitOpenRequest, opened: OpenedObject) -> Allow | Deny:
        return self._gate.confirm(request, opened)


class _NotOpened(BlockingStorage):
    """Stands in for an object whose data nobody looks at."""

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        return self._name

    def size(self) -> int:
        return 0

    def readv(self, buffers: ReadBuffers, offset: int) -> None:
        raise AssertionError("info reads no data")


def _named(chain: list[ImageInfo]) -> list[ImageInfo]:
    """The same, each image called by the name under which the one above it finds it."""
    named: list[ImageInfo] = []
    for image in chain:
        name = image.filename
        if named:
            above = named[-1]
            name = shown_name(above.filename, above.description.backing_name, name)
        stored = image.description.backing_name
        full = None if stored is None else full_name(name, stored)
        named.append(attrs.evolve(image, filename=name, full_backing_name=full))
    return named


def image_info_json(info: ImageInfo) -> dict[str, object]:
    """The fields of ``qemu-img info --output=json``, in the order of version 7.2.

    Example::

        (image,) = underlay.jobs.info("disk.qcow2")
        print(underlay.jobs.image_info_json(image)["virtual-size"])
    """
    about = info.description
    fields: dict[str, object | None] = {
        "backing-filename-format": about.backing_format,
        "snapshots": [snapshot_json(snapshot) for snapshot in about.snapshots] or None,
        "virtual-size": info.virtual_size,
        "filename": info.filename,
        "cluster-size": about.cluster_size,
        "format": info.format,
        "actual-size": info.actual_size,
        "format-specific": _specific_json(info.format, about),
        "full-backing-filename": info.full_backing_name,
        "encrypted": about.encrypted or None,
        "compressed": about.compressed or None,
        "backing-filename": about.backing_name,
        "dirty-flag": about.dirty,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _specific_json(format_name: str, about: ImageDescription) -> dict[str, object] | None:
    return {"type": format_name, "data": dict(about.details)} if about.details else None


def snapshot_json(snapshot: Snapshot) -> dict[str, object]:
    """One snapshot, as ``info`` has it."""
    fields: dict[str, object | None] = {
        "icount": snapshot.icount,
        "vm-clock-nsec": snapshot.vm_clock_nsec % _NANOSECONDS,
        "name": snapshot.name,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // _NANOSECONDS,
        "id": snapshot.id,
        "vm-state-size": snapshot.vm_state_size,
    }
    return {name: value for name, value in fields.items() if value is not None}
