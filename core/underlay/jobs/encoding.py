"""Copying into an image that stores whole units encoded (compressed clusters, say).

Each worker encodes the units of its pieces, and stores many of them with one request: the image
then finds room for all of them at once, and they lie one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from underlay.capabilities import CompressedWriter
from underlay.errors import UnsupportedOperationError
from underlay.jobs.copier import Copier, Zeroes
from underlay.jobs.loading import Scratch
from underlay.jobs.runs import Run
from underlay.sync import SyncFormatAccess

__all__ = ["Encoding", "EncodingCopier", "encoding_copier"]

#: Encoded bytes that a worker keeps before it stores them.
_KEEP = 512 << 10


@attrs.frozen(kw_only=True)
class Encoding:
    """How one target stores encoded units."""

    #: Guest bytes of one.
    unit: int
    encode: Callable[[memoryview], bytes | None]
    store: Callable[[list[tuple[int, bytes]]], None]


def encoding_copier(
    copier: Copier, target: SyncFormatAccess, level: int | None
) -> tuple[EncodingCopier, int]:
    """A copier that encodes, and otherwise does as this one; and its unit in bytes.

    Raises:
        UnsupportedOperationError: the target stores nothing encoded.
        OptionError: its codec has no such level.
    """
    writer: Any = target.capability(CompressedWriter)
    if writer is None:
        raise UnsupportedOperationError("Compression not supported for this file format")
    encoding = Encoding(
        unit=writer.encoded_unit(), encode=writer.encoder(level), store=writer.write_encoded_units
    )
    facts = {
        field.name: getattr(copier, field.name) for field in attrs.fields(Copier) if field.init
    }
    return EncodingCopier(encoding=encoding, **facts), encoding.unit


@attrs.define(kw_only=True)
class EncodingCopier(Copier):
    """Does the tasks of one copy. Their pieces end where units do, but at the ends of stretches."""

    encoding: Encoding

    def _finish(self, scratch: Scratch) -> None:
        if self._stopped:
            scratch.kept.clear()
        self._store(scratch)

    def _store(self, scratch: Scratch) -> None:
        kept, scratch.kept = scratch.kept, []
        scratch.kept_bytes = 0
        if kept:
            self.encoding.store(kept)

    def _copy_on_host(self, piece: list[Run], shift: int) -> bool:
        return False

    def _copy(self, piece: list[Run], shift: int, scratch: Scratch) -> int:
        unit = self.encoding.unit
        start = piece[0].start
        length = piece[-1].end - start
        to = start + shift
        room = length + -(to + length) % unit
        scratch.make_room(room)
        view = memoryview(scratch.first)
        self._load(piece, view[:length], scratch)
        view[length:room] = bytes(room - length)  # what the disk's last unit has behind its end
        size = self.target.size
        written = plain = at = 0
        while at < length:
            here = min(unit - (to + at) % unit, length - at)
            if (to + at) % unit or (here < unit and to + at + here < size):
                # A part of a unit, the rest of which is another's.
                self._write_plain(scratch, plain, at, to)
                written += self._write_data(scratch, at, here, to + at)
                plain = at + here
            elif self.sparse_size and scratch.first.startswith(scratch.zeroes(here), at):
                self._write_plain(scratch, plain, at, to)
                self._write_zeroes(to + at, here)
                plain = at + here
            else:
                written += here
                encoded = self.encoding.encode(view[at : at + unit])
                if encoded is not None:
                    self._write_plain(scratch, plain, at, to)
                    plain = at + here
                    self._keep(scratch, to + at, encoded)
            at += here
        self._write_plain(scratch, plain, length, to)
        return written

    def _write_plain(self, scratch: Scratch, start: int, end: int, to: int) -> None:
        """Write units that are no smaller when they are encoded."""
        if end > start:
            self.target.write(memoryview(scratch.first)[start:end], to + start)

    def _keep(self, scratch: Scratch, offset: int, encoded: bytes) -> None:
        scratch.kept.append((offset, encoded))
        scratch.kept_bytes += len(encoded)
        if scratch.kept_bytes >= _KEEP:
            self._store(scratch)

    def _write_zeroes(self, offset: int, length: int) -> int:
        unit = self.encoding.unit
        if self.clean_from is not None:
            length = max(0, min(length, self.clean_from - offset))
        whole = offset % unit == 0 and (length % unit == 0 or offset + length == self.target.size)
        if self.zeroes is not Zeroes.WRITE or not whole:
            return super()._write_zeroes(offset, length)
        encoded = self.encoding.encode(memoryview(bytes(unit)))
        if encoded is None:
            return super()._write_zeroes(offset, length)
        step = unit * max(1, _KEEP // len(encoded))
        for first in range(offset, offset + length, step):
            if self._stopped:
                break
            end = min(first + step, offset + length)
            self.encoding.store([(at, encoded) for at in range(first, end, unit)])
        return length
