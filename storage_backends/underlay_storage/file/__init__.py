"""Files and block devices: the storage behind a path, and behind the URL scheme ``file``."""

from __future__ import annotations

from underlay.hookspecs import hookimpl
from underlay_storage.file.storage import FileStorage

__all__ = ["FileStorage", "underlay_storage_backends"]


@hookimpl
def underlay_storage_backends() -> tuple[type[FileStorage]]:
    """Offer the storage to underlay."""
    return (FileStorage,)
