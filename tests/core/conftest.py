"""What tests of the core share: a format of their own, and storages that they can look into."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from underlay import plugins

from .toy_format import Toy


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Toy]]:
    """The toy format, found by name and by probing as an installed one would be."""
    real = plugins.registry()
    record = plugins.PluginRecord(
        name="toy", value="toy_format", distribution="toys", version="1", formats=("toy",)
    )
    with_toy = plugins.Registry(
        records=(*real.records, record),
        formats={**real._formats, "toy": [plugins._Claim(Toy, record)]},
        schemes=real._schemes,
    )
    monkeypatch.setattr(plugins, "_registry", with_toy)
    yield Toy
