"""What is said to an object store, and what it says: values alone."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

import attrs

__all__ = ["CREATE", "WRITE_ID", "Condition", "Facts", "Got", "Listed", "strong"]

#: The user metadata that says which write made an object. Azure refuses hyphens, and some proxies
#: drop headers with underscores.
WRITE_ID: Final = "underlaywriteid"


@attrs.frozen
class Condition:
    """What has to hold for a write; the server looks, in one step with the write."""

    #: The object has this ETag; None: there is no object.
    etag: str | None


CREATE: Final = Condition(None)


@attrs.frozen(kw_only=True)
class Facts:
    """What a server says of an object."""

    #: Bytes.
    size: int
    #: Quoted, as it is sent. None where the server gives none that stands for the very bytes.
    etag: str | None
    #: What ``put`` and ``upload`` were given; None for an object that somebody else made.
    write_id: str | None
    #: Seconds since the epoch, by the server's clock.
    modified: float = 0

    @property
    def version(self) -> Hashable:
        """What changes when the bytes do, as far as the server tells."""
        return self.etag or (self.size, self.modified)


@attrs.frozen(kw_only=True)
class Got:
    """A range of an object, and the object's facts at that moment."""

    #: From the offset that was asked for; short only where the object ends. Read-only.
    data: memoryview
    facts: Facts


@attrs.frozen(kw_only=True)
class Listed:
    """An object in a listing."""

    key: str
    #: Bytes.
    size: int
    #: Seconds since the epoch, by the server's clock.
    modified: float


def strong(etag: str | None) -> str | None:
    """An ETag that stands for the very bytes, quoted as it is sent; None for others."""
    if not etag or etag[:2].upper() == "W/":
        return None
    return etag if etag.startswith('"') else f'"{etag}"'
