"""How a format is recognised: each driver looks at a bounded view and gives a verdict."""

from __future__ import annotations

from typing import TypeAlias

import attrs

__all__ = [
    "VIEW_BYTES",
    "Match",
    "NoMatch",
    "ProbeFailure",
    "ProbeResult",
    "ProbeVerdict",
    "ProbeView",
]

#: How many bytes of either end a view holds.
VIEW_BYTES = 64 << 10


@attrs.frozen
class ProbeView:
    """The two ends of an object, and its size in bytes; all that a driver sees of it."""

    #: The first ``min(size, VIEW_BYTES)`` bytes.
    head: bytes
    #: The last ``min(size, VIEW_BYTES)`` bytes; overlaps ``head`` in a small object.
    tail: bytes
    size: int


@attrs.frozen
class Match:
    """Signature and version are this format's."""

    #: What was recognised: ``"magic 'QFI\\xfb', version 3"``.
    reason: str


@attrs.frozen
class NoMatch:
    """Not this format."""


ProbeVerdict: TypeAlias = Match | NoMatch


@attrs.frozen
class ProbeFailure:
    """A plug-in that could not give its verdict: it failed to load, or its probe raised."""

    #: The format's name, or the entry point's where no format came to be known.
    format: str
    reason: str


@attrs.frozen
class ProbeResult:
    """What ``probe()`` found out. It is a statement about this moment: never store it."""

    #: The format, ``"raw"`` where nothing matched; None where more than one did.
    format: str | None
    #: True where nothing matched and raw is merely what is left.
    guessed: bool
    #: Every format that matched, with its reason.
    matches: dict[str, str]
    #: Plug-ins that gave no verdict; with any of these, raw is opened read-only.
    failures: tuple[ProbeFailure, ...]
    #: Bytes in the object.
    size: int
