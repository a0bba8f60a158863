"""Damage in a table is met in its own range alone, by whoever asks what is where."""

from __future__ import annotations

import pytest

import underlay
from underlay.errors import CorruptImageError
from underlay_storage.memory import MemoryStorage

from .bases import Bases
from .corpus import RECIPES
from .recipe import Reading, Recipe

#: Lies of the tables; what compressed data holds, a mapping does not tell.
TABLES = [
    recipe
    for recipe in RECIPES
    if (recipe.number < 118 or recipe.number > 134)
    and recipe.rule.reading is Reading.FAILS
    and recipe.base != "data-file"
    and recipe.name != "cut-in-compressed-data"
]


@pytest.mark.parametrize("recipe", TABLES, ids=lambda recipe: f"{recipe.number}-{recipe.name}")
def test_what_lies_before_damage_is_mapped_and_the_damage_is_an_error(
    bases: Bases, recipe: Recipe
) -> None:
    base = bases[recipe.base]
    image = base.image()
    recipe.damage(image)
    start, end = recipe.rule.damaged
    with underlay.open_image(MemoryStorage(bytes(image.data)), format="qcow2") as disk:
        for offset in (start, start + 1, end - 1):
            # Others are read first, so that the table is at hand where there is one.
            assert disk.read_bytes(end, 1) == base.content[end : end + 1]
            assert disk.inner.locate(offset) is None
            with pytest.raises(CorruptImageError, match="check the image"):
                disk.get_mapping(offset)
        lengths: list[int] = []
        with pytest.raises(CorruptImageError):
            lengths.extend(extent.length for extent in disk.extents())
        assert sum(lengths) == start
        assert sum(extent.length for extent in disk.extents(end)) == disk.size - end
