"""What is installed is found without importlib.metadata, and is what that would find."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import os.path
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from underlay.installed import InstalledEntry, installed_entries


def lay(
    folder: Path, name: str, entries: str, *, version: str = "1.0", kind: str = "dist-info"
) -> None:
    """Lay a distribution's metadata into a folder, as installers do."""
    about = folder / f"{name.replace('-', '_')}-{version}.{kind}"
    about.mkdir(parents=True)
    metadata = "METADATA" if kind == "dist-info" else "PKG-INFO"
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nVersion: of the prose\n"
    (about / metadata).write_text(text, encoding="utf-8")
    (about / "entry_points.txt").write_text(entries, encoding="utf-8")


def plain(entries: Iterable[InstalledEntry]) -> list[tuple[str, str, str, str]]:
    return sorted((entry.name, entry.value, entry.distribution, entry.version) for entry in entries)


def oracle(group: str, path: list[str]) -> list[tuple[str, str, str, str]]:
    """The same by ``importlib.metadata``; of distributions with one name the first counts."""
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    for distribution in importlib.metadata.distributions(path=path):
        entries = [entry for entry in distribution.entry_points if entry.group == group]
        name = distribution.metadata["Name"]
        if entries and name:
            found.setdefault(
                name.lower().replace("_", "-"),
                [(entry.name, entry.value, name, distribution.version) for entry in entries],
            )
    return sorted(entry for entries in found.values() for entry in entries)


@pytest.mark.parametrize("group", ["underlay", "console_scripts", "pytest11", "hypothesis", "none"])
def test_this_installation_is_seen_as_importlib_sees_it(group: str) -> None:
    assert plain(installed_entries(group, sys.path)) == oracle(group, sys.path)


ENTRIES = """
# who offers what
[console_scripts]
odd = odd:main

[ underlay ]
ignored = spaces.in.the.header

[underlay]
odd=odd
  second = odd.more : plugin [extra]
no equals sign here
"""


def test_the_text_is_read_as_installers_write_it(tmp_path: Path) -> None:
    lay(tmp_path, "odd-one", ENTRIES)
    found = plain(installed_entries("underlay", [str(tmp_path)]))
    assert found[-2:] == [
        ("odd", "odd", "odd-one", "1.0"),
        ("second", "odd.more : plugin [extra]", "odd-one", "1.0"),
    ]


def test_the_first_of_one_name_counts_and_folders_that_are_none_do_not(tmp_path: Path) -> None:
    lay(tmp_path / "a", "One-Name", "[underlay]\nx = first\n")
    lay(tmp_path / "b", "one_name", "[underlay]\nx = second\n", version="2.0")
    lay(tmp_path / "b", "other", "[underlay]\ny = third\n", kind="egg-info")
    path = ["missing", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "a"), ""]
    assert plain(installed_entries("underlay", path[:-1])) == [
        ("x", "first", "One-Name", "1.0"),
        ("y", "third", "other", "1.0"),
    ]


def test_what_lies_in_an_archive_is_found_too(tmp_path: Path) -> None:
    lay(tmp_path / "inside", "packed", "[underlay]\nx = packed_module\n")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for file in (tmp_path / "inside").rglob("*"):
            archive.write(file, file.relative_to(tmp_path / "inside"))
    found = installed_entries("underlay", [str(tmp_path / "packed.zip")])
    assert plain(found) == [("x", "packed_module", "packed", "1.0")]


class _Backport(importlib.metadata.MetadataPathFinder):
    """What a newer importlib_metadata puts there when it is imported (by dask, say)."""

    def find_spec(self, *_: object) -> None:
        """It finds no modules."""


@pytest.mark.parametrize("finders", [[], [_Backport()]], ids=["folders", "a finder"])
def test_metadata_that_is_none_hides_only_its_own_distribution(
    finders: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [each for each in sys.meta_path if not hasattr(each, "find_distributions")]
    monkeypatch.setattr(sys, "meta_path", [*known, importlib.machinery.PathFinder, *finders])
    lay(tmp_path, "good", "[underlay]\nx = good\n")
    bad = tmp_path / "bad-1.0.dist-info"
    bad.mkdir()
    (bad / "entry_points.txt").write_bytes(b"[underlay]\nbad = bad\n\xff\xfe")
    (tmp_path / "worse-1.0.dist-info").write_text("a file", encoding="utf-8")
    assert [entry.name for entry in installed_entries("underlay", [str(tmp_path)])] == ["x"]


def test_an_entry_loads_what_it_names() -> None:
    def entry(value: str) -> InstalledEntry:
        return InstalledEntry("x", value, "d", "1")

    assert entry("os.path").load() is os.path
    assert entry("os:path.join").load() is os.path.join
    assert entry("os : path.join [extra]").load() is os.path.join
    for wrong in ("", "os:", "no such", "os:path:join"):
        with pytest.raises(ValueError, match="no module"):
            entry(wrong).load()
    with pytest.raises(ModuleNotFoundError):
        entry("no_such_module").load()
