"""Signatures of formats that other programs act on, whether or not a plug-in for them is installed.

An object that none of our drivers claims is raw to us. Another program may still take it for an
image that names further files, so ``inspect`` must not call it safe, and nobody may write to it as
if it were raw, or make a raw disk look so, unless the format was said. Facts of public
specifications; nothing is parsed.
"""

from __future__ import annotations

import re
from typing import Final

from underlay.probing import ProbeView

__all__ = ["foreign_formats"]

#: Name, offset in the object's head, bytes there.
_AT_HEAD: Final = (
    ("qcow", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vhdx", 0, b"vhdxfile"),
    ("vhd", 0, b"conectix"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),
)
#: Name, bytes before the object's end, bytes there.
_AT_TAIL: Final = (("vhd", 512, b"conectix"), ("dmg", 512, b"koly"))
#: A VMDK's descriptor is a text, in which QEMU looks for this line behind comments and blank lines.
#: Possessive, so that no text makes it look twice.
_VMDK_DESCRIPTOR: Final = re.compile(rb"(?:#[^\n]*+\n| *+\r?\n)*+version=[123]\r?\n")


def foreign_formats(view: ProbeView) -> list[str]:
    """The names of the formats whose signature an object bears, sorted."""
    found = {name for name, at, magic in _AT_HEAD if view.head.startswith(magic, at)}
    size = len(view.tail)
    found |= {
        name
        for name, before, magic in _AT_TAIL
        if size >= before and view.tail.startswith(magic, size - before)
    }
    if _VMDK_DESCRIPTOR.match(view.head):
        found.add("vmdk")
    return sorted(found)
