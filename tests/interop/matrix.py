"""All recipes, under one roof."""

from __future__ import annotations

from . import (
    recipes_backing,
    recipes_compression,
    recipes_features,
    recipes_geometry,
    recipes_seeded,
)

RECIPES = (
    *recipes_geometry.RECIPES,
    *recipes_compression.RECIPES,
    *recipes_backing.RECIPES,
    *recipes_features.RECIPES,
    *recipes_seeded.RECIPES,
)
