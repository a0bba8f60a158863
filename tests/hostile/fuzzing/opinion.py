"""The second opinion of tests/crash on images that may be damaged: where it can tell, it does."""

from __future__ import annotations

import re
import struct

from ...crash.structure import TooMuchError, Verdict, look_at
from .fields import fields

__all__ = ["new_faults", "opinion", "unseen"]

#: With more faults than these, what is there is no image any more.
_MOST = 500


def opinion(data: bytes) -> Verdict | None:
    """What is wrong with an image, or None where that cannot be told."""
    try:
        found = look_at(data)
    except (struct.error, ValueError, IndexError, OverflowError, TooMuchError):
        return None
    return found if len(found.corruptions) <= _MOST else None


def unseen(data: bytes) -> list[str]:
    """What is wrong with an image of which a check says that nothing is.

    Like QEMU's, it does not look at what reading refuses, or takes for nothing.
    """
    found = opinion(data)
    return [] if found is None else [one for one in found.corruptions if not _passed(one, data)]


def _passed(fault: str, data: bytes) -> bool:
    """Whether a check passes over a fault."""
    value = int(found[1], 16) if (found := re.search(r"(0x[0-9a-f]+)", fault)) else 0
    cluster = int(found[1]) if (found := re.search(r"to cluster (\d+), past", fault)) else 0
    zero_flag = "reserved bits" in fault and value & _RESERVED == 0
    nothing = "is data at nothing" in fault and value & ~1 == 1 << 63
    # As long as some of a cluster is in the file, so is all of it.
    cut = cluster << data[23] < len(data) + (1 << data[23])
    return "not its guest offset" in fault or zero_flag or nothing or (cluster > 0 and cut)


#: Of the entries of L2 tables, but for the flag that is reserved in some layouts.
_RESERVED = 0x3F00_0000_0000_01FE


def new_faults(
    before: bytes, was: Verdict | None, after: bytes, *, checked: bool = False
) -> list[str]:
    """What is wrong now and was not, as far as that could be avoided; ``was`` is about before.

    Where a cluster was counted too low before, whoever frees one of its users gives it away under
    the others; and a file that grows may grow under an entry that led past its end. Only who has
    ``checked`` the whole image can know. Nobody can help what becomes of entries where a table is
    something else too, and what is written there is written into the table.
    """
    now = None if was is None else opinion(after)
    if was is None or now is None:
        return []
    if before[60:64] != bytes(4) and before[64:72] == bytes(8):
        return []  # the header is the snapshot table
    known = _faults(was)
    # What lay past the end of the file may lie in it now, and is not counted there either; nor is
    # what stands before it in the same stream.
    past = (int(cluster) for cluster in re.findall(r"to cluster (\d+), past", str(was.corruptions)))
    known |= {f"cluster {cluster + more} {_TOO_LOW}" for cluster in past for more in range(-2, 3)}
    found = _faults(now) - known
    if any(f"cluster {number} {_TOO_LOW}" in known for number in _tables(before)):
        found = {fault for fault in found if not fault.startswith("entry ")}
    doubtful = any(fault.endswith((_TOO_LOW, _PAST)) for fault in known)
    if doubtful:
        # Flags are no worse than the counts that they tell of.
        found = {fault for fault in found if "COPIED=" not in fault}
    if doubtful and not checked:
        found = {fault for fault in found if not fault.startswith(("entry ", "bitmap "))}
        found = {fault for fault in found if not fault.endswith((_TOO_LOW, _PAST))}
    return sorted(found)


def _tables(data: bytes) -> set[int]:
    """The clusters that L1 entries lead to."""
    places = [field.offset for field in fields(data) if field.name.endswith("L1 entry")]
    entries = [int.from_bytes(data[place : place + 8], "big") for place in places]
    return {(entry & 0x00FF_FFFF_FFFF_FE00) >> data[23] for entry in entries}


_TOO_LOW = "is counted too low"
_PAST = "past the end of the file"


def _faults(verdict: Verdict) -> set[str]:
    """Each fault, but that it says of itself to be damaged.

    Once, though snapshots share it; and without the bit COPIED of an entry, which may change.
    """
    found: set[str] = set()
    for fault in verdict.corruptions:
        told = re.sub(r"^the (active L1 table|L1 table of snapshot \d+), ", "", fault)
        told = re.sub(r"^bitmap \d+", "bitmap", told)
        told = re.sub(r" refcount \d+$", " another refcount", told)
        told = re.sub(r" refers to cluster \d+, ", " leads ", told)
        told = re.sub(r"0x8([0-9a-f]{15})", lambda found: hex(int(found[1], 16)), told)
        found.add(re.sub(r" has refcount \d+ and \d+ references", f" {_TOO_LOW}", told))
    return found - {"it is marked as corrupt"}
