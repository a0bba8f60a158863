"""Small images from QEMU's own tools, for a fuzzer to start from.

``python -m tests.hostile.fuzzing.seeds FOLDER`` makes a corpus for each target.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ..bases import Layout, make
from .targets import TARGETS

__all__ = ["SMALL", "make_seeds"]

_KIB = 1 << 10
_WRITES = (("write", 0, 4 * _KIB), ("write -z", 8 * _KIB, 4 * _KIB), ("write", 40 * _KIB, 2 * _KIB))
_COMPRESSED = (("write -c", 0, 8 * _KIB), ("write", 16 * _KIB, 4 * _KIB))
_SIZE = 64 * _KIB


def _small(
    options: str,
    writes: tuple[tuple[str, int, int], ...] = _WRITES,
    then: tuple[tuple[str, ...], ...] = (),
    later: tuple[tuple[str, int, int], ...] = (),
) -> Layout:
    return Layout(options=options, size=_SIZE, writes=writes, then=then, later=later)


SMALL = {
    "plain": _small("cluster_size=512"),
    "v2": _small("cluster_size=512,compat=0.10"),
    "narrow": _small("cluster_size=1k,refcount_bits=1"),
    "wide": _small("cluster_size=1k,refcount_bits=64,lazy_refcounts=on"),
    "zlib": _small("cluster_size=4k", _COMPRESSED),
    "zstd": _small("cluster_size=4k,compression_type=zstd", _COMPRESSED),
    "subclusters": _small("cluster_size=16k,extended_l2=on"),
    "snapshots": _small(
        "cluster_size=512",
        then=(("snapshot", "-c", "first", "@"), ("snapshot", "-c", "second", "@")),
        later=(("write", 0, 3 * _KIB),),
    ),
    "bitmaps": _small(
        "cluster_size=512",
        then=(
            ("bitmap", "--add", "-g", "512", "@", "fine"),
            ("bitmap", "--add", "--disable", "@", "off"),
        ),
        later=(("write", 0, 3 * _KIB),),
    ),
}


def make_seeds(folder: Path) -> None:
    """A folder for each target, with the images that it starts from."""
    made: dict[str, bytes] = {}
    for name, layout in SMALL.items():
        with tempfile.TemporaryDirectory() as where:
            made[name] = make(name, layout, Path(where)).data
    for target in TARGETS.values():
        (folder / target.name).mkdir(parents=True)
        for name in target.seeds:
            (folder / target.name / name).write_bytes(made[name])


if __name__ == "__main__":
    make_seeds(Path(sys.argv[1]))
