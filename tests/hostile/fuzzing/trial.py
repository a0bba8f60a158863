"""Puts one image to every use, and says which rules were broken.

The rules: nothing but our own errors, each of one line; looking leaves every byte as it is; so does
a refused open for writing; and what was written to, mended or changed is no worse than before, by
the second opinion of tests/crash. Who runs it watches time, memory and what is opened.
"""

from __future__ import annotations

import io
import pickle
import random
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import attrs

import underlay
from underlay import SyncFormatAccess, jobs
from underlay.capabilities import (
    Amendable,
    BitmapStore,
    CheckResult,
    CompressedWriter,
    Snapshottable,
)
from underlay.errors import ImplicitOpenDeniedError, UnderlayError
from underlay_storage.memory import MemoryStorage

from ...crash.structure import Verdict
from .opinion import new_faults, opinion, unseen

__all__ = ["FilePlace", "MemoryPlace", "Place", "Trial"]

_KIB = 1 << 10
#: Of a longer file nobody looks at the content: counts that say that much is used make it sparse.
_MOST = 64 << 20
#: Of a disk, how much is read: from its beginning, in such pieces.
_READ = 8 << 20
_PIECE = 64 * _KIB
#: How many of its extents are walked.
_EXTENTS = 4096

Target = Path | MemoryStorage
#: A use of an image that may change it.
Change = Callable[[SyncFormatAccess, random.Random], object]


class Place(Protocol):
    """Where an image is put to be used."""

    def put(self, data: bytes | bytearray) -> Target:
        """Put it there."""
        ...

    def content(self) -> bytes:
        """What has become of it."""
        ...


class FilePlace:
    """A file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, data: bytes | bytearray) -> Target:
        self._path.write_bytes(data)
        return self._path

    def content(self) -> bytes:
        size = self._path.stat().st_size
        return self._path.read_bytes() if size <= _MOST else bytes(_MOST + 1)


class MemoryPlace:
    """An object in memory."""

    def __init__(self) -> None:
        self._storage = MemoryStorage(b"")

    def put(self, data: bytes | bytearray) -> Target:
        self._storage = MemoryStorage(bytes(data))
        return self._storage

    def content(self) -> bytes:
        content = bytearray(self._storage.size())
        self._storage.readv((content,), 0)
        return bytes(content)


@attrs.define
class Trial:
    """The uses of one image after the other, and what broke a rule."""

    data: bytes
    place: Place
    #: Chooses what is written and changed.
    chance: random.Random
    #: What its external data file holds, should it have one.
    data_file: bytes = b""
    #: Told of each use as it begins.
    begins: Callable[[str], object] = attrs.field(default=lambda _use: None)
    problems: list[str] = attrs.field(factory=list[str], init=False)
    #: The second opinion on it, once that is asked for.
    _before: tuple[Verdict | None] | None = attrs.field(default=None, init=False)

    def run(self) -> list[str]:
        """All uses; what broke a rule."""
        self.look()
        self.mend()
        self.write()
        self.alter()
        return self.problems

    # -- uses that change nothing

    def look(self) -> None:
        """Probe it, inspect it, ask what it says of itself, check it and read it."""
        target = self.place.put(self.data)
        with self._use("probe"):
            underlay.probe(target)
        with self._use("inspect"):
            underlay.inspect(target).as_json()
        with self._use("info"):
            for image in jobs.info(target):
                jobs.image_info_json(image)
        with self._use("check"):
            jobs.check(target)
        with self._use("read"), self._open(target) as disk:
            _read(disk)
            _list(disk)
        if self.place.content() != self.data:
            self.problems.append("looking at it has changed it")

    # -- uses that may change it

    def mend(self) -> None:
        """Repair a copy."""
        target = self.place.put(self.data)
        results: list[CheckResult] = []
        with self._use("repair"):
            results.append(jobs.repair(target))
        after = self.place.content()
        if not results:
            return
        (result,) = results
        if not result.corruptions and not result.check_errors and self._is_qcow2(after):
            left = unseen(after)
            if left:
                self.problems.append(f"repair: it says that all is well, but {left[:3]}")
        self._compare("repair", after, checked=True)

    def write(self) -> None:
        """Write to a copy."""
        self._change("write", _write)

    def alter(self) -> None:
        """Change something else about a copy: its size, snapshots, bitmaps, options."""
        self._change("alter", _alter)

    def _change(self, use: str, change: Change) -> None:
        target = self.place.put(self.data)
        opened = False
        with self._use(use), self._open(target, writable=True) as disk:
            opened = True
            change(disk, self.chance)
        after = self.place.content()
        if not opened and after != self.data:
            self.problems.append(f"{use}: the refused open has changed it")
        if opened:
            self._compare(use, after)

    def _compare(self, use: str, after: bytes, *, checked: bool = False) -> None:
        """Whether it is no worse."""
        if after == self.data or len(after) > _MOST or not self._is_qcow2(self.data):
            return
        if self._before is None:
            self._before = (opinion(self.data),)
        faults = new_faults(self.data, *self._before, after, checked=checked)
        if faults:
            self.problems.append(f"{use}: it is worse than before: {faults[:3]}")

    @staticmethod
    def _is_qcow2(data: bytes) -> bool:
        return data[:4] == b"QFI\xfb"

    # -- the rules that hold for each use

    @contextmanager
    def _use(self, use: str) -> Generator[None]:
        self.begins(use)
        try:
            yield
        except UnderlayError as error:
            self._look_at(use, error)
        except Exception:  # noqa: BLE001 (this is what must not happen)
            self.problems.append(f"{use}: {_short(traceback.format_exc())}")

    def _look_at(self, use: str, error: UnderlayError) -> None:
        """An error is one line, and goes to another process as it is."""
        said = str(error)
        if "\n" in said or not said.isprintable():
            self.problems.append(f"{use}: the error is not one line: {said!r}")
        try:
            again: object = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own)
        except Exception as broken:  # noqa: BLE001 (this is what must not happen)
            again = broken
        if type(again) is not type(error) or str(again) != said:
            self.problems.append(f"{use}: the error does not pickle: {said!r}")

    def _open(self, target: Target, *, writable: bool = False) -> SyncFormatAccess:
        """By its own word, or where that needs other objects, without or with ours."""
        try:
            return underlay.open_any(target, writable=writable)
        except ImplicitOpenDeniedError:
            return underlay.open_image(
                target,
                format="qcow2",
                writable=writable,
                backing=None,
                data_file=MemoryStorage(self.data_file),
            )


def _read(disk: SyncFormatAccess) -> None:
    """Read what is there, past damage too."""
    buffer = bytearray(_PIECE)
    starts = list(range(0, min(disk.size, _READ), _PIECE))
    for start in [*starts, max(disk.size - _PIECE, 0)]:
        with suppress(UnderlayError):
            disk.read(buffer, start)
    for number, _ in enumerate(disk.extents()):
        if number == _EXTENTS:
            break


def _list(disk: SyncFormatAccess) -> None:
    """What it keeps besides its data."""
    store = disk.capability(BitmapStore)
    if store is not None:
        for bitmap in store.bitmaps():
            with suppress(UnderlayError):
                store.dirty_ranges(bitmap.name)
    table = disk.capability(Snapshottable)
    if table is not None:
        for snapshot in table.snapshots():
            str(snapshot)


def _write(disk: SyncFormatAccess, chance: random.Random) -> None:
    """Write a few ranges, anyhow."""
    size = min(disk.size, _READ)
    for _ in range(5):
        length = min(chance.choice((1, 512, 3 * _KIB, 64 * _KIB, 100 * _KIB)), size)
        offset = chance.randrange(0, max(size - length, 0) + 1, 512) if size else 0
        what = chance.randrange(5)
        if what == 0:
            disk.write_zeroes(offset, length)
        elif what == 1:
            disk.discard_to_any(offset, length)
        else:
            disk.write(b"\xa5" * length, offset)
    disk.flush()
    if chance.random() < 0.5:
        disk.write(b"\x5a" * min(512, size), 0)


def _alter(disk: SyncFormatAccess, chance: random.Random) -> None:
    """Change something about it that is not data."""
    chance.choice((_resize, _snapshots, _snapshots, _bitmaps, _amend, _compress))(disk, chance)


def _resize(disk: SyncFormatAccess, chance: random.Random) -> None:
    # Growth by much may need a table as large as the limits allow: that is honest work.
    disk.resize(chance.choice((disk.size // 2, disk.size + 1024 * _KIB, 512, 0)))


def _snapshots(disk: SyncFormatAccess, chance: random.Random) -> None:
    table = disk.capability(Snapshottable)
    if table is None:
        return
    known = [snapshot.id for snapshot in table.snapshots()]
    what = chance.randrange(4) if known else 0
    if what == 0:
        table.create_snapshot("new")
        disk.write(b"\x77" * min(512, disk.size), 0)
    elif what == 1:
        table.apply_snapshot(chance.choice(known))
    else:
        table.delete_snapshot(chance.choice(known))


def _bitmaps(disk: SyncFormatAccess, chance: random.Random) -> None:
    store = disk.capability(BitmapStore)
    if store is None:
        return
    known = [bitmap.name for bitmap in store.bitmaps()]
    what = chance.randrange(5) if known else 0
    if what == 0:
        store.add_bitmap("new")
        disk.write(b"\x77" * min(512, disk.size), 0)
    elif what == 1:
        store.remove_bitmap(chance.choice(known))
    elif what == 2:
        store.clear_bitmap(chance.choice(known))
    elif what == 3:
        store.merge_bitmap(known[0], known[-1])
    else:
        store.enable_bitmap(chance.choice(known))


def _amend(disk: SyncFormatAccess, chance: random.Random) -> None:
    options: tuple[dict[str, object], ...] = (
        {"compat": "v2"},
        {"compat": "v3"},
        {"lazy_refcounts": True},
        {"refcount_bits": 8},
        {"backing_file": "", "backing_fmt": ""},
    )
    ability = disk.capability(Amendable)
    if ability is not None:
        ability.amend(chance.choice(options))


def _compress(disk: SyncFormatAccess, chance: random.Random) -> None:
    writer = disk.capability(CompressedWriter)
    if writer is None:
        return
    unit = writer.encoded_unit()
    encoded = writer.encode(memoryview(b"compress me. " * (unit // 13 + 1))[:unit])
    units = min(disk.size, _READ) // unit
    if encoded is not None and units:
        writer.write_encoded(chance.randrange(units) * unit, encoded)


def _short(trace: str) -> str:
    """The end of a traceback."""
    lines = io.StringIO(trace).readlines()
    return "".join(lines[-12:])
