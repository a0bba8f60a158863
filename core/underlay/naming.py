"""Names of the objects of a chain as a person would follow them, from the name that was given.

A storage knows itself by a name that leads to it from anywhere. What ``info`` and ``map`` print is
the stored name seen from the name of the image that stores it: for ``images/top.qcow2``, which
stores ``../base.qcow2``, that is ``images/../base.qcow2``.
"""

from __future__ import annotations

import os

__all__ = ["full_name", "shown_name"]


def full_name(image: str, stored: str) -> str:
    """Where a name that is stored in an image leads, as text; nothing is looked up.

    An absolute name, and one that looks like a URL, stays as it is.
    """
    if stored.startswith("/") or ":" in stored.partition("/")[0]:
        return stored
    folder, slash, _ = image.rpartition("/")
    if slash:
        return f"{folder}/{stored}"
    scheme, colon, _ = image.rpartition(":")
    return f"{scheme}:{stored}" if colon else stored


def shown_name(image: str, stored: str | None, actual: str) -> str:
    """What to call an object: its stored name if that is what was opened, else its own name."""
    if stored is None:
        return actual
    name = full_name(image, stored)
    return name if os.path.abspath(name) == os.path.abspath(actual) else actual
