"""What is dirty, by QEMU's word and by a model's."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import attrs

from underlay import SyncFormatAccess, jobs

__all__ = ["Model", "dirty", "their_dirty"]

#: Guest offset and length.
Ranges = list[tuple[int, int]]


def dirty(image: Path | SyncFormatAccess, name: str) -> Ranges:
    """Here."""
    return [(found.start, found.length) for found in jobs.dirty_ranges(image, name)]


def _listens(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(address)) == 0


def their_dirty(qemu: Callable[[str], str], image: Path, name: str) -> Ranges:
    """As QEMU serves it to a backup program: of a bitmap that is disabled."""
    address = image.with_name("nbd")
    server = subprocess.Popen(
        [qemu("qemu-nbd"), "-r", "-t", "-f", "qcow2", "-B", name, "-k", str(address), str(image)],
        stdin=subprocess.DEVNULL,
    )
    try:
        while not _listens(address):
            assert server.poll() is None
            time.sleep(0.005)
        options = f"driver=nbd,server.type=unix,server.path={address}"
        context = f"{options},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        told = subprocess.run(
            [qemu("qemu-img"), "map", "--output=json", "--image-opts", context],
            capture_output=True,
            check=True,
        ).stdout
    finally:
        server.terminate()
        server.wait()
        address.unlink(missing_ok=True)
    # With this option NBD's flags are the bitmap's: what is dirty seems to be no data.
    return _merged((run["start"], run["length"]) for run in json.loads(told) if not run["data"])


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    found: Ranges = []
    for start, length in ranges:
        if found and sum(found[-1]) == start:
            found[-1] = found[-1][0], found[-1][1] + length
        else:
            found.append((start, length))
    return found


@attrs.define
class Model:
    """A bitmap as it should be."""

    size: int
    granularity: int
    bits: set[int] = attrs.field(factory=set[int])

    def write(self, offset: int, length: int) -> None:
        """Guest bytes are written."""
        end = offset + length
        self.bits.update(range(offset // self.granularity, -(-end // self.granularity)))

    def ranges(self) -> Ranges:
        """What is dirty."""
        each = self.granularity
        pieces = ((bit * each, min(each, self.size - bit * each)) for bit in sorted(self.bits))
        return _merged(piece for piece in pieces if piece[1] > 0)
