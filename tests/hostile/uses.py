"""What is done with a hostile image, each in a child of its own (see ``child``).

A use lets through whatever the library raises when it opens the image. What comes to light later is
part of its answer, as far as it is one of the library's own errors; any other escapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import attrs

import underlay
import underlay.jobs
from underlay import DirectoryGate, SyncFormatAccess, UnderlayError
from underlay.capabilities import CheckResult

__all__ = [
    "READ",
    "READ_ONLY",
    "WRITTEN",
    "Contents",
    "Faults",
    "Mended",
    "Written",
    "change",
    "check",
    "info",
    "inspect",
    "look",
    "mend",
    "probe",
    "read",
    "write",
]

#: No more guest bytes than these are read, from the start of the disk.
READ = 8 << 20
#: Bytes read with one call, and again in pieces of ``_SMALLEST`` where that fails.
_CHUNK = 64 << 10
_SMALLEST = 512
#: What ``write`` writes.
WRITTEN = b"\xa5 written by a test " * 300


@attrs.frozen(kw_only=True)
class Contents:
    """What a full read came to."""

    size: int
    #: How many guest bytes were to be read, from the start of the disk.
    length: int
    #: Those that are not zero, by their offsets; zero is also what reading fails for.
    pieces: tuple[tuple[int, bytes], ...]
    #: From, to: where reading fails.
    failed: tuple[tuple[int, int], ...]
    #: What the error was, where there was one.
    error: str | None

    @property
    def data(self) -> bytes:
        """The guest bytes."""
        data = bytearray(self.length)
        for offset, piece in self.pieces:
            data[offset : offset + len(piece)] = piece
        return bytes(data)


@attrs.frozen(kw_only=True)
class Faults:
    """What a check found."""

    corruptions: int
    leaks: int
    errors: int


@attrs.frozen(kw_only=True)
class Written:
    """What a write came to."""

    #: What was refused, or None: "open", "write", "flush", "close".
    refused: str | None = None
    error: str | None = None
    #: Afterwards, if it worked.
    contents: Contents | None = None
    faults: Faults | str | None = None


@attrs.frozen(kw_only=True)
class Mended:
    """What a repair came to."""

    left: Faults
    #: Afterwards, or why that cannot be read.
    contents: Contents | str


# -- read-only


def probe(path: str) -> tuple[str | None, bool]:
    """The format, and whether it is guessed."""
    result = underlay.probe(path)
    return result.format, result.guessed


def inspect(path: str) -> str:
    """The verdict."""
    report = underlay.inspect(path)
    report.as_json()
    return report.verdict


def info(path: str) -> list[str]:
    """What each image of the chain is called; of an image that names others, itself alone."""
    return [one.filename for one in underlay.jobs.info(path, format="qcow2")]


def check(path: str) -> Faults:
    """What is wrong with it."""
    return _faults(underlay.jobs.check(path, format="qcow2"))


def _faults(result: CheckResult) -> Faults:
    return Faults(corruptions=result.corruptions, leaks=result.leaks, errors=result.check_errors)


def read(path: str) -> Contents:
    """Every guest byte; files in the image's own folder may be opened for it."""
    with underlay.open_image(path, format="qcow2", gate=DirectoryGate()) as disk:
        return _contents(disk)


def look(path: str) -> list[str]:
    """Everything else that can be asked of an image: the errors that told it no."""
    jobs = underlay.jobs
    told: list[str] = []
    bitmaps: list[str] = []
    snapshots: list[str] = []
    with underlay.open_image(path, format="qcow2", gate=DirectoryGate()) as disk:
        _attempt(told, lambda: list(jobs.map_image(disk)))
        _attempt(told, lambda: jobs.digest(disk))
        _attempt(told, lambda: bitmaps.extend(one.name for one in jobs.bitmaps(disk)))
        for name in bitmaps:
            _attempt(told, partial(_read_bitmap, disk, name))
        _attempt(told, lambda: snapshots.extend(one.id for one in jobs.snapshots(disk)))
    for name in snapshots[:10]:
        _attempt(told, partial(_read_snapshot, path, name))
    return told


def _attempt(told: list[str], step: Callable[[], object]) -> None:
    """Take a step; what told it no is part of the answer."""
    try:
        step()
    except UnderlayError as error:
        told.append(f"{type(error).__name__}: {error}")


def _read_bitmap(disk: SyncFormatAccess, name: str) -> None:
    list(underlay.jobs.dirty_ranges(disk, name))


def _read_snapshot(path: str, name: str) -> None:
    with underlay.open_image(path, format="qcow2", snapshot=name, gate=DirectoryGate()) as disk:
        _contents(disk)


# -- on a copy


def write(path: str, offset: int) -> Written:
    """Write there, and read it all again."""
    disk = underlay.open_image(path, format="qcow2", writable=True, gate=DirectoryGate())
    length = min(len(WRITTEN), disk.size - offset) if offset < disk.size else len(WRITTEN)
    try:
        steps: dict[str, Callable[[], None]] = {
            "write": lambda: disk.write(WRITTEN[:length], offset),
            "flush": disk.flush,
            "close": disk.close,
        }
        for stage, step in steps.items():
            try:
                step()
            except UnderlayError as error:
                return Written(refused=stage, error=f"{type(error).__name__}: {error}")
    finally:
        _end(disk)
    try:
        faults: Faults | str = check(path)
    except UnderlayError as error:
        faults = str(error)
    return Written(contents=read(path), faults=faults)


def mend(path: str) -> Mended:
    """Repair it, and read it all."""
    left = _faults(underlay.jobs.repair(path, format="qcow2"))
    try:
        contents: Contents | str = read(path)
    except UnderlayError as error:
        contents = str(error)
    return Mended(left=left, contents=contents)


def change(path: str) -> list[str]:
    """Everything else that changes an image, one after the other: what was refused, and why."""
    jobs = underlay.jobs
    told: list[str] = []
    steps: list[Callable[[], object]] = [
        lambda: _each_snapshot(path, jobs.apply_snapshot),
        lambda: jobs.create_snapshot(path, "taken", format="qcow2"),
        lambda: _each_snapshot(path, jobs.delete_snapshot),
        lambda: _each_bitmap(path, jobs.clear_bitmap),
        lambda: jobs.add_bitmap(path, "added", format="qcow2"),
        lambda: _each_bitmap(path, jobs.remove_bitmap),
        lambda: _discard(path),
        lambda: jobs.resize(path, 5 << 20, format="qcow2"),
        lambda: jobs.amend(path, {"lazy_refcounts": True}, format="qcow2"),
        lambda: check(path),
    ]
    for step in steps:
        _attempt(told, step)
    return told


def _each_snapshot(path: str, change: Callable[..., None]) -> None:
    for snapshot in underlay.jobs.snapshots(path, format="qcow2")[:3]:
        change(path, snapshot.id, format="qcow2")


def _each_bitmap(path: str, change: Callable[..., None]) -> None:
    for bitmap in underlay.jobs.bitmaps(path, format="qcow2")[:3]:
        change(path, bitmap.name, format="qcow2")


def _discard(path: str) -> None:
    with underlay.open_image(path, format="qcow2", writable=True, gate=DirectoryGate()) as disk:
        disk.discard_to_zero(0, min(disk.size, 1 << 20))


def _end(disk: SyncFormatAccess) -> None:
    """Close it, whatever that comes to: what matters was told before."""
    with contextlib.suppress(UnderlayError):
        disk.close()


def _contents(disk: SyncFormatAccess) -> Contents:
    length = min(disk.size, READ)
    data = bytearray(length)
    failed: list[tuple[int, int]] = []
    errors: list[str] = []

    def attempt(start: int, end: int) -> bool:
        try:
            disk.read(memoryview(data)[start:end], start)
        except UnderlayError as error:
            errors.append(f"{type(error).__name__}: {error}")
            data[start:end] = bytes(end - start)
            return False
        return True

    for start in range(0, length, _CHUNK):
        end = min(start + _CHUNK, length)
        if attempt(start, end):
            continue
        for since in range(start, end, _SMALLEST):
            until = min(since + _SMALLEST, end)
            if not attempt(since, until):
                if failed and failed[-1][1] == since:
                    failed[-1] = failed[-1][0], until
                else:
                    failed.append((since, until))
    return Contents(
        size=disk.size,
        length=length,
        pieces=tuple(
            (offset, piece)
            for offset in range(0, length, _CHUNK)
            if any(piece := bytes(data[offset : offset + _CHUNK]))
        ),
        failed=tuple(failed),
        error=errors[0] if errors else None,
    )


#: Those that must leave the file as it is.
READ_ONLY: tuple[Callable[[str], object], ...] = (probe, inspect, info, check, read, look)
