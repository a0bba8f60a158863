"""Other people's distributions, made or installed, and Pythons that see them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

#: Writes a distribution as pip would leave it: ``make(name, source, entry_points)``.
MakeDistribution = Callable[..., Path]
#: Runs Python code in a process of its own and returns its stdout: ``run(code, path=[...])``.
RunPython = Callable[..., str]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this repository."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    """The environment for child processes: nothing in it steers Python or underlay."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "UNDERLAY", "COV"))
    }


@pytest.fixture(scope="session")
def run_python(clean_environment: dict[str, str]) -> RunPython:
    """Run code, or a module, in a fresh interpreter; a failure shows its stderr."""

    def run(
        code: str = "",
        *arguments: object,
        path: Sequence[Path] = (),
        module: str | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        status: int = 0,
    ) -> str:
        what = ["-m", module] if module else ["-c", textwrap.dedent(code)]
        done = subprocess.run(
            [sys.executable, *what, *map(str, arguments)],
            cwd=cwd,
            env={
                **clean_environment,
                "PYTHONPATH": os.pathsep.join(map(str, path)),
                "PYTHONWARNINGS": "error",
                **(env or {}),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == status, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout if status == 0 else done.stdout + done.stderr

    return run


@pytest.fixture
def make_distribution(tmp_path: Path) -> MakeDistribution:
    """Lay a distribution with one module into a folder, as an installer leaves it."""

    def make(
        name: str,
        source: str,
        *,
        entry: str,
        folder: Path | None = None,
        version: str = "1.0",
    ) -> Path:
        folder = folder or tmp_path / "site" / name
        folder.mkdir(parents=True, exist_ok=True)
        module = name.replace("-", "_")
        (folder / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        metadata = folder / f"{module}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
        )
        (metadata / "entry_points.txt").write_text(
            f"[underlay]\n{entry} = {module}\n", encoding="utf-8"
        )
        return folder

    return make


@pytest.fixture(scope="session")
def example_plugins(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> Path:
    """A folder into which pip installed the two third-party examples."""
    target = tmp_path_factory.mktemp("third-party")
    examples = repository / "examples"
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", *offline),
            *("--target", str(target)),
            *(str(examples / "third-party-format"), str(examples / "third-party-storage")),
        ],
        env={**clean_environment, "PIP_ROOT_USER_ACTION": "ignore"},
        stdin=subprocess.DEVNULL,
        check=True,
        capture_output=True,
        timeout=120,
    )
    return target
