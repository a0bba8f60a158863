"""All recipes together."""

from __future__ import annotations

import importlib
from collections import Counter

from .recipe import Recipe

__all__ = ["CLASSES", "RECIPES"]

#: The numbers of the classes that the table lists.
CLASSES = range(1, 146)

_MODULES = (
    "header",
    "extensions",
    "bitmaps",
    "names",
    "tables",
    "compressed",
    "refcounts",
    "snapshots",
    "cut",
)


def _joined() -> list[Recipe]:
    recipes: list[Recipe] = []
    for name in _MODULES:
        module = importlib.import_module(f".recipes_{name}", __package__)
        recipes += module.RECIPES
    missing = set(CLASSES) - {recipe.number for recipe in recipes}
    assert not missing, f"no recipe for {sorted(missing)}"
    twice = [
        name for name, count in Counter(recipe.name for recipe in recipes).items() if count > 1
    ]
    assert not twice, f"two recipes are called {twice}"
    return recipes


RECIPES = _joined()
