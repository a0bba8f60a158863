"""The colours of pictures stay apart for people with any kind of sight, on either ground."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from underlay.jobs.picture.palette import LAYERS

#: What is left of linear red, green and blue (Machado, Oliveira and Fernandes, 2009, severity 1).
_SIGHTS = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no long cones": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "no medium cones": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "no short cones": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}


def _lab(colour: str, sight: str) -> tuple[float, float, float]:
    """CIE L*a*b* of a colour as somebody sees it: distances are how different two look."""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    red, green, blue = (
        sum(a * b for a, b in zip(row, linear, strict=True)) for row in _SIGHTS[sight]
    )
    x, y, z = (
        max(value, 0.0) ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116
        for value in (
            (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505,
            0.2126 * red + 0.7152 * green + 0.0722 * blue,
            (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089,
        )
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("sight", _SIGHTS)
@pytest.mark.parametrize("ground", [0, 1])
def test_no_two_images_look_alike(sight: str, ground: int) -> None:
    seen = [_lab(shade[ground], sight) for shade in LAYERS]

    def apart(one: int, other: int) -> float:
        return math.dist(seen[one], seen[other])

    # A difference of 2.3 can just be seen.
    assert min(apart(*pair) for pair in combinations(range(len(LAYERS)), 2)) > 10
    # The first three are most of what is ever seen.
    assert min(apart(*pair) for pair in combinations(range(3), 2)) > 14
