"""How much an image may ask for."""

from __future__ import annotations

import attrs

from underlay.errors import LimitExceededError

__all__ = ["DEFAULT_LIMITS", "Limits"]


@attrs.frozen(kw_only=True)
class Limits:
    """What an image may ask for before it is refused with ``LimitExceededError``.

    An argument of every open and create. All sizes are bytes.
    """

    #: How many images may stand in one chain, the one that was opened included.
    chain_depth: int = 200
    #: The largest virtual disk.
    virtual_size: int = 64 << 40
    #: The metadata of one image that may be held or scanned in one piece (one table, one
    #: directory).
    metadata: int = 256 << 20
    #: What one encoded unit (a compressed cluster) may decode to.
    decoded_unit: int = 2 << 20

    def check(self, limit: str, value: int, *, what: str) -> None:
        """Refuse ``value`` if it exceeds the attribute ``limit``; ``what`` begins the message.

        Raises:
            LimitExceededError: it does.
        """
        allowed: int = getattr(self, limit)
        if value > allowed:
            raise LimitExceededError(
                f"{what} is {value}, more than the {allowed} that Limits({limit}=…) allows",
                limit=limit,
                value=value,
                allowed=allowed,
            )


DEFAULT_LIMITS = Limits()
