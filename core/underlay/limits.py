"""How much an image may ask for."""

from __future__ import annotations

import attrs

from underlay.errors import LimitExceededError

__all__ = ["DEFAULT_LIMITS", "Limits"]


@attrs.frozen(kw_only=True)
class Limits:
    """What an image may ask for before it is refused with ``LimitExceededError``.

    An argument of every open and create. All sizes are bytes. A format may have bounds of its own
    below these; beyond them an image is damaged. How long work may take is for ``TimeLimit``.
    """

    #: How many images may stand in one chain, the one that was opened included.
    chain_depth: int = 200
    #: The largest virtual disk. A copy of it may become as large, however small the image is: for
    #: images of strangers, choose what there is room for.
    virtual_size: int = 64 << 40
    #: The metadata of one image that may be held or scanned in one piece (one table, one
    #: directory), and the memory that checking or changing it may need to count in.
    metadata: int = 256 << 20
    #: How many things of one kind one image may list: snapshots, bitmaps, header extensions.
    entries: int = 65_536
    #: Any one name that stands in an image: of another object, a snapshot, a bitmap.
    name: int = 65_535
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
