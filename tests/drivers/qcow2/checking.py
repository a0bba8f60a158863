"""Checking and repairing images that are held as bytes."""

from __future__ import annotations

from collections.abc import Callable

from underlay.capabilities import CheckResult, Finding, Repair
from underlay.driver import FormatOpenOptions
from underlay.face import run_blocking
from underlay.handle import StorageHandle
from underlay.limits import DEFAULT_LIMITS, Limits
from underlay_drivers.qcow2 import Qcow2
from underlay_storage.memory import MemoryStorage

from .images import open_bytes

__all__ = ["check_bytes", "exit_status", "repair_bytes"]


def check_bytes(
    data: bytes | bytearray,
    *,
    report: Callable[[Finding], None] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> CheckResult:
    """Check an image, which must stay as it is."""
    with open_bytes(data, to_check=True, limits=limits) as disk:
        return run_blocking(disk.check(report=report))


def repair_bytes(
    data: bytes | bytearray,
    *,
    leaks_only: bool = False,
    dry_run: bool = False,
    report: Callable[[Finding | Repair], None] | None = None,
) -> tuple[CheckResult, bytearray]:
    """Repair an image, and say what its bytes are then."""
    storage = MemoryStorage(bytes(data))
    handle = StorageHandle(storage, owned=True)
    options = FormatOpenOptions(storage=handle, writable=True, to_check=True)
    disk = run_blocking(Qcow2.open(options))
    try:
        result = run_blocking(disk.repair(leaks_only=leaks_only, dry_run=dry_run, report=report))
    finally:
        run_blocking(disk.close())
    after = bytearray(storage.size())
    storage.readv((after,), 0)
    run_blocking(handle.close())
    return result, after


def exit_status(result: CheckResult) -> int:
    """What qemu-img exits with."""
    if result.check_errors:
        return 1
    if result.corruptions:
        return 2
    return 3 if result.leaks else 0
