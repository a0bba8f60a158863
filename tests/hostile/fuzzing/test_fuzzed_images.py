"""Images that are damaged at random break no rule, whatever is done with them.

``--fuzzed-images=100000`` is the long run. ``--fuzz-seed`` says with which seed; the number of an
image and its seed make the same image again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from ..bases import LAYOUTS, Bases
from .crew import Crew
from .worker import fuzzed

pytestmark = pytest.mark.slow

#: Beyond so many images it takes all processors.
_SHORT = 2_000
#: So many that break rules are enough to know.
_ENOUGH = 20
#: Where files are written without waiting for a disk, if there is such a place.
_IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108


def test_no_damaged_image_breaks_a_rule(
    bases: Bases,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    images, seed = pytestconfig.getoption("--fuzzed-images"), pytestconfig.getoption("--fuzz-seed")
    assert isinstance(images, int)
    assert isinstance(seed, str)
    record_property("seed", seed)
    made = {name: bases[name] for name in LAYOUTS}
    packed = tmp_path / "bases"
    # What the guest sees is not asked for, and would be held in memory.
    packed.write_bytes(pickle.dumps({name: attrs.evolve(made[name], content=b"") for name in made}))
    processes = 1 if images <= _SHORT else os.cpu_count() or 1
    told: list[str] = []
    with tempfile.TemporaryDirectory(dir=_IN_MEMORY) as folder:
        crew = Crew(bases=packed, seed=seed, end=images, processes=processes, folder=Path(folder))
        with contextlib.closing(crew.run()) as found:
            for broken in itertools.islice(found, _ENOUGH):
                image = fuzzed(made, seed, broken.number)
                kept = tmp_path / f"seed-{seed}-image-{broken.number}.qcow2"
                kept.write_bytes(image.data)
                told.append("\n  ".join([f"{kept} ({image})", *broken.problems]))
    assert not told, f"of {images} images of seed {seed}:\n" + "\n".join(told)
