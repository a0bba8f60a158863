"""Says what a use of a hostile image broke of the recipe's rule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs

from underlay import (
    ImplicitOpenDeniedError,
    InvalidImageError,
    LimitExceededError,
    PluginError,
    StorageNotFoundError,
    UnsupportedFeatureError,
)

from .bases import IMAGE, Base, Bases
from .child import Outcome
from .recipe import HARMLESS, Reading, Recipe, Rule, Writing
from .uses import WRITTEN, Contents, Faults, Mended, Written

__all__ = [
    "Before",
    "files",
    "mending_faults",
    "placed",
    "reading_faults",
    "write_at",
    "writing_faults",
]

#: Where the bit is that marks an image as corrupt.
_CORRUPT_AT, _CORRUPT = 79, 2

#: What says that the image, or what it names, is to blame.
_REFUSALS = (
    ImplicitOpenDeniedError,
    InvalidImageError,
    LimitExceededError,
    PluginError,
    StorageNotFoundError,
    UnsupportedFeatureError,
)


def placed(recipe: Recipe, bases: Bases, folder: Path) -> tuple[Base, Path]:
    """The damaged image's base, and its name, after it was written into the folder."""
    base = bases[recipe.base]
    image = base.image()
    recipe.damage(image)
    return base, base.put(folder, image.data)


def files(folder: Path, base: Base) -> dict[str, bytes]:
    """What the image and all that belongs to it hold."""
    return {name: (folder / name).read_bytes() for name in (IMAGE, *base.beside)}


# -- reading


def reading_faults(rule: Rule, base: Base, read: Outcome) -> Iterator[str]:
    """What is wrong with a full read."""
    if rule.refused:
        if read.error is None:
            yield "it opens to be read"
        elif not isinstance(read.error, _REFUSALS):
            yield f"it is refused for no fault of its own: {read.error!r}"
        return
    if read.error is not None:
        yield f"it does not open to be read: {read.error}"
    elif isinstance(read.value, Contents):
        yield from _contents_faults(rule, base.content, read.value)


def _contents_faults(rule: Rule, good: bytes, found: Contents) -> Iterator[str]:
    data = found.data
    start, end = (min(at, len(data)) for at in rule.damaged)
    # Where the lie makes the disk longer there is nothing.
    good = good[: len(data)].ljust(len(data), b"\0")
    if any(since < start or until > end for since, until in found.failed):
        yield f"reading fails at {found.failed}: {found.error}"
    elif data[:start] != good[:start] or data[end:] != good[end:]:
        yield "bytes outside the damage are not what they were"
    failing = sum(until - since for since, until in found.failed)
    if rule.reading is Reading.FAILS and failing != end - start:
        yield f"of {end - start} damaged bytes only {failing} fail"
    if rule.reading is Reading.FAILS_OR_ZEROES and any(data[start:end]):
        yield "damaged bytes read as what they cannot be"


# -- writing


def write_at(rule: Rule, content: bytes) -> int:
    """The guest offset of the write that a rule speaks of: in the damage, or else in a hole."""
    if rule.damaged[1]:
        return rule.damaged[0]
    hole = content.rfind(bytes(1 << 16))
    return max(0, hole - hole % 4096)


@attrs.frozen(kw_only=True)
class Before:
    """A damaged image before anything changed it."""

    base: Base
    rule: Rule
    read: Outcome
    check: Outcome
    files: dict[str, bytes]

    def places(self) -> list[int]:
        """Where to write, first the place that the rule speaks of."""
        content = self.base.content
        size = self.read.value.size if isinstance(self.read.value, Contents) else len(content)
        spoken_of = write_at(self.rule, content[:size])
        return list(dict.fromkeys((spoken_of, write_at(HARMLESS, content[:size]), 0)))

    def same_elsewhere(self, contents: Contents, *, expected: bytes) -> bool:
        """Whether a later read found outside the damage what was expected."""
        start, end = self.rule.damaged
        data = contents.data
        return data[:start] == expected[:start] and data[end:] == expected[end:]


def writing_faults(
    before: Before, offset: int, outcome: Outcome, after: dict[str, bytes]
) -> Iterator[str]:
    """What is wrong with a write, which left these files."""
    refused = _refusal(outcome)
    writing = Writing.REFUSED if before.rule.refused else before.rule.writing
    if refused is None:
        # Elsewhere than where it speaks of, a rule that refuses leaves it open.
        must_not = before.rule.refused or offset == before.places()[0]
        if writing is Writing.REFUSED and must_not:
            yield f"a write at {offset} works"
        if isinstance(outcome.value, Written):
            yield from _written_faults(before, offset, outcome.value)
        return
    stage, error = refused
    if writing is Writing.WORKS:
        yield f"a write at {offset} does not work ({stage}): {error}"
    elif stage not in {"open", "write"}:
        yield f"a write at {offset} was taken, and refused later ({stage}): {error}"
    for name, content in before.files.items():
        if after[name] not in _allowed(name, content):
            yield f"a write at {offset} that was refused ({stage}: {error}) changed {name}"


def _refusal(outcome: Outcome) -> tuple[str, str] | None:
    """At what stage a write was refused, and why."""
    if outcome.error is not None:
        return "open", str(outcome.error)
    written = outcome.value
    if isinstance(written, Written) and written.refused is not None:
        return written.refused, str(written.error)
    return None


def _allowed(name: str, content: bytes) -> list[bytes]:
    """What a file may hold after a refusal: what it held, or that with the mark."""
    if name != IMAGE or len(content) <= _CORRUPT_AT:
        return [content]
    marked = bytearray(content)
    marked[_CORRUPT_AT] |= _CORRUPT
    return [content, bytes(marked)]


def _written_faults(before: Before, offset: int, written: Written) -> Iterator[str]:
    contents = written.contents
    assert contents is not None
    if isinstance(before.read.value, Contents):
        expected = bytearray(before.read.value.data)
        new = WRITTEN[: len(expected) - offset]
        expected[offset : offset + len(new)] = new
        if contents.data[offset : offset + len(new)] != new:
            yield f"what was written at {offset} does not read back: {contents.error}"
        if not before.same_elsewhere(contents, expected=bytes(expected)):
            yield f"a write at {offset} changed other bytes"
    was, left = before.check.value, written.faults
    if isinstance(was, Faults):
        if not isinstance(left, Faults):
            yield f"after a write at {offset} it cannot be checked: {left}"
        elif left.corruptions > was.corruptions or left.leaks > was.leaks:
            yield f"a write at {offset} made it worse: {was}, then {left}"


def mending_faults(before: Before, outcome: Outcome) -> Iterator[str]:
    """What is wrong with a repair."""
    mended = outcome.value
    if not isinstance(mended, Mended):
        return
    was = before.check.value
    if isinstance(was, Faults) and mended.left.corruptions > was.corruptions:
        yield f"it made it worse: {was}, then {mended.left}"
    read = before.read.value
    if isinstance(read, Contents) and not mended.left.corruptions:
        if not isinstance(mended.contents, Contents):
            yield f"it cannot be read any more: {mended.contents}"
        elif not before.same_elsewhere(mended.contents, expected=read.data):
            yield "it changed bytes outside the damage"
