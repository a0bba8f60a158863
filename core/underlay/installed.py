"""Which entry points are installed.

``importlib.metadata`` knows, and takes longer to import than all the rest of this library. So
ordinary folders, which is where nearly everything is installed, are looked through here; it is
asked where there is anything else on the path.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["InstalledEntry", "installed_entries"]

#: ``module``, ``module:attribute``; extras are the installer's business.
_VALUE = re.compile(r"(?P<module>[\w.]+)\s*(:\s*(?P<attribute>[\w.]+)\s*)?(\[.*\]\s*)?")


class InstalledEntry(NamedTuple):
    """One entry point, and the distribution that it belongs to."""

    name: str
    value: str
    distribution: str
    version: str

    def load(self) -> Any:
        """Import what it names.

        Raises:
            ValueError: it names nothing that could be imported.
        """
        match = _VALUE.fullmatch(self.value)
        if match is None:
            raise ValueError(f"'{self.value}' is no module or module:attribute")
        found: Any = importlib.import_module(match["module"])
        for attribute in (match["attribute"] or "").split("."):
            found = getattr(found, attribute) if attribute else found
        return found


def installed_entries(group: str, path: Sequence[str]) -> list[InstalledEntry]:
    """The entry points of a group. Of distributions with one name the first on ``path`` counts."""
    found: list[InstalledEntry] = []
    seen: set[str] = set()
    search = _in_folders if _only_folders(path) else _anywhere
    for text, name, version in search(group, path):
        normal = re.sub(r"[-_.]+", "-", name).lower()
        if name and normal not in seen:
            seen.add(normal)
            found += [InstalledEntry(*entry, name, version) for entry in _section(text, group)]
    return found


def _only_folders(path: Sequence[str]) -> bool:
    """Whether nobody can know of a distribution that is not in a plain folder of ``path``."""
    return not any(entry.endswith(".egg") or os.path.isfile(entry) for entry in path) and not any(
        hasattr(finder, "find_distributions") and getattr(finder, "__name__", "") != "PathFinder"
        for finder in sys.meta_path
    )


def _in_folders(group: str, path: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The text of each ``entry_points.txt`` that has the group, its distribution and version."""
    for folder in dict.fromkeys(path):
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for name in names:
            if name.endswith((".dist-info", ".egg-info")):
                about = os.path.join(folder, name)
                text = _read(about, "entry_points.txt")
                if f"[{group}]" in text:
                    yield (
                        text,
                        *_name_and_version(_read(about, "METADATA") or _read(about, "PKG-INFO")),
                    )


def _anywhere(group: str, path: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    import importlib.metadata

    for distribution in importlib.metadata.distributions(path=list(path)):
        try:
            text = distribution.read_text("entry_points.txt") or ""
            if f"[{group}]" not in text:
                continue
            name, version = distribution.metadata["Name"], distribution.version
        except Exception:  # noqa: BLE001, S112 - a stranger's finder has found it; it is as if not there
            continue
        yield text, name or "", version or ""


def _read(folder: str, name: str) -> str:
    try:
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _name_and_version(metadata: str) -> tuple[str, str]:
    """Two headers of a distribution's metadata."""
    headers: dict[str, str] = {}
    for line in metadata.splitlines():
        if not line:
            break
        name, _, value = line.partition(":")
        headers.setdefault(name.lower(), value.strip())
    return headers.get("name", ""), headers.get("version", "")


def _section(text: str, group: str) -> Iterator[tuple[str, str]]:
    """The names and values of one section of an ``entry_points.txt``."""
    section = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif section == group and line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            if equals:
                yield name.strip(), value.strip()
