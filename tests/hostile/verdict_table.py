"""The table of verdicts in docs/hostile-images.md, between two marks that only this writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from .corpus import RECIPES
from .reasons import REASONS
from .verdicts import Verdict

__all__ = ["OPTION", "PAGE", "filled"]

OPTION = "--write-hostile-table"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "hostile-images.md"
_BEGIN = f"<!-- written by pytest {OPTION} -->\n"
_END = "<!-- up to here -->\n"

#: The row for what has no number.
_FUZZED = (
    "| 146 and on | anything else: fields with values from the borders of what they hold, flipped "
    "bits, swapped blocks, files that end early, good images damaged at random, and whatever "
    "reaches new code | | no rule broken | see [fuzzing](fuzzing.md) |"
)


def filled(page: str, verdicts: Mapping[str, tuple[Verdict, Verdict]]) -> str:
    """The page with the table of these verdicts, theirs and ours by the names of the recipes."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    lines = [*_table(verdicts), "", *_reasons()]
    return f"{before}{_BEGIN}\n" + "\n".join(lines) + f"\n\n{_END}{after}"


def _table(verdicts: Mapping[str, tuple[Verdict, Verdict]]) -> Iterator[str]:
    yield "| number | the lie | QEMU 7.2 | underlay | why |"
    yield "|---|---|---|---|---|"
    for recipe in sorted(RECIPES, key=lambda recipe: recipe.number):
        theirs, ours = verdicts[recipe.name]
        why = ", ".join(f"*{one.name}*" for one in REASONS if recipe.name in one.recipes)
        same = "the same" if ours == theirs else str(ours)
        yield f"| {recipe.number} | {recipe.lie} | {theirs} | {same} | {why} |"
    yield _FUZZED


def _reasons() -> Iterator[str]:
    yield "| | QEMU | underlay | why |"
    yield "|---|---|---|---|"
    for one in REASONS:
        yield f"| *{one.name}* | {one.theirs} | {one.ours} | {one.why} |"
