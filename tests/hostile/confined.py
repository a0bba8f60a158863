"""QEMU's tools where they can reach nothing of this host.

A hostile image makes them open what it names, for writing too, and whoever runs the tests may be
root. So they run in a root directory that holds the tools, the libraries that they need, and what
stands for files of a host; without a network where the system lets us, though all addresses of the
corpus are this host's anyway; and with bounds on memory and time.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

from .child import ADDRESS_SPACE, SECONDS

__all__ = ["Cell", "Done", "NoCellError"]

#: With as many open files as is usual: an image that lies upon itself is opened until there are no
#: more, with twenty times as many for minutes.
_BOUNDS = ("prlimit", f"--as={ADDRESS_SPACE}", f"--cpu={SECONDS}", "--nofile=1024", "--core=0")
#: Seconds of any time.
_PATIENCE = 60
#: What stands for files of a host. In QEMU's eyes a device would be no other than a file.
_STAND_INS = {
    "dev/null": b"",
    "dev/zero": bytes(64 << 10),
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n".ljust(1 << 20, b"x"),
    "proc/version": b"the version of this host\n".ljust(1 << 20, b"x"),
}
Done = subprocess.CompletedProcess[str]


class NoCellError(Exception):
    """This system lets nobody be confined."""


class Cell:
    """A root directory for QEMU's tools."""

    def __init__(self, root: Path, tools: Iterable[str]) -> None:
        """``tools`` are their paths on the host; ``root`` is an empty folder."""
        self.root = root
        self._tools = {Path(tool).name: tool for tool in tools}
        for tool in self._tools.values():
            done = subprocess.run(["ldd", tool], capture_output=True, text=True, check=True)
            for path in (tool, *re.findall(r"(/\S+) \(0x", done.stdout)):
                self._add(path[1:])
                shutil.copy(path, root / path[1:])
        for name, content in _STAND_INS.items():
            self._add(name).write_bytes(content)
        self._enter = self._way_in()

    def _add(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _way_in(self) -> tuple[str, ...]:
        tool = next(iter(self._tools.values()))
        for apart in (("--map-root-user", "--net"), ()):
            way = ("unshare", *apart, f"--root={self.root}")
            done = subprocess.run((*way, tool, "--version"), capture_output=True, check=False)
            if done.returncode == 0:
                return way
        raise NoCellError("this system allows neither user namespaces nor chroot")

    def run(self, folder: str, tool: str, *words: str) -> Done:
        """Run a tool in a folder of the cell; ``SIGXCPU`` ends one whose time is up."""
        command = (*_BOUNDS, *self._enter, f"--wd=/{folder}", self._tools[tool], *words)
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired:
            return Done(command, -signal.SIGXCPU, "", "")
