"""Sizes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from underlay.errors import OptionError

__all__ = ["parse_size"]

_SUFFIXES = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}
_SIZE = re.compile(r"(0x[0-9a-f]+|\d+)(\.\d+)?([bkmgtpe]?)", re.IGNORECASE)


def parse_size(size: int | str, *, option: str = "size") -> int:
    """Bytes from an int, or from text with qemu-img's suffixes (k, M, G, T, P, E; powers of 1,024).

    A fraction is allowed before a suffix ("1.5G") and is cut to whole bytes.

    Raises:
        OptionError: it is no size, negative, or 2^63 or more.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip())
        if match is None or (match[2] and (not match[3] or match[1].lower().startswith("0x"))):
            raise OptionError(
                f"'{size}' is no size for '{option}': a number with an optional suffix k, M, G, T, P "
                f"or E was expected",
                option=option,
            )
        number = (
            Fraction(int(match[1], 0))
            if match[1].lower().startswith("0x")
            else Fraction(match[1] + (match[2] or ""))
        )
        size = int(number * 1024 ** _SUFFIXES[match[3].lower()])
    if isinstance(size, bool) or not isinstance(size, int):
        raise OptionError(f"'{size}' is no size for '{option}'", option=option)
    if not 0 <= size < 1 << 63:
        raise OptionError(f"The size {size} for '{option}' must be from 0 to 2^63-1", option=option)
    return size
