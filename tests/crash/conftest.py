"""Images to start from, closed in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from .shapes import Prepared, Shape


@pytest.fixture
def prepare() -> Iterator[Callable[[Shape], Prepared]]:
    """Make an image of a shape."""
    with ExitStack() as stack:

        def make(shape: Shape) -> Prepared:
            prepared = shape.prepared()
            stack.callback(prepared.close)
            return prepared

        yield make
