"""Packages that import what they offer when it is first asked for.

Whoever imports a module imports the packages around it. ``underlay info`` and its like need few of
the modules that ``import underlay`` stands for, and pay for each with start-up time: making one
``attrs`` class takes half a millisecond.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

__all__ = ["LazyPackage"]


class LazyPackage(ModuleType):
    """A package whose names are those of its module ``public``, imported together at first use."""

    def __getattr__(self, name: str) -> object:
        names = self._names()
        if name in names:
            return names[name]
        submodule = sys.modules.get(f"{self.__name__}.{name}")
        if submodule is None:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        return submodule

    def __dir__(self) -> list[str]:
        return sorted(self._names())

    def _names(self) -> dict[str, object]:
        public = importlib.import_module(f"{self.__name__}.public")
        # One that is just being imported has no names yet.
        listed: list[str] = getattr(public, "__all__", [])
        names: dict[str, object] = {name: getattr(public, name) for name in listed}
        if names:
            names["__all__"] = listed
            vars(self).update(names)
        return names
