"""Files to convert and to look at."""

from __future__ import annotations

import random
import time
from pathlib import Path


def write_mixed(path: Path, *, size: int, seed: int = 1) -> Path:
    """Write data that does and does not compress, stored zeroes and holes, on odd borders."""
    chance = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        at = 0
        while at < size:
            length = min(chance.choice((512, 4096, 9000, 65536, 300_000, 1 << 20)), size - at)
            kind = chance.randrange(6)
            if kind < 3:
                data = chance.randbytes(length), b"text " * length, bytes(length)
                file.seek(at)
                file.write(data[kind][:length])
            at += length
    return path


def allocated(path: Path) -> int:
    """The bytes that the filesystem has allocated for a file."""
    return path.stat().st_blocks * 512


def same(first: Path, second: Path) -> bool:
    """Whether two files hold the same bytes."""
    return first.read_bytes() == second.read_bytes()


def goes(path: Path) -> bool:
    """Whether a file is gone, or goes within a minute.

    A worker of another process that is just about to write to what was taken away may make it once
    more, before it looks.
    """
    end = time.monotonic() + 60
    while path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return not path.exists()
