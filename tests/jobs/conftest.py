"""Images for the jobs, made by QEMU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .files import write_mixed

#: ``make("a.qcow2", "qcow2", "1M", "write -P 1 0 64k", options="cluster_size=4k")``
Make = Callable[..., Path]
Tool = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path, qemu_img: Tool, qemu_io: Tool) -> Make:
    """Make an image with qemu-img, and fill it with commands of qemu-io."""

    def make(
        name: str,
        format_name: str,
        size: str,
        *commands: str,
        options: str = "",
        backing: Path | None = None,
    ) -> Path:
        path = tmp_path / name
        more: list[object] = ["-o", options] if options else []
        if backing is not None:
            more += ["-b", backing.name, "-F", "raw" if backing.suffix == ".raw" else "qcow2"]
        qemu_img("create", "-q", "-f", format_name, *more, path, size)
        if commands:
            given = [word for command in commands for word in ("-c", command)]
            qemu_io("-f", format_name, *given, path)
        return path

    return make


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A raw file of 12 MiB of everything: more than one task of a copy."""
    return write_mixed(tmp_path / "mixed.raw", size=12 << 20)
