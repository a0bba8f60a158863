"""Replacing a header with its extensions and names, so that a crash leaves the old or the new one.

Only one sector is ever written whole, and a header area may take several. So what lies beyond the
first sector is never overwritten while the first sector leads there: the new area is written behind
the old one, then the first sector is switched to it, with an extension of a type that nobody knows
over the gap; and then the same again, to where it belongs. Pure.
"""

from __future__ import annotations

from typing import Final

import attrs

from underlay.errors import LimitExceededError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Header

__all__ = ["Step", "plan_header"]

#: Host offset and the bytes to write there; durable before the next step.
Step = tuple[int, bytes]

_SECTOR: Final = layout.SECTOR


def plan_header(old: Header, new: Header) -> tuple[list[Step], Header]:
    """The steps from one header to another, and the new one with its backing name placed.

    Where the extensions and names stay as they are, that is one step, within the first sector.

    Raises:
        LimitExceededError: there is no room for it in the first cluster.
    """
    if _area(new) == _area(old):
        return [(0, new.fixed_bytes())], new
    # A gap is left over only where a rewriting was cut off.
    kept = tuple(e for e in new.extensions if e.type != layout.EXTENSION_GAP)
    new = attrs.evolve(new, extensions=kept)
    final = new.to_bytes()
    placed = Header.unpack(final).with_extensions(final)[0].with_backing_name(final)
    used = _used(old)
    steps: list[Step] = []
    rest = final[_SECTOR:]
    last = used
    if rest and used > _SECTOR:
        start = max(used, len(final))
        start += -start % 8
        area = new.extension_area()
        steps += _detour(new, area, start)
        last = start + len(area) + len(new.backing_name)
    if rest:
        steps.append((_SECTOR, rest))
    steps.append((0, final[:_SECTOR].ljust(_SECTOR, b"\0")))
    leftover = max(len(final), _SECTOR)
    if last > leftover:
        steps.append((leftover, bytes(last - leftover)))
    return steps, placed


def _area(header: Header) -> tuple[object, ...]:
    """What stands behind the fixed fields, and where."""
    return (
        header.version,
        header.header_length,
        header.additional,
        header.extensions,
        header.backing_file_offset,
        header.backing_name,
    )


def _used(header: Header) -> int:
    """Where what the header area holds ends, in bytes."""
    area = header.header_length + len(header.extension_area())
    # Without an offset there is no name, whatever its size is said to be.
    return max(area, header.backing_file_offset + len(header.backing_name))


def _detour(header: Header, area: bytes, start: int) -> list[Step]:
    """The steps to the same header with its extensions and its name at ``start``."""
    name = header.backing_name
    end = start + len(area) + len(name)
    gap = start - header.header_length - layout.EXTENSION.size
    if header.header_length + layout.EXTENSION.size > _SECTOR or end > header.cluster_size:
        raise LimitExceededError(
            f"The first cluster of {header.cluster_size} bytes has no room for the old and the new "
            "header side by side, which takes it safely from one to the other; use shorter names",
            limit="cluster_size",
            value=end,
            allowed=header.cluster_size,
        )
    moved = attrs.evolve(
        header,
        backing_file_offset=start + len(area) if name else 0,
        backing_file_size=len(name),
    )
    first = moved.fixed_bytes()
    if header.version > 2:  # noqa: PLR2004 (a version is its own best name)
        first += header.additional
    first += layout.EXTENSION.pack(layout.EXTENSION_GAP, gap)
    return [(start, area + name), (0, first.ljust(_SECTOR, b"\0"))]
