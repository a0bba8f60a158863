"""What an installation gets: no file more and none less."""

from __future__ import annotations

import configparser
import importlib.metadata
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import underlay.plugins

VERSION = importlib.metadata.version("underlay")


@pytest.fixture(scope="module")
def built(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> Path:
    """The sdist of this tree, and the wheel made from that sdist (not from the tree)."""
    out = tmp_path_factory.mktemp("dist")

    def hatchling(where: Path, target: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)],
            cwd=where,
            env=clean_environment,
            stdin=subprocess.DEVNULL,
            check=True,
            capture_output=True,
            timeout=120,
        )

    hatchling(repository, "sdist")
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out / "tree", filter="data")
    hatchling(next((out / "tree").iterdir()), "wheel")
    return out


@pytest.fixture(scope="module")
def wheel_names(built: Path) -> list[str]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        return wheel.namelist()


def test_the_sdist_holds_exactly_this(built: Path) -> None:
    tree = next((built / "tree").iterdir())
    assert tree.name == f"underlay-{VERSION}"
    assert sorted(path.name for path in tree.iterdir()) == [
        ".ci",
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "SECURITY.md",
        "benchmarks",
        "core",
        "docs",
        "drivers",
        "examples",
        "pyproject.toml",
        "storage_backends",
        "tests",
        "tox.ini",
    ]


def test_the_wheel_holds_exactly_this(wheel_names: list[str]) -> None:
    assert sorted({name.partition("/")[0] for name in wheel_names}) == [
        "underlay",
        f"underlay-{VERSION}.dist-info",
        "underlay_drivers",
        "underlay_storage",
    ]
    others = [name for name in wheel_names if not name.endswith(".py")]
    assert sorted(name for name in others if ".dist-info/" not in name) == [
        "underlay/py.typed",
        "underlay_drivers/py.typed",
        "underlay_storage/py.typed",
    ]


def test_the_wheel_holds_every_module_of_the_three_roots(
    repository: Path, wheel_names: list[str]
) -> None:
    roots = [repository / name for name in ("core", "drivers", "storage_backends")]
    modules = {str(path.relative_to(root)) for root in roots for path in root.rglob("*.py")}
    assert {name for name in wheel_names if name.endswith(".py")} == modules


def test_no_source_root_is_a_package(repository: Path) -> None:
    for root in ("core", "drivers", "storage_backends", "tests"):
        assert not (repository / root / "__init__.py").exists()


def test_the_wheel_registers_the_command_and_every_built_in(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
        entries = configparser.ConfigParser()
        entries.read_string(wheel.read(name).decode())
    assert dict(entries["console_scripts"]) == {"underlay": "underlay.cli:main"}
    assert dict(entries["underlay"]) == {
        "file": "underlay_storage.file",
        "memory": "underlay_storage.memory",
        "null": "underlay_storage.null",
        "qcow2": "underlay_drivers.qcow2",
        "raw": "underlay_drivers.raw",
        "s3": "underlay_storage.s3",
    }


def test_every_built_in_loads() -> None:
    records = underlay.plugins.registry().records
    ours = {record.name: record.error for record in records if record.distribution == "underlay"}
    assert ours == dict.fromkeys(("file", "memory", "null", "qcow2", "raw", "s3"))
