"""The command in a child (see ``child``), and where an attacker's images lie."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import attrs

from underlay.cli import main

from .child import Outcome, Warm

__all__ = ["LOOKS", "SECRET", "Done", "Place", "command", "look"]

#: What the host has, and no image may tell.
SECRET = b"the host's own secret. ".ljust(64 << 10, b"s")

#: Commands that look at one image, and what more each needs.
LOOKS = (
    ("map",),
    ("convert", "copy.raw"),
    ("compare", "-f", "qcow2", "evil"),
    ("dd", "of=copy.raw"),
    ("digest",),
    ("bench", "-c", "1"),
    ("measure", "-O", "qcow2"),
)
#: A new file that comes to nothing goes again.
_REMOVED = "reached out: os.remove "


@attrs.frozen
class Done:
    """What a command came to."""

    status: int
    out: str
    err: str


def command(folder: str, *words: str) -> Done:
    """Run our command in a folder; for a child."""
    os.chdir(folder)
    sys.argv = ["underlay", *words]
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    status: object = 0
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            main()
        except SystemExit as ending:
            status = ending.code
    assert isinstance(status, int)
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return Done(status, out, err)


@attrs.frozen
class Place:
    """A folder of images from strangers, beside one that is the host's."""

    root: Path
    warm: Warm

    @property
    def folder(self) -> Path:
        return self.root / "images"

    @property
    def secret(self) -> Path:
        return self.root / "host" / "secret"

    def run(self, *words: object, opens: tuple[str, ...] = ()) -> Done:
        """Run our command there, and let it reach nothing but these files of the folder.

        It may not take long or much memory, raise, or tell the host's secret.
        """
        outcome: Outcome = self.warm.run(command, str(self.folder), *map(str, words))
        allowed = {*opens, *(str(self.folder / name) for name in opens)}
        allowed.add(f"{self.folder}/")  # a new file's name is made durable
        broken = [rule for rule in outcome.broken(allowed) if not rule.startswith(_REMOVED)]
        assert broken == [], (words, broken, outcome.where)
        done = outcome.value
        assert isinstance(done, Done)
        assert "Traceback" not in done.err
        assert SECRET[:20].decode() not in done.out + done.err
        assert self.secret.read_bytes() == SECRET
        return done

    def refused(self, *words: object, opens: tuple[str, ...] = ()) -> str:
        """The same, of a command that fails, with one line that says why; that line."""
        before = self.listing()
        done = self.run(*words, opens=opens)
        assert done.status != 0
        assert done.err.count("\n") == 1, done.err
        assert self.listing() == before
        return done.err

    def listing(self) -> dict[str, bytes]:
        """Every file of the folder, with what is in it."""
        return {
            path.name: path.read_bytes() if path.stat().st_size < 8 << 20 else b""
            for path in self.folder.iterdir()
        }

    def leaks(self, qemu_img: str, *words: object) -> bool:
        """Whether the attack works: with these words the real qemu-img tells the secret."""
        leaked = self.root / "leaked"
        subprocess.run(
            [qemu_img, *map(str, words), str(leaked)],
            cwd=self.folder,
            check=False,
            capture_output=True,
        )
        try:
            return SECRET[:20] in leaked.read_bytes()[: 1 << 20]
        except FileNotFoundError:
            return False
        finally:
            leaked.unlink(missing_ok=True)


def look(command: tuple[str, ...], image: str) -> tuple[str, ...]:
    """The words that look at an image by a command."""
    if command[0] == "dd":
        return ("dd", f"if={image}", *command[1:])
    if command[0] == "convert":
        return ("convert", image, *command[1:])
    return (*command, image)
