"""What becomes of a hostile image, in a few words, by QEMU's tools and by ours.

Both get copies of one image and the same four uses of it: information, a full read, a check, and a
write where the damage is. QEMU opens whatever the image names (see ``confined``); for ours the gate
allows the image's own folder.
"""

from __future__ import annotations

import enum
import re
import shutil
import signal
from pathlib import Path

import attrs

from underlay import UnderlayError

from .attacks import Done, command
from .bases import IMAGE, Base
from .child import Outcome, Warm
from .confined import Cell
from .confined import Done as Ended
from .judging import write_at
from .recipe import HARMLESS, Rule
from .uses import READ, WRITTEN, Contents, Written, info, read, write

__all__ = ["ASPECTS", "Case", "Verdict", "Word", "our_verdict", "their_verdict"]

#: Where the bit is that marks an image as corrupt.
_CORRUPT_AT, _CORRUPT = 79, 2
#: Where the size of the disk is.
_SIZE = slice(24, 32)
_SECTOR = 512


class Word(enum.StrEnum):
    """What one use came to."""

    WORKS = "works"
    #: An error, before the first byte.
    REFUSED = "refused"
    #: Of a read: some of it is an error, and the rest is right.
    FAILS = "fails"
    #: Of a read: some bytes are zero that were not, without an error.
    ZEROES = "zeroes"
    #: Of a read: some bytes are what was never there, without an error.
    OTHER_BYTES = "other bytes"
    #: Of a write: an error, and the image is marked as corrupt.
    MARKS = "marks"
    #: Of a write: it works, and changes other guest bytes too, or what can be read.
    SPOILS = "spoils"
    CRASHES = "crashes"
    HANGS = "hangs"


@attrs.frozen(kw_only=True)
class Verdict:
    """What became of an image."""

    info: Word
    read: Word
    #: The exit status: 0 sound, 1 could not be checked, 2 corrupt, 3 leaks.
    check: int | Word
    write: Word

    def __str__(self) -> str:
        if self == _REFUSED:
            return "refused"
        words = [f"{aspect} {getattr(self, aspect)}" for aspect in ASPECTS]
        # What can be opened to be read can be told of, and nothing else.
        expected = Word.REFUSED if self.read is Word.REFUSED else Word.WORKS
        return ", ".join(words[self.info is expected :])


ASPECTS = tuple(field.name for field in attrs.fields(Verdict))
_REFUSED = Verdict(info=Word.REFUSED, read=Word.REFUSED, check=1, write=Word.REFUSED)


@attrs.frozen
class Case:
    """An image to be judged."""

    image: bytes
    base: Base
    rule: Rule = HARMLESS

    @property
    def offset(self) -> int:
        """Where to write."""
        size = int.from_bytes(self.image[_SIZE], "big")
        return write_at(self.rule, self.base.content[:size])

    def length(self, disk: Contents | Word) -> int:
        """How many bytes to write to the disk."""
        room = disk.size - self.offset if isinstance(disk, Contents) else 0
        return min(len(WRITTEN), room) if room > 0 else len(WRITTEN)


# -- theirs


def their_verdict(case: Case, name: str, cell: Cell) -> Verdict:
    """QEMU's; the image is put into a folder of that name in the cell."""
    folder = cell.root / "images" / name
    folder.mkdir(parents=True)
    case.base.put(folder, case.image)
    try:
        return _Theirs(case, folder, cell).verdict()
    finally:
        shutil.rmtree(folder)


@attrs.frozen
class _Theirs:
    case: Case
    folder: Path
    cell: Cell

    def verdict(self) -> Verdict:
        told = self._run("qemu-img", "info", "-f", "qcow2", IMAGE)
        checked = self._run("qemu-img", "check", "-f", "qcow2", IMAGE)
        before = self._read()
        return Verdict(
            info=_end(told) or (Word.REFUSED if told.returncode else Word.WORKS),
            read=_reading(before, self.case.base.content),
            check=_end(checked) or checked.returncode,
            write=self._write(before),
        )

    def _run(self, tool: str, *words: str) -> Ended:
        return self.cell.run(f"images/{self.folder.name}", tool, *words)

    def _read(self) -> Contents | Word:
        copy = self.folder / "copy.raw"
        words = ("convert", "--salvage", "-f", "qcow2", "-O", "raw", IMAGE, copy.name)
        done = self._run("qemu-img", *words)
        if done.returncode:
            return _end(done) or Word.REFUSED
        size = copy.stat().st_size
        with copy.open("rb") as file:
            data = file.read(READ)
        copy.unlink()
        sectors = map(int, re.findall(r"error while reading offset (\d+)", done.stderr))
        return Contents(
            size=size,
            length=len(data),
            pieces=((0, data),),
            failed=tuple((sector, sector + _SECTOR) for sector in sectors),
            error=None,
        )

    def _write(self, before: Contents | Word) -> Word:
        length = self.case.length(before)
        line = f"write -P {WRITTEN[0]} {self.case.offset} {length}"
        done = self._run("qemu-io", "-f", "qcow2", "-c", line, IMAGE)
        end = _end(done)
        if end is not None:
            return end
        # Its exit status is no answer.
        if f"wrote {length}/{length} bytes" not in done.stdout:
            return _unwritten(self.case, self.folder)
        return _written(self.case, before, self._read())


def _end(done: Ended) -> Word | None:
    """How a tool ended that did not come to its end."""
    if done.returncode >= 0:
        return None
    return Word.HANGS if -done.returncode in {signal.SIGXCPU, signal.SIGKILL} else Word.CRASHES


# -- ours


def our_verdict(case: Case, folder: Path, warm: Warm) -> Verdict:
    """Ours; the image is put into a new folder."""
    folder.mkdir(parents=True)
    path = str(case.base.put(folder, case.image))
    told, before, checked, written = warm.run_all(
        [
            (info, (path,)),
            (read, (path,)),
            (command, (str(folder), "check", "-f", "qcow2", IMAGE)),
            (write, (path, case.offset)),
        ]
    )
    disk = before.value if isinstance(before.value, Contents) else _word(before)
    word = _word(written)
    if isinstance(written.value, Written):
        after = written.value.contents
        word = Word.REFUSED if after is None else _written(case, disk, after)
    if word is Word.REFUSED:
        word = _unwritten(case, folder)
    shutil.rmtree(folder)
    return Verdict(
        info=_word(told),
        read=_reading(disk, case.base.content),
        check=checked.value.status if isinstance(checked.value, Done) else _word(checked),
        write=word,
    )


def _word(outcome: Outcome) -> Word:
    if outcome.signal in {signal.SIGXCPU, signal.SIGKILL}:
        return Word.HANGS
    if outcome.error is None and outcome.signal is None:
        return Word.WORKS
    return Word.REFUSED if isinstance(outcome.error, UnderlayError) else Word.CRASHES


# -- both


def _reading(disk: Contents | Word, good: bytes) -> Word:
    """What a full read came to, where these were the bytes before the damage."""
    if isinstance(disk, Word):
        return disk
    data = disk.data
    # Where the lie makes the disk longer there is nothing.
    good = good[: len(data)].ljust(len(data), b"\0")
    failed = {at for start, end in disk.failed for at in range(start, end, _SECTOR)}
    wrong = [
        byte
        for at in range(0, len(data), _SECTOR)
        if at not in failed and data[at : at + _SECTOR] != good[at : at + _SECTOR]
        for byte, right in zip(data[at : at + _SECTOR], good[at : at + _SECTOR], strict=True)
        if byte != right
    ]
    if wrong:
        return Word.OTHER_BYTES if any(wrong) else Word.ZEROES
    return Word.FAILS if failed else Word.WORKS


def _written(case: Case, before: Contents | Word, after: Contents | Word) -> Word:
    """What a write came to that was not refused."""
    if isinstance(before, Word) or isinstance(after, Word):
        return Word.WORKS if isinstance(before, Word) else Word.SPOILS
    expected = bytearray(before.data)
    written = slice(case.offset, case.offset + case.length(before))
    expected[written] = after.data[written]
    spoilt = after.data != bytes(expected) or not set(after.failed) <= set(before.failed)
    return Word.SPOILS if spoilt else Word.WORKS


def _unwritten(case: Case, folder: Path) -> Word:
    """What became of an image that was not written to."""
    with (folder / IMAGE).open("rb") as file:  # which may have become very long
        file.seek(_CORRUPT_AT)
        after = file.read(1)
    changed = after != case.image[_CORRUPT_AT : _CORRUPT_AT + 1]
    return Word.MARKS if changed and after[0] & _CORRUPT else Word.REFUSED
