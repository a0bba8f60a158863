"""Formats that exist for one test: nothing but a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from underlay import plugins
from underlay.driver import FormatDriverInstance, FormatOpenOptions
from underlay.handle import StorageHandle
from underlay.mapping import Eof, ShallowMapping
from underlay.probing import Match, NoMatch, ProbeVerdict, ProbeView

__all__ = ["Formats", "Verdict", "ends", "starts"]

Verdict = Callable[[ProbeView], object]


class _Empty(FormatDriverInstance):
    """A disk of no bytes."""

    def __init__(self, storage: StorageHandle) -> None:
        self.storage = storage

    @classmethod
    async def open(cls, options: FormatOpenOptions) -> _Empty:
        return cls(options.storage)

    def size(self) -> int:
        return 0

    def collect_storage_dependencies(self) -> Sequence[StorageHandle]:
        return (self.storage,)

    async def get_mapping(self, offset: int, max_length: int) -> ShallowMapping:
        return Eof()


@attrs.define
class Formats:
    """Adds formats to those that are installed, for one test."""

    registry: plugins.Registry

    def add(self, name: str, verdict: Verdict, *, distribution: str = "dist") -> None:
        def probe(cls: type, view: ProbeView) -> ProbeVerdict:
            return verdict(view)  # type: ignore[return-value]

        kind = type(name.title(), (_Empty,), {"format_name": name, "probe": classmethod(probe)})
        record = plugins.PluginRecord(
            name=name, value=f"{distribution}:x", distribution=distribution, version="1"
        )
        self.registry._formats.setdefault(name, []).append(plugins._Claim(kind, record))

    def fail(self, name: str) -> None:
        record = plugins.PluginRecord(
            name=name, value="x", distribution="broken", version="1", error="ImportError: nope"
        )
        self.registry.records = (*self.registry.records, record)


def starts(magic: bytes) -> Verdict:
    """Claims what begins so."""
    return lambda view: Match(f"starts with {magic!r}") if view.head[:4] == magic else NoMatch()


def ends(magic: bytes) -> Verdict:
    """Claims what ends so."""
    return lambda view: Match(f"ends with {magic!r}") if view.tail.endswith(magic) else NoMatch()
