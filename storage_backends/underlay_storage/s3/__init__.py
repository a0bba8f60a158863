"""Images in object storage: S3 and what speaks it, Google Cloud Storage, Azure, and the web.

Needs the extra: ``pip install 'underlay[s3]'``.
"""

from __future__ import annotations

from underlay.hookspecs import hookimpl
from underlay_storage.s3.blocks.storage import S3Blocks
from underlay_storage.s3.object import S3Object

__all__ = ["S3Blocks", "S3Object", "underlay_storage_backends"]


@hookimpl
def underlay_storage_backends() -> tuple[type[S3Object], type[S3Blocks]]:
    """Offer the storages to underlay."""
    return (S3Object, S3Blocks)
