"""Sizes as people write them."""

from __future__ import annotations

import operator
import re

from underlay.errors import OptionError

__all__ = ["parse_size"]

_SUFFIXES = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}
_SIZE = re.compile(r"(?:(0x[0-9a-f]+)|(\d+(?:\.\d+)?))([bkmgtpe]?)", re.ASCII | re.IGNORECASE)
#: No size that can be is written with more characters.
_LONGEST = 100


def parse_size(size: int | str, *, option: str = "size") -> int:
    """Bytes from an int, or from text with qemu-img's suffixes (k, M, G, T, P, E; powers of 1,024).

    A fraction is allowed before a suffix ("1.5G") and is rounded to whole bytes.

    Raises:
        OptionError: it is no size, negative, or 2^63 or more.
    """
    if isinstance(size, str):
        number = _parsed(size.strip())
        if number is None:
            raise OptionError(
                f"'{size[:_LONGEST]}' is no size for '{option}': a number with an optional suffix "
                f"k, M, G, T, P or E was expected",
                option=option,
            )
    else:
        try:
            number = operator.index(size)
        except TypeError:
            number = None
        if number is None or isinstance(size, bool):
            raise OptionError(f"{size!r} is no size for '{option}'", option=option)
    if not 0 <= number < 1 << 63:
        shown = str(number) if abs(number) < 1 << 128 else f"of {number.bit_length()} bits"
        raise OptionError(
            f"The size {shown} for '{option}' must be from 0 to 2^63-1", option=option
        )
    return number


def _parsed(text: str) -> int | None:
    match = _SIZE.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        return None
    hexadecimal, decimal, suffix = match.groups()
    unit: int = 1024 ** _SUFFIXES[suffix.lower()]
    if hexadecimal is not None:
        return int(hexadecimal, 16) * unit
    if "." in decimal and not suffix:
        return None
    whole, _, fraction = decimal.partition(".")
    parts: int = 10 ** len(fraction)
    return (2 * int(whole + fraction) * unit + parts) // (2 * parts)
