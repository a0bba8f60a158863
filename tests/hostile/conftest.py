"""What the tests of hostile images share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

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
