"""What QEMU writes, recorded by QEMU: its ``blklogwrites`` block driver.

The log has the format of the Linux kernel's dm-log-writes target.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import IO

import attrs

from .journal import Begun, Event, Flushed, Journal, Resize, Sync, Write, Zero

__all__ = ["LoggedQemu"]

_MAGIC = 0x6A736677736872
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_FLUSH, _FUA, _DISCARD, _MARK = 1, 2, 4, 8
_SECTOR = 512


@attrs.define
class LoggedQemu:
    """A running ``qemu-io`` on an image; what it does to the file goes into a journal."""

    image: Path
    log: Path
    journal: Journal
    _process: subprocess.Popen[bytes] = attrs.field(init=False)
    _taken: int = attrs.field(default=0, init=False)
    _position: int = attrs.field(default=_SECTOR, init=False)
    _size: int = attrs.field(default=0, init=False)

    @classmethod
    def start(cls, qemu_io: str, image: Path) -> LoggedQemu:
        """Start it on an image that is there; ``qemu_io`` is the program."""
        log = image.with_suffix(".log")
        log.write_bytes(b"")
        content = image.read_bytes()
        running = cls(image, log, Journal((content,)))
        running._size = len(content)
        options = (
            "driver=qcow2,file.driver=blklogwrites,"
            f"file.file.driver=file,file.file.filename={image},"
            f"file.log.driver=file,file.log.filename={log},"
            "file.log-sector-size=512,file.log-super-update-interval=1"
        )
        running._process = subprocess.Popen(
            [qemu_io, "-t", "writeback", "-d", "unmap", "--image-opts", options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        running._answer()
        return running

    def do(self, command: str, *, number: int, is_flush: bool = False) -> str:
        """Let it carry out a command as the guest's operation with this number."""
        self.journal.add(Begun(number))
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(command.encode() + b"\n")
        stdin.flush()
        answer = self._answer()
        self._take()
        if is_flush:
            self.journal.add(Flushed(number))
        return answer

    def stop(self, *, number: int) -> None:
        """Let it close the image, which is an operation of its own."""
        self.journal.add(Begun(number))
        self._process.communicate(b"quit\n", timeout=60)
        self._take()
        self.journal.add(Flushed(number))
        if self._process.returncode:
            raise AssertionError(f"qemu-io: exit {self._process.returncode}")

    def _answer(self) -> str:
        """What it says until it asks for the next command."""
        stdout: IO[bytes] | None = self._process.stdout
        assert stdout is not None
        said = bytearray()
        while not said.endswith(b"qemu-io> "):
            byte = stdout.read(1)
            if not byte:
                raise AssertionError(f"qemu-io stopped: {said.decode(errors='replace')}")
            said += byte
        return said.decode(errors="replace").removesuffix("qemu-io> ")

    def _take(self) -> None:
        """Append to the journal what the log has got since."""
        with self.log.open("rb") as file:
            magic, _, count, _ = _SUPER.unpack(file.read(_SUPER.size).ljust(_SUPER.size, b"\0"))
            if not magic:
                return
            assert magic == _MAGIC
            while self._taken < count:
                file.seek(self._position)
                sector, sectors, flags, _ = _ENTRY.unpack(file.read(_ENTRY.size))
                self._position += _SECTOR
                offset, length = sector * _SECTOR, sectors * _SECTOR
                data = b""
                if not flags & _DISCARD:
                    file.seek(self._position)
                    data = file.read(length)
                    self._position += length
                self._add(offset, length, data, flags)
                self._taken += 1

    def _add(self, offset: int, length: int, data: bytes, flags: int) -> None:
        events: list[Event] = []
        if flags & _FLUSH:
            events.append(Sync(0))
        if flags & _DISCARD:
            events.append(Zero(0, offset, length))
        elif length:
            # A write past the end reaches to where the file really ends, maybe inside a sector.
            if offset + length > self._size:
                self._size = offset + length
                events.append(Resize(0, self._size, grows=True))
            events.append(Write(0, offset, data))
        if flags & _FUA:
            events.append(Sync(0))
        self.journal.add(*events)
