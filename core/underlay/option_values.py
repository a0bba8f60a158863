"""The options that a caller gives a driver, made what the driver declares them to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from underlay.driver import OptionSpec
from underlay.errors import OptionError
from underlay.units import parse_size

__all__ = ["checked_options"]


def checked_options(
    given: Mapping[str, Any], known: Mapping[str, OptionSpec], *, what: str
) -> dict[str, object]:
    """The options, each made the type that its ``OptionSpec`` says.

    Raises:
        OptionError: one is unknown or of the wrong type.
    """
    checked: dict[str, object] = {}
    for name, value in given.items():
        spec = known.get(name)
        if spec is None:
            listed = ", ".join(known) or "none"
            raise OptionError(f"Unknown option '{name}' for {what}; known: {listed}", option=name)
        if value is not None:
            checked[name] = _typed(name, value, spec)
    return checked


def _typed(name: str, value: object, spec: OptionSpec) -> object:
    if spec.type == "size" and isinstance(value, int | str):
        return parse_size(value, option=name)
    if spec.type == "int" and not isinstance(value, bool):
        if isinstance(value, int):
            return value
        if isinstance(value, str) and value.isdecimal():
            return int(value)
    if spec.type == "bool":
        if isinstance(value, bool):
            return value
        if value in ("on", "yes", "true", "y"):
            return True
        if value in ("off", "no", "false", "n"):
            return False
    if spec.type == "str":
        return value
    raise OptionError(f"'{value}' is no {spec.type} for the option '{name}'", option=name)
