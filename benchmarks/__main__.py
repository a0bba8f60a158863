"""``python -m benchmarks``: see README.md beside this file."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.images import Images
from benchmarks.measuring import Bench, Result, busy_elsewhere, say, table
from benchmarks.rows import ROWS, Setting, chosen

from underlay.units import parse_size

#: What others may use of the processors before it is worth a warning.
_QUIET = 0.1


def main() -> int:
    """Measure what was asked for; 1 if a bar was passed."""
    options = _options()
    if options.list:
        print("\n".join(ROWS))
        return 0
    for tool in ("qemu-img", "qemu-io"):
        if shutil.which(tool) is None:
            say(f"{tool} is not on the PATH: it is the peer (Debian: apt-get install qemu-utils)")
            return 2
    if options.keep:
        folder = Path(options.folder, f"underlay-benchmarks-{os.getuid()}")
    else:
        folder = Path(tempfile.mkdtemp(prefix="underlay-benchmarks-", dir=options.folder))
    setting = Setting(
        bench=Bench(rounds=options.rounds),
        images=Images(folder, size=parse_size(options.size)),
        disk_folder=Path(options.disk_folder),
    )
    results: list[Result] = []
    try:
        watched = busy_elsewhere()
        for name, row in chosen(options.rows):
            say(f"{name} …")
            results.append(row(setting))
        others = watched()
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    print(table(results))
    if others > _QUIET:
        say(f"Others used {others:.0%} of the processors meanwhile: do not trust the numbers.")
    return 0 if all(result.kept for result in results) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", help="the beginnings of the names of rows")
    parser.add_argument("--list", action="store_true", help="list the rows")
    parser.add_argument("--size", default="1G", help="of the images to convert (1G)")
    parser.add_argument("--rounds", type=int, default=5, help="how often to measure (5)")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()  # noqa: S108
    parser.add_argument("--folder", default=memory, help=f"for the images ({memory})")
    parser.add_argument(
        "--disk-folder",
        default=tempfile.gettempdir(),
        help=f"on a disk's filesystem, for read-async ({tempfile.gettempdir()})",
    )
    parser.add_argument("--keep", action="store_true", help="leave the images for the next time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
