"""Images that were good, and then were damaged: found, and made small, by hypothesis.

An example that fails is a few operations on a new image and a few fields that were changed then.
"""

from __future__ import annotations

import contextlib
import functools
import random

import attrs
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from underlay.errors import UnderlayError

from ...crash.guest import Operation
from ...crash.running import record
from ...crash.shapes import SHAPES
from .damage import Damage, damaged
from .fields import Field, fields
from .trial import MemoryPlace, Trial

_SHAPES = {shape.name: shape for shape in SHAPES}


@attrs.frozen
class Image:
    """How an image came to be, and what was done to it."""

    shape: str
    operations: tuple[Operation, ...]
    damage: list[Damage]

    def contents(self) -> tuple[bytes, ...]:
        """Of its files, the first one damaged."""
        good, *others = _built(self.shape, self.operations)
        return bytes(damaged(good, self.damage)), *others


@functools.lru_cache(maxsize=256)
def _built(shape: str, operations: tuple[Operation, ...]) -> tuple[bytes, ...]:
    with contextlib.closing(_SHAPES[shape].prepared()) as prepared:
        return record(prepared, operations).contents


def _values(data: bytes, width: int) -> st.SearchStrategy[int]:
    """The borders of a number of so many bytes, any of them, and what leads somewhere."""
    top = (1 << 8 * width) - 1
    powers = [1 << bit for bit in range(8 * width)]
    borders = [0, 1, top, top - 1, top // 2, *powers, *(power - 1 for power in powers)]
    sectors = st.integers(0, len(data) // 512 + 2)
    flags = st.sampled_from([0, 1, 1 << 62, 1 << 63])

    def leading(sector: int, flag: int) -> int:
        return (sector * 512 | flag) & top

    some = st.builds(leading, sectors, flags)
    return st.one_of(st.sampled_from(borders), some, st.integers(0, top))


def _of_field(data: bytes, field: Field) -> st.SearchStrategy[Damage]:
    if field.width not in {1, 2, 4, 8}:
        content = st.binary(min_size=field.width, max_size=field.width)
    else:
        values = _values(data, field.width)
        content = values.map(lambda value: value.to_bytes(field.width, "big"))
    return content.map(lambda said: Damage(field.name, field.offset, said))


@st.composite
def images(draw: st.DrawFn) -> Image:
    """A good image, by operations; then damage to some of its fields, or its end cut off."""
    shape = _SHAPES[draw(st.sampled_from(sorted(_SHAPES)))]
    operations = tuple(draw(st.lists(st.sampled_from(shape.operations()), max_size=3)))
    try:
        data = _built(shape.name, operations)[0]
    except UnderlayError:
        assume(False)  # noqa: FBT003 (one of them does not go with another)
        raise
    places = fields(data)
    to_fields = st.sampled_from(places).flatmap(lambda field: _of_field(data, field))
    cuts = st.integers(0, len(data) // 512).map(lambda end: Damage("cut", end * 512, cut=True))
    return Image(shape.name, operations, draw(st.lists(to_fields | cuts, min_size=1, max_size=4)))


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(image=images(), seed=st.integers(0, 7))
def test_no_damaged_image_breaks_a_rule(image: Image, seed: int) -> None:
    data, *others = image.contents()
    trial = Trial(
        data=data,
        place=MemoryPlace(),
        chance=random.Random(seed),
        data_file=others[0] if others else b"",
    )
    assert not trial.run()
