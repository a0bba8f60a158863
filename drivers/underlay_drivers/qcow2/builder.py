"""Opening a qcow2 image by hand: a builder, and the steps from a bare image to a disk."""

from __future__ import annotations

__all__ = ["PublicInterface"]


class PublicInterface:
    """What programs that hold a ``Qcow2`` directly can do with it."""

    __slots__ = ()
