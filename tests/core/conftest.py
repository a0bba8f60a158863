"""What tests of the core share: a format of their own, found as an installed one would be."""

from __future__ import annotations

import pytest

from underlay import plugins

from . import toy_format
from .formats import Formats


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy format, found by name and by probing."""
    monkeypatch.setattr(plugins, "_registry", toy_format.register())


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Formats:
    """Adds formats to those that are installed."""
    real = plugins.registry()
    copy = plugins.Registry(
        records=real.records,
        formats={name: list(claims) for name, claims in real._formats.items()},
        schemes=real._schemes,
    )
    monkeypatch.setattr(plugins, "_registry", copy)
    return Formats(copy)
