"""What QEMU says of files that a power loss left."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import attrs

__all__ = ["Oracle"]

#: The names that the shapes give to an image's files.
_NAMES = ("disk.qcow2", "data.raw")


@attrs.frozen
class Oracle:
    """``qemu-img``, in a folder of its own."""

    qemu_img: str
    folder: Path

    def corruptions(self, contents: Sequence[bytes], *, repair: bool = False) -> int:
        """How many corruptions and check errors it finds, and does not repair."""
        found = self.check(contents, *(("-r", "all") if repair else ()))
        return found.get("corruptions", 0) + found.get("check-errors", 0)

    def leaks(self, contents: Sequence[bytes]) -> int:
        """How many leaked clusters it finds."""
        return self.check(contents).get("leaks", 0)

    def check(self, contents: Sequence[bytes], *options: str) -> dict[str, int]:
        """The report of its check."""
        for name, content in zip(_NAMES, contents, strict=False):
            (self.folder / name).write_bytes(content)
        done = subprocess.run(
            [self.qemu_img, "check", "-f", "qcow2", "--output=json", *options, _NAMES[0]],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode not in (0, 2, 3):
            raise AssertionError(f"qemu-img check: exit {done.returncode}\n{done.stderr}")
        report: dict[str, int] = json.loads(done.stdout)
        return report
