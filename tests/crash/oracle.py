"""What QEMU says of files that a power loss left."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import attrs

from .judging import differences

__all__ = ["Oracle"]

#: The names that the shapes give to an image's files.
_NAMES = ("disk.qcow2", "data.raw")


@attrs.frozen
class Oracle:
    """``qemu-img``, in a folder of its own."""

    qemu_img: str
    folder: Path

    def problems(self, contents: Sequence[bytes], allowed: Sequence[bytes]) -> list[str]:
        """What it finds wrong, mends wrongly, or reads that is no mixture of what is allowed."""
        self._put(contents)
        found = self._check()
        if found["corruptions"] or found["check-errors"]:
            return [f"QEMU finds {found}"]
        if found["leaks"]:
            mended = self._check("-r", "leaks")
            if mended["corruptions"] or mended["check-errors"] or mended["leaks"]:
                return [f"QEMU mends leaks, and finds {mended}"]
        self._run("convert", "-f", "qcow2", "-O", "raw", _NAMES[0], "read.raw")
        return differences((self.folder / "read.raw").read_bytes(), allowed, "QEMU's disk")

    def corruptions(self, contents: Sequence[bytes]) -> int:
        """How many corruptions and check errors it finds."""
        self._put(contents)
        found = self._check()
        return found["corruptions"] + found["check-errors"]

    def _put(self, contents: Sequence[bytes]) -> None:
        for name, content in zip(_NAMES, contents, strict=False):
            (self.folder / name).write_bytes(content)

    def _check(self, *options: str) -> dict[str, int]:
        """The counts of its check."""
        said = self._run("check", "-f", "qcow2", "--output=json", *options, _NAMES[0])
        report: dict[str, int] = json.loads(said)
        return {kind: report.get(kind, 0) for kind in ("corruptions", "check-errors", "leaks")}

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [self.qemu_img, *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode not in ((0, 2, 3) if arguments[0] == "check" else (0,)):
            raise AssertionError(
                f"qemu-img {' '.join(arguments)}: exit {done.returncode}\n{done.stderr}"
            )
        return done.stdout
