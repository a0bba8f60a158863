"""What tests of the core share: a format of their own, found as an installed one would be."""

from __future__ import annotations

import pytest

from underlay import plugins

from . import toy_format


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy format, found by name and by probing."""
    monkeypatch.setattr(plugins, "_registry", toy_format.register())
