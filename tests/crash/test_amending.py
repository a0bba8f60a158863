"""A power loss while an image is amended: before and after each write of the header's sector."""

from __future__ import annotations

import pytest

from .guest import Amend, Flush, Operation, WriteData, WriteZeroes
from .judging import chance_of
from .running import Trial
from .shapes import Shape
from .states import Effort

_SHAPES = (
    Shape(name="amended", backing=80 << 10),
    # Here the header has names of features, and takes more than a sector.
    Shape(name="amended-8k", cluster=8192, size=256 << 10, backing=200 << 10),
    Shape(name="amended-alone", cluster=1024, size=64 << 10),
    Shape(name="amended-512", snapshots=False),
)
_AMENDMENTS = (
    # One after the other, in one session: the later ones stand on what the earlier ones left.
    (Amend("compat", "v2"), Amend("compat", "v3")),
    (Amend("refcount_bits", 64), Amend("refcount_bits", 4), Amend("refcount_bits", 16)),
    (Amend("lazy_refcounts", True), Amend("compat", "v2")),  # noqa: FBT003 (the option's value)
    (Amend("backing_fmt", "parallels"), Amend("backing_fmt", "raw")),
    (Amend("backing_file", ""), Amend("compat", "v2")),
    (Amend("refcount_bits", 8), WriteData(3000, 9000), Amend("refcount_bits", 32)),
)


@pytest.mark.parametrize("shape", _SHAPES, ids=[shape.name for shape in _SHAPES])
def test_a_power_loss_leaves_the_image_as_it_was_or_as_it_is_to_be(shape: Shape) -> None:
    trial = Trial(
        prepared=shape.prepared(),
        chance=chance_of(shape.name),
        effort=Effort(),
    )
    try:
        for amendments in _AMENDMENTS:
            busy: list[Operation] = [WriteZeroes(2 * shape.cluster, 5 * shape.cluster)]
            for operation in amendments:
                busy += [operation, WriteData(shape.cluster * 5 + 100, 300)]
            trial.run([*busy, Flush()])
        assert not trial.failures, "\n\n".join(trial.failures)
        assert trial.report.states > 100
    finally:
        trial.prepared.close()
