"""What is measured of rebase and commit: one function a row."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.images import run
from benchmarks.measuring import Result, seconds

import underlay
from underlay import jobs

if TYPE_CHECKING:
    from benchmarks.rows import Row, Setting

__all__ = ["MOVING"]

_GATE = underlay.PermissiveImplicitOpenGate()


def _with(path: Path, make: Callable[[], object], work: Callable[[], object]) -> float:
    """The time for what is done to an image that is made anew."""
    make()
    try:
        return seconds(work)
    finally:
        path.unlink()


def _rebase(*, to_equal: bool) -> Row:
    def row(setting: Setting) -> Result:
        old = setting.images.qcow2("plain").resolve()
        new = str(setting.images.raw().resolve()) if to_equal else ""
        overlay = setting.images.path("overlay.qcow2")

        def make() -> None:
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", old, "-F", "qcow2", overlay)

        def ours() -> None:
            jobs.rebase(overlay, new, backing_format="raw" if new else None, gate=_GATE)

        def theirs() -> None:
            run("qemu-img", "rebase", "-b", new, *(["-F", "raw"] if new else []), overlay)

        return setting.bench.compare(
            "rebase onto an equal image" if to_equal else "rebase onto nothing",
            lambda: _with(overlay, make, ours),
            {"qemu-img rebase": lambda: _with(overlay, make, theirs)},
            bar=0.8,
        )

    return row


def _commit(setting: Setting) -> Result:
    base = setting.images.path("base.qcow2").resolve()
    overlay = setting.images.path("overlay.qcow2")
    shutil.copyfile(setting.images.qcow2("plain"), overlay)
    run("qemu-img", "rebase", "-u", "-b", base, "-F", "qcow2", overlay)

    def make() -> None:
        run("qemu-img", "create", "-q", "-f", "qcow2", base, str(setting.images.size))

    try:
        return setting.bench.compare(
            "commit into an empty image",
            lambda: _with(base, make, lambda: jobs.commit(overlay, keep=True, gate=_GATE)),
            {
                "qemu-img commit -d": lambda: _with(
                    base, make, lambda: run("qemu-img", "commit", "-d", overlay)
                )
            },
            bar=0.8,
        )
    finally:
        overlay.unlink()


MOVING: dict[str, Row] = {
    "rebase-nothing": _rebase(to_equal=False),
    "rebase-equal": _rebase(to_equal=True),
    "commit": _commit,
}
