"""Text of strangers made harmless, and quickly so: an image may hold 64 MiB of names."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Escapes"]

#: More characters than this are worked out again and again.
_REMEMBERED = 4096


class Escapes(dict[int, str]):
    """What becomes of each character, for ``str.translate``; worked out when it is first met."""

    def __init__(self, escape: Callable[[str], str]) -> None:
        super().__init__()
        self._escape = escape

    def __missing__(self, code: int) -> str:
        escaped = self._escape(chr(code))
        if len(self) < _REMEMBERED:
            self[code] = escaped
        return escaped
