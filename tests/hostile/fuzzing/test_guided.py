"""A short coverage-guided run of each target, the same one every time.

The long one, for as long as one likes: ``tox -e fuzz -- TARGET -max_total_time=3600``.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from .guided import ROOT
from .seeds import make_seeds
from .targets import TARGETS

pytestmark = pytest.mark.slow

#: Besides the seeds.
_RUNS = 50
#: A process takes its peak of memory over from what started it. The fuzzer judges that peak, so
#: something small has to stand between it and these tests.
_AFRESH = ("/bin/sh", "-c", '"$@"; exit $?', "sh")


@pytest.fixture(scope="module")
def seeds(
    tmp_path_factory: pytest.TempPathFactory,
    qemu: Callable[[str], str],
    lacks: Callable[[str], NoReturn],
) -> Path:
    """A corpus for each target."""
    for tool in ("qemu-img", "qemu-io"):
        qemu(tool)
    _needs_atheris(lacks)
    folder = tmp_path_factory.mktemp("seeds")
    make_seeds(folder)
    return folder


def _needs_atheris(lacks: Callable[[str], NoReturn]) -> None:
    """It has wheels for some Pythons on one platform; there it must be in CI."""
    if importlib.util.find_spec("atheris") is not None:
        return
    made_for = sys.version_info < (3, 14) and (sys.platform, platform.machine()) == (
        "linux",
        "x86_64",
    )
    if made_for:
        lacks("atheris is not installed (pip install --group fuzz)")
    pytest.skip("atheris is not installed (pip install --group fuzz)")


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found(target: str, seeds: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *_AFRESH,
            *(sys.executable, "-m", "tests.hostile.fuzzing.guided", target, seeds / target),
            *(f"-runs={_RUNS}", "-seed=1", "-timeout=60", f"-artifact_prefix={tmp_path}/"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert f"Done {_RUNS} runs" in done.stderr
