"""What a hostile image is made from, and what may become of it.

A recipe takes an image that a real tool made and damages it in one way. Its number is that of the
class of lies it stands for (docs/hostile-images.md lists them).
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import attrs

from .editing import Image

__all__ = ["HARMLESS", "REFUSED", "Reading", "Recipe", "Rule", "Writing"]


class Reading(enum.Enum):
    """What a full read of an image that opens comes to."""

    #: The bytes that were there before the damage.
    SAME = enum.auto()
    #: A typed error inside the damaged range; the same bytes elsewhere.
    FAILS = enum.auto()
    #: A typed error or zeroes inside the damaged range; the same bytes elsewhere.
    FAILS_OR_ZEROES = enum.auto()
    #: A typed error or any bytes inside the damaged range: nobody can tell that they are wrong.
    ANY = enum.auto()


class Writing(enum.Enum):
    """What opening a copy for writing, and writing to it, comes to."""

    #: It works, reads back, and the image has no more faults than before.
    WORKS = enum.auto()
    #: A typed error, at the open or at the write; the file stays byte for byte what it was, but for
    #: the bit that marks it corrupt. Said of a write at the start of the damaged bytes, or where
    #: there are none, of one that allocates; elsewhere it is ``EITHER``.
    REFUSED = enum.auto()
    #: One of these two.
    EITHER = enum.auto()


@attrs.frozen(kw_only=True)
class Rule:
    """What is owed for a recipe."""

    #: A typed error at every open for the disk's bytes, though files in the image's own folder may
    #: be opened. What looks at nothing but metadata may still tell of them.
    refused: bool = False
    reading: Reading = Reading.SAME
    #: The damaged guest bytes: from, to. Only where ``reading`` speaks of a range.
    damaged: tuple[int, int] = (0, 0)
    writing: Writing = Writing.WORKS


REFUSED = Rule(refused=True)
HARMLESS = Rule()


@attrs.frozen(kw_only=True)
class Recipe:
    """One way to lie."""

    #: The class in the table; several recipes may stand for one.
    number: int
    #: Unique, in lower case with hyphens; what the test is called.
    name: str
    #: A sentence's beginning for the table: "the L1 table begins past the end".
    lie: str
    #: The name of the image that is damaged, in ``bases``.
    base: str
    damage: Callable[[Image], object]
    rule: Rule
