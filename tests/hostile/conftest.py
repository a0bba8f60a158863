"""What the tests of hostile images share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from .attacks import SECRET, Place
from .bases import Bases
from .child import Warm


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, qemu: Callable[[str], str]) -> Bases:
    """The undamaged images."""
    for tool in ("qemu-img", "qemu-io"):
        qemu(tool)  # skips, or fails, where it is not installed
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Runs uses in children."""
    with Warm() as parent:
        yield parent


@pytest.fixture
def place(tmp_path: Path, warm: Warm) -> Generator[Place]:
    """A folder of images, beside what no image may show."""
    place = Place(tmp_path, warm)
    place.folder.mkdir()
    place.secret.parent.mkdir()
    place.secret.write_bytes(SECRET)
    yield place
    assert place.secret.read_bytes() == SECRET


@pytest.fixture
def oracle(qemu: Callable[[str], str]) -> str:
    """Where the real qemu-img is."""
    return qemu("qemu-img")
