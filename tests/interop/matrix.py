"""All recipes, under one roof."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import (
    recipes_backing,
    recipes_compression,
    recipes_features,
    recipes_geometry,
    recipes_seeded,
)
from .recipes import Recipe

RECIPES = (
    *recipes_geometry.RECIPES,
    *recipes_compression.RECIPES,
    *recipes_backing.RECIPES,
    *recipes_features.RECIPES,
    *recipes_seeded.RECIPES,
)


def over(choice: Callable[[Recipe], bool]) -> pytest.MarkDecorator:
    """Run a test once for each recipe of this kind."""
    chosen = [recipe for recipe in RECIPES if choice(recipe)]
    return pytest.mark.parametrize("recipe", chosen, ids=[recipe.name for recipe in chosen])
