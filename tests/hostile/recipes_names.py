"""Lies in what an image names: classes 82 to 90.

They are used with a gate that allows files in the image's own folder. See ``test_chains`` for what
becomes of names under other gates.
"""

from __future__ import annotations

from collections.abc import Callable

from .bases import IMAGE
from .editing import Image
from .recipe import REFUSED, Recipe

__all__ = ["NAMES", "RECIPES"]

Damage = Callable[[Image], object]

_CLUSTER = 64 << 10

#: Names that lead out of the image's folder, or nowhere: each with what it is.
NAMES: dict[str, tuple[int, bytes, str]] = {
    "nul": (87, b"base.raw\0.txt", "a NUL byte"),
    "control": (87, b"\x1b[2Jbase.raw", "control characters"),
    "not-utf-8": (87, b"\xff\xfebase.raw", "what is no UTF-8"),
    "parent": (87, b"../base.raw", "a step out of the folder"),
    "absolute": (89, b"/etc/passwd", "a file of the host"),
    "device": (89, b"/dev/zero", "a device of the host"),
    "json": (
        89,
        b'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
        "a block device in JSON",
    ),
    "nbd": (89, b"nbd://127.0.0.1:1/disk", "a server of disks"),
    "nbd-unix": (89, b"nbd+unix:///disk?socket=/run/x", "a server of disks on this host"),
    "http": (89, b"http://127.0.0.1:1/disk", "a web server"),
    "file-url": (89, b"file:///etc/passwd", "a URL of a file"),
    "fat": (89, b"fat:rw:/etc", "a folder of the host"),
}


def _backing(offset: int, length: int) -> Damage:
    return lambda image: image.put(8, "QI", offset, length)


def _recipe(number: int, name: str, lie: str, damage: Damage, *, base: str = "backing") -> Recipe:
    return Recipe(number=number, name=name, lie=lie, base=base, damage=damage, rule=REFUSED)


RECIPES: list[Recipe] = [
    _recipe(82, "backing-1024", "the backing file's name has 1,024 bytes", _backing(1024, 1024)),
    _recipe(
        83, "backing-2-32", "the backing file's name has 2^32 - 1 bytes", _backing(1024, 2**32 - 1)
    ),
    _recipe(
        84,
        "backing-past-cluster",
        "the backing file's name starts past the first cluster",
        _backing(_CLUSTER + 8, 8),
    ),
    _recipe(
        84,
        "backing-over-cluster",
        "the backing file's name ends past the first cluster",
        _backing(_CLUSTER - 4, 8),
    ),
    _recipe(85, "backing-in-header", "the backing file's name lies in the header", _backing(64, 8)),
    _recipe(
        86,
        "backing-missing",
        "there is no backing file of the name that it says",
        lambda image: image.name_backing(b"none.raw"),
    ),
    *(
        _recipe(
            number,
            f"backing-{name}",
            f"the backing file's name is, or holds, {what}",
            lambda image, stored=stored: image.name_backing(stored),  # type: ignore[misc]
        )
        for name, (number, stored, what) in NAMES.items()
    ),
    _recipe(
        88,
        "backing-itself",
        "it is its own backing file",
        lambda image: image.name_backing(IMAGE.encode(), b"qcow2"),
    ),
    _recipe(
        90,
        "backing-format-unknown",
        "the backing file's format is unknown",
        lambda image: image.name_backing(b"base.raw", b"qcow9"),
    ),
    _recipe(
        90,
        "backing-format-absent",
        "the backing file's format is not said",
        lambda image: image.name_backing(b"base.raw", None),
    ),
]
