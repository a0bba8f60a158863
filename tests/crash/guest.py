"""What a guest does to a disk, and what the disk must then hold."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias

import attrs

from underlay import SyncFormatAccess
from underlay.capabilities import Amendable, CompressedWriter, Snapshottable
from underlay.errors import LimitExceededError, OptionError, UnsupportedOperationError
from underlay.storage import PreallocateMode

from .bitmap_operations import ChangeBitmap, CopyBitmaps
from .bitmaps import Kept
from .journal import SECTOR, Begun, Flushed, Journal

__all__ = [
    "Amend",
    "Apply",
    "ChangeBitmap",
    "Compress",
    "CopyBitmaps",
    "Delete",
    "Discard",
    "Flush",
    "Grow",
    "History",
    "Moment",
    "Operation",
    "Push",
    "Reread",
    "Shrink",
    "Take",
    "WriteData",
    "WriteZeroes",
    "carry_out",
    "fitting",
    "pattern",
    "perform",
]


def pattern(number: int, offset: int, length: int) -> bytes:
    """Bytes that tell by which operation they were written, and where."""
    first, end = offset // SECTOR, offset + length
    words = b"".join(
        struct.pack("<II", number, sector) * (SECTOR // 8)
        for sector in range(first, -(-end // SECTOR))
    )
    start = offset - first * SECTOR
    return words[start : start + length]


@attrs.frozen
class Moment:
    """What the guest sees at one time."""

    content: bytes
    #: The operation before which a snapshot was taken, by its name.
    snapshots: dict[str, int] = attrs.field(factory=dict[str, int])
    bitmaps: dict[str, Kept] = attrs.field(factory=dict[str, Kept])


# -- operations


@attrs.frozen
class WriteData:
    """Write a pattern."""

    offset: int
    length: int

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        disk.write(pattern(number, self.offset, self.length), self.offset)

    def after(self, history: History, number: int) -> Moment:
        data = pattern(number, self.offset, self.length)
        return history.replaced(self.offset, data)


@attrs.frozen
class WriteZeroes:
    """Make a range zero."""

    offset: int
    length: int

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        disk.write_zeroes(self.offset, self.length)

    def after(self, history: History, number: int) -> Moment:
        return history.replaced(self.offset, bytes(self.length))


@attrs.frozen
class Discard:
    """Make a range zero, and give its space back."""

    offset: int
    length: int

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        disk.discard_to_zero(self.offset, self.length)

    def after(self, history: History, number: int) -> Moment:
        return history.replaced(self.offset, bytes(self.length))


@attrs.frozen
class Compress:
    """Store a cluster compressed."""

    offset: int
    length: int

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        data = pattern(number, self.offset, self.length)
        writer = disk.capability(CompressedWriter)
        encoded = writer.encode(memoryview(data))
        if encoded is None:
            disk.write(data, self.offset)
        else:
            writer.write_encoded(self.offset, encoded)

    def after(self, history: History, number: int) -> Moment:
        return history.replaced(self.offset, pattern(number, self.offset, self.length))


@attrs.frozen
class Take:
    """Take an internal snapshot, if there is none of that name."""

    name: str

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        snapshots = disk.capability(Snapshottable)
        if all(snapshot.name != self.name for snapshot in snapshots.snapshots()):
            snapshots.create_snapshot(self.name)

    def after(self, history: History, number: int) -> Moment:
        now = history.now
        if self.name in now.snapshots:
            return now
        return attrs.evolve(now, snapshots=now.snapshots | {self.name: number - 1})


@attrs.frozen
class Apply:
    """Go back to an internal snapshot, if it is there."""

    name: str

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        snapshots = disk.capability(Snapshottable)
        if any(snapshot.name == self.name for snapshot in snapshots.snapshots()):
            snapshots.apply_snapshot(self.name)

    def after(self, history: History, number: int) -> Moment:
        now = history.now
        if self.name not in now.snapshots:
            return now
        taken = now.snapshots[self.name]
        return attrs.evolve(now, content=history.moments[taken].content)


@attrs.frozen
class Delete:
    """Remove an internal snapshot, if it is there."""

    name: str

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        snapshots = disk.capability(Snapshottable)
        if any(snapshot.name == self.name for snapshot in snapshots.snapshots()):
            snapshots.delete_snapshot(self.name)

    def after(self, history: History, number: int) -> Moment:
        now = history.now
        rest = {name: taken for name, taken in now.snapshots.items() if name != self.name}
        return attrs.evolve(now, snapshots=rest)


@attrs.frozen
class Grow:
    """Make the disk longer by so many bytes."""

    by: int
    preallocation: PreallocateMode = PreallocateMode.OFF

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        disk.resize(disk.size + self.by, self.preallocation)

    def after(self, history: History, number: int) -> Moment:
        now = history.now
        return attrs.evolve(now, content=now.content + bytes(self.by))


@attrs.frozen
class Shrink:
    """Cut so many bytes off the disk."""

    by: int

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        disk.resize(max(disk.size - self.by, SECTOR))

    def after(self, history: History, number: int) -> Moment:
        now = history.now
        size = max(len(now.content) - self.by, SECTOR)
        return attrs.evolve(now, content=now.content[:size])


@attrs.frozen
class Amend:
    """Change what the image was created with."""

    option: str
    value: object

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        disk.capability(Amendable).amend({self.option: self.value})

    def after(self, history: History, number: int) -> Moment:
        return history.now


@attrs.frozen
class Flush:
    """Make everything durable."""

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        disk.flush()
        disk.sync()

    def after(self, history: History, number: int) -> Moment:
        return history.now


@attrs.frozen
class Push:
    """Write what is in memory, without making it durable: a driver does that when it has to."""

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        disk.flush()

    def after(self, history: History, number: int) -> Moment:
        return history.now


@attrs.frozen
class Reread:
    """Read all tables anew, when nothing waits to be written or freed any more."""

    def run(self, disk: SyncFormatAccess, number: int) -> None:
        disk.flush()
        disk.sync()
        disk.flush()
        disk.invalidate_cache()

    def after(self, history: History, number: int) -> Moment:
        return history.now


Operation: TypeAlias = (
    WriteData
    | WriteZeroes
    | Discard
    | Compress
    | Take
    | Apply
    | Delete
    | Grow
    | Shrink
    | Amend
    | ChangeBitmap
    | CopyBitmaps
    | Flush
    | Push
    | Reread
)


@attrs.define
class History:
    """What the disk held before the first operation, and after each one."""

    moments: list[Moment]
    #: The number of the last operation before the image was opened.
    start: int = 0

    @property
    def now(self) -> Moment:
        """After the last operation."""
        return self.moments[-1]

    def add(self, operation: Operation) -> int:
        """Append an operation's moment; its number."""
        number = len(self.moments)
        self.moments.append(operation.after(self, number))
        return number

    def replaced(self, offset: int, data: bytes) -> Moment:
        """Now, with other bytes at a place."""
        content = self.now.content
        changed = content[:offset] + data + content[offset + len(data) :]
        return attrs.evolve(self.now, content=changed[: len(content)])


def perform(
    open_disk: Callable[[], SyncFormatAccess],
    operations: Sequence[Operation],
    journal: Journal,
    history: History,
) -> None:
    """Carry operations out, and close the disk; journal and history tell about it."""
    disk = open_disk()
    try:
        for operation in operations:
            clipped = fitting(operation, len(history.now.content))
            number = history.add(clipped)
            journal.add(Begun(number))
            carry_out(clipped, disk, number, history)
            if isinstance(clipped, Flush):
                journal.add(Flushed(number))
        number = len(history.moments)
        history.moments.append(history.now)
        journal.add(Begun(number))
        disk.close()
        journal.add(Flushed(number))
    except BaseException:
        disk.abandon()
        raise


def carry_out(operation: Operation, disk: SyncFormatAccess, number: int, history: History) -> None:
    """Do what the history already has under this number."""
    try:
        operation.run(disk, number)
    except (LimitExceededError, OptionError, UnsupportedOperationError):
        # A cluster cannot be counted so often; version 2 has one size for all snapshots.
        assert isinstance(operation, Take | Apply | Grow | Shrink | Amend)
        history.moments[number] = history.moments[number - 1]


def fitting(operation: Operation, size: int) -> Operation:
    """The operation, inside a disk that may have been cut meanwhile."""
    if isinstance(operation, WriteData | WriteZeroes | Discard | Compress):
        offset = min(operation.offset, max(size - operation.length, 0))
        length = min(operation.length, size - offset)
        if isinstance(operation, Compress):
            offset -= offset % operation.length
            if length < operation.length:
                return Flush()
        return attrs.evolve(operation, offset=offset, length=length)
    return operation
