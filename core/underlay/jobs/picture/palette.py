"""Colours, which people with any kind of sight can tell apart, on light ground and on dark.

Hues follow Okabe and Ito, and neighbours differ in lightness too, so that a print in grey still
tells an image from the one beneath it. Plain classes are used instead of CSS variables: more
programs draw them.
"""

from __future__ import annotations

from typing import NamedTuple

from underlay.jobs.picture.model import Ink, Kind

__all__ = ["LAYERS", "Shade", "ink_class", "patterns", "stylesheet"]


class Shade(NamedTuple):
    """A colour on light ground, and on dark."""

    light: str
    dark: str


#: By the place of an image in its chain: blue, amber, green, rose, sky, brown, olive; and for all
#: beneath what stands out least: near black on white, near white on black.
LAYERS = (
    Shade("#2468b4", "#5a9bec"),
    Shade("#e8960c", "#f5b041"),
    Shade("#12966f", "#2fbf93"),
    Shade("#c2569b", "#e283bf"),
    Shade("#6fb7e6", "#8fd0fa"),
    Shade("#8f4a1c", "#b8653a"),
    Shade("#7a8a1f", "#8a9a2a"),
    Shade("#3a404a", "#dfe3ea"),
)
_GROUND = Shade("#fdfdfc", "#14171c")
_ZERO = Shade("#bcc4ce", "#56606e")
_UNALLOCATED = Shade("#eceef1", "#262c34")
_TEXT = Shade("#1b2027", "#eceff3")
_MUTED = Shade("#626b78", "#98a2b0")
_LINE = Shade("#d9dde2", "#363d47")

_FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif'


def ink_class(ink: Ink) -> str:
    """The class of what is drawn with an ink: as a stroke in a map, as an area in a legend."""
    if ink.kind is Kind.DATA:
        return f"d{ink.colour}"
    if ink.kind is Kind.COMPRESSED:
        return f"c{ink.colour}"
    return "ze" if ink.kind is Kind.ZERO else "un"


def stylesheet() -> str:
    """The rules for all classes, for both grounds."""
    fixed = (
        f"text{{font-family:{_FONT};font-variant-numeric:tabular-nums}}"
        ".m path{fill:none}.tip path{fill-opacity:0}.tip path:hover{fill-opacity:.28}"
    )
    for colour in range(len(LAYERS)):
        fixed += f".m .c{colour}{{stroke:url(#p{colour})}}.f .c{colour}{{fill:url(#p{colour})}}"
    return f"{fixed}{_coloured(0)}@media(prefers-color-scheme:dark){{{_coloured(1)}}}"


def _coloured(ground: int) -> str:
    rules = [
        f".bg{{fill:{_GROUND[ground]}}}",
        f"text{{fill:{_TEXT[ground]}}}",
        f".tip path{{fill:{_TEXT[ground]}}}",
        f"text.mu{{fill:{_MUTED[ground]}}}",
        f".ln{{stroke:{_LINE[ground]};fill:none}}",
        f".pl{{fill:{_UNALLOCATED[ground]};fill-opacity:.45}}",
        f".pb{{fill:{_GROUND[ground]};fill-opacity:.62}}",
    ]
    areas = [("ze", _ZERO), ("un", _UNALLOCATED)]
    areas += [(f"d{colour}", shade) for colour, shade in enumerate(LAYERS)]
    for name, shade in areas:
        rules.append(f".m .{name}{{stroke:{shade[ground]}}}.f .{name}{{fill:{shade[ground]}}}")
    return "".join(rules)


def patterns(colours: set[int]) -> str:
    """Stripes in the colours of these images, for what is compressed."""
    return "".join(
        f'<pattern id="p{colour}" width="4" height="4" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><g class="f"><rect class="d{colour}" width="4" height="4"/>'
        f'<rect class="pb" width="1.9" height="4"/></g></pattern>'
        for colour in sorted(colours)
    )
