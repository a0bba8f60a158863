"""Lies in the header extensions: classes 63 to 69."""

from __future__ import annotations

from collections.abc import Callable

from underlay_drivers.qcow2 import layout

from .editing import Image
from .recipe import HARMLESS, REFUSED, Recipe, Rule

__all__ = ["RECIPES"]

Damage = Callable[[Image], object]

_CLUSTER = 64 << 10
#: Of an extension that nobody knows.
_UNKNOWN = 0x12345678


def _length(kind: int, length: int) -> Damage:
    """An extension that says it is so long."""
    return lambda image: image.put(image.header.header_length, "II", kind, length)


def _extensions(*extensions: tuple[int, bytes]) -> Damage:
    return lambda image: image.extensions(*extensions)


def _filled(image: Image) -> None:
    at = image.header.header_length
    while at + 8 <= image.cluster:
        image.put(at, "II", 7, 0)
        at += 8


def _recipe(number: int, name: str, lie: str, damage: Damage, *, rule: Rule = REFUSED) -> Recipe:
    return Recipe(number=number, name=name, lie=lie, base="plain", damage=damage, rule=rule)


RECIPES: list[Recipe] = [
    _recipe(
        63,
        "extension-past-cluster",
        "an extension ends past the first cluster",
        _length(_UNKNOWN, _CLUSTER),
    ),
    _recipe(64, "extension-2-31", "an extension has 2^31 - 1 bytes", _length(_UNKNOWN, 2**31 - 1)),
    _recipe(
        65,
        "extension-2-32",
        "an extension has 2^32 - 1 bytes: the end of its padding wraps",
        _length(_UNKNOWN, 2**32 - 1),
    ),
    _recipe(
        65,
        "extension-end-past-cluster",
        "the end of the extensions ends past the first cluster",
        _length(0, _CLUSTER),
    ),
    _recipe(
        66,
        "extensions-without-end",
        "the first cluster is full of empty extensions, without an end",
        _filled,
    ),
    _recipe(
        66,
        "extension-unknown",
        "there is an extension that nobody knows",
        _extensions((_UNKNOWN, b"unknown")),
        rule=HARMLESS,
    ),
    _recipe(
        67,
        "backing-format-20",
        "the name of the backing file's format has 20 bytes",
        _extensions((layout.EXTENSION_BACKING_FORMAT, b"r" * 20)),
    ),
    _recipe(
        68,
        "feature-names-50",
        "the table of feature names ends inside an entry",
        _extensions((layout.EXTENSION_FEATURE_NAMES, bytes(50))),
        rule=HARMLESS,
    ),
    _recipe(
        69,
        "extension-twice",
        "the name of the backing file's format is there twice",
        _extensions(
            (layout.EXTENSION_BACKING_FORMAT, b"raw"), (layout.EXTENSION_BACKING_FORMAT, b"qcow2")
        ),
    ),
]
