"""Sizes and numbers on the command line, read and refused as qemu-img does."""

from __future__ import annotations

import re
from typing import Final

from underlay.cli.output import warn
from underlay.cli.problems import CommandError
from underlay.errors import OptionError
from underlay.units import parse_size

__all__ = ["LARGEST", "as_c_reads", "given_size", "warn_of_hexadecimal", "whole_number"]

#: The largest size, and the largest offset.
LARGEST: Final = (1 << 63) - 1


def given_size(text: str, *, what: str, least: int = 0, most: int = LARGEST) -> int:
    """Bytes, or another number with a suffix, from the command line.

    Raises:
        CommandError: it is none, or out of its range; in qemu-img's words.
    """
    try:
        warn_of_hexadecimal(text)
        number = parse_size(as_c_reads(text))
    except OptionError as error:
        if "must be from" not in str(error):
            raise CommandError(
                f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for",
                "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.",
            ) from None
        number = LARGEST + 1
    if not least <= number <= most:
        raise CommandError(f"Invalid {what} specified. Must be between {least} and {most}.")
    return number


def warn_of_hexadecimal(text: str) -> None:
    """Say what qemu-img says of a hexadecimal number with a suffix."""
    if _HEXADECIMAL.fullmatch(text):
        warn(f"Using a multiplier suffix on hex numbers is deprecated: {text}")


_HEXADECIMAL: Final = re.compile(r"\s*[+]?0x[0-9a-f]+[kmgtp]", re.ASCII | re.IGNORECASE)


def whole_number(text: str) -> int | None:
    """A number as C's ``strtoul`` reads it, hexadecimal and octal too; None if it is none."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, hexadecimal, octal, decimal = match.groups()
    number = int(hexadecimal or octal or decimal, 16 if hexadecimal else 8 if octal else 10)
    return -number if sign == "-" else number


_NUMBER: Final = re.compile(r"\s*([+-]?)(?:0x([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))", re.ASCII)


def as_c_reads(text: str) -> str:
    """What C's ``strtoull`` takes for a number: a plus sign may be there, a space behind it not."""
    return text.lstrip().removeprefix("+") if text == text.rstrip() else ""
