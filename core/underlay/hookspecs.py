"""The plug-in contract: what an entry of the entry-point group ``underlay`` may implement.

An entry names a module or an object whose functions carry ``@underlay.hookimpl``. Its name counts
as the name of the format that it offers, so that a failure to load is shown to whoever asks for
that format. Importing it must be cheap: import heavy libraries where they are used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from underlay.driver import FormatDriverInstance
    from underlay.storage import BlockingStorage, Storage

__all__ = ["PROJECT_NAME", "hookimpl", "hookspec"]

PROJECT_NAME = "underlay"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def underlay_format_drivers() -> Iterable[type[FormatDriverInstance]]:
    """The format drivers of this plug-in: subclasses of ``underlay.FormatDriverInstance``."""
    return ()


@hookspec
def underlay_storage_backends() -> Iterable[type[BlockingStorage] | type[Storage]]:
    """The storage back ends: subclasses of ``underlay.BlockingStorage`` or ``underlay.Storage``."""
    return ()
