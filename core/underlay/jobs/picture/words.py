"""Numbers and names as a picture writes them."""

from __future__ import annotations

from collections.abc import Iterator

from underlay.errors import printable
from underlay.jobs.picture.model import Kind, Picture

__all__ = ["count_words", "key_numbers", "share_words", "short_name", "size_words"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
#: The longest name that is written out; where there is less room, the middle is left out.
_LONGEST = 512
_KILO = 1024
_HUNDREDS = 999.5
_TENTH = 0.001
_TEN = 0.1
_NEARLY_ALL = 0.99


def size_words(size: int) -> str:
    """Bytes with three digits, or four before the next unit: "1.5 GiB", "1020 GiB"."""
    unit, amount = 0, float(size)
    while amount >= _KILO and unit < len(_UNITS) - 1:
        amount /= _KILO
        unit += 1
    return f"{amount:.0f} {_UNITS[unit]}" if amount >= _HUNDREDS else f"{amount:.3g} {_UNITS[unit]}"


def share_words(part: int, whole: int) -> str:
    """A share as a percentage; nothing is nothing, and what is something is never "0%"."""
    if not part or not whole:
        return "0%"
    share = part / whole
    if share < _TENTH:
        return "<0.1%"
    if share >= 1:
        return "100%"
    if share > 1 - _TENTH:
        return ">99.9%"
    return f"{100 * share:.1f}%" if share < _TEN or share > _NEARLY_ALL else f"{100 * share:.0f}%"


def count_words(number: int, one: str, many: str) -> str:
    """A number with its noun: "1 run", "12,345 runs"."""
    return f"{number:,} {one if number == 1 else many}"


def short_name(name: str, room: int = _LONGEST) -> str:
    """A name that steers nothing, in so many characters."""
    text = printable(name)
    if len(text) <= room:
        return text
    head = (room - 1) // 2
    return f"{text[:head]}…{text[len(text) - (room - 1 - head) :]}"


def key_numbers(picture: Picture) -> Iterator[tuple[str, str, str]]:
    """What stands above a picture: a word, a number, and more about it."""
    whole = picture.length
    if whole == picture.virtual_size:
        more = count_words(len(picture.layers), "image", "images")
        yield "Virtual size", size_words(picture.virtual_size), more
    else:
        yield "Range", size_words(whole), f"from {size_words(picture.start)} on"
    for label, kind in (
        ("Data", Kind.DATA),
        ("Compressed", Kind.COMPRESSED),
        ("Zeroes", Kind.ZERO),
        ("Unallocated", Kind.UNALLOCATED),
    ):
        total = picture.total(kind)
        more = share_words(total, whole)
        if kind is Kind.COMPRESSED and total:
            more += f", in {size_words(picture.compressed_size)}"
        yield label, size_words(total), more
    average = size_words(whole // picture.runs) if picture.runs else "0 B"
    yield "Runs", f"{picture.runs:,}", f"{average} on average"
    percent = share_words(round(picture.fragmentation * 10**9), 10**9)
    yield "Fragmentation", percent, count_words(picture.fragments, "fragment", "fragments")
