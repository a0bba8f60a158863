"""The matrix is what it claims to be: QEMU itself says so."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator

from .building import BuiltImage, Kitchen
from .matrix import RECIPES
from .recipes import WiderHeader

#: What the images must have, and how many of them at least; else a test that passes shows nothing.
WANTED = {
    "version 2": 50,
    "version 3": 300,
    "backing file": 120,
    "chain of four": 5,
    "snapshots": 60,
    "compressed clusters": 80,
    "zstd": 40,
    "extended L2": 60,
    "data file": 30,
    "raw data file": 6,
    "bitmaps": 8,
    "bitmap in use": 1,
    "lazy refcounts": 15,
    "dirty": 3,
    "corrupt": 2,
    "leaks": 1,
    "refcounts of other widths": 40,
    "odd size": 15,
    "empty disk": 3,
    "a terabyte": 5,
    "wider header": 2,
    "plain zeroes": 150,
    "unallocated": 200,
    "reserved zeroes": 50,
}


def _features(image: BuiltImage) -> Iterator[str]:
    recipe = image.recipe
    told = image.told
    data = told["format-specific"]["data"]
    yield "version 2" if data["compat"] == "0.10" else "version 3"
    present = {
        "backing file": "backing-filename" in told,
        "chain of four": len(recipe.chain) > 3,
        "snapshots": bool(told.get("snapshots")),
        "zstd": data.get("compression-type") == "zstd",
        "extended L2": data.get("extended-l2"),
        "data file": "data-file" in data,
        "raw data file": data.get("data-file-raw"),
        "bitmaps": bool(data.get("bitmaps")),
        "bitmap in use": any("in-use" in each["flags"] for each in data.get("bitmaps", ())),
        "lazy refcounts": data.get("lazy-refcounts"),
        "dirty": told["dirty-flag"],
        "corrupt": data.get("corrupt"),
        "refcounts of other widths": data["refcount-bits"] != 16,
        "odd size": recipe.has_odd_size,
        "empty disk": not image.exact_size,
        "a terabyte": image.exact_size >= 1 << 40,
        "wider header": any(isinstance(step, WiderHeader) for step in recipe.steps),
    }
    yield from (feature for feature, is_there in present.items() if is_there)
    checked = image.check()
    if checked.get("compressed-clusters"):
        yield "compressed clusters"
    if checked.get("leaks"):
        yield "leaks"
    runs = json.loads(image.tell("map", "--output=json", image.path.name))
    if any(each["zero"] and not each["data"] and each["present"] for each in runs):
        yield "plain zeroes"
    if any(not each["present"] for each in runs):
        yield "unallocated"
    if any(each["zero"] and "offset" in each for each in runs):
        yield "reserved zeroes"


def test_the_matrix_has_every_feature_often_enough(kitchen: Kitchen) -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES) >= 400
    counts = collections.Counter(
        feature for recipe in RECIPES for feature in _features(kitchen.image(recipe))
    )
    assert {
        feature: (counts[feature], least)
        for feature, least in WANTED.items()
        if counts[feature] < least
    } == {}
