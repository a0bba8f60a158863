"""Lies about compressed clusters: classes 117 to 124."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from underlay_drivers.qcow2 import layout

from .bases import text
from .editing import Image
from .recipe import HARMLESS, Reading, Recipe, Rule, Writing

__all__ = ["RECIPES"]

_CLUSTER = 64 << 10
#: The guest cluster of the bases "zlib" and "zstd" that is damaged, and its bytes.
_VICTIM = 3
_RANGE = (_VICTIM * _CLUSTER, (_VICTIM + 1) * _CLUSTER)
#: With clusters of 64 KiB: the width of the offset in an entry; above it are the sectors.
_SHIFT = 54


def _stream(content: bytes) -> Callable[[Image], object]:
    """Let the victim's data be these bytes, in clusters of its own at the end of the file."""

    def damage(image: Image) -> None:
        offset = image.add_cluster(content)
        for cluster in range(offset, len(image.data), image.cluster):
            image.put(image.count(cluster), "H", 1)
        sectors = (len(content) - 1) // layout.SECTOR
        image.put(image.l2(_VICTIM), "Q", layout.COMPRESSED | sectors << _SHIFT | offset)

    return damage


def _entry(change: Callable[[int], int], cluster: int = _VICTIM) -> Callable[[Image], object]:
    return lambda image: image.put(image.l2(cluster), "Q", change(image.word(image.l2(cluster))))


def _recipe(
    number: int,
    name: str,
    lie: str,
    damage: Callable[[Image], object],
    *,
    base: str = "zlib",
    rule: Rule | None = None,
) -> Recipe:
    failing = Rule(reading=Reading.FAILS, damaged=_RANGE, writing=Writing.REFUSED)
    return Recipe(number=number, name=name, lie=lie, base=base, damage=damage, rule=rule or failing)


def _deflated(content: bytes) -> bytes:
    """As the specification wants it: no header, and a window of 4 KiB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(content) + packer.flush()


def _zstd_frame(declared: int) -> bytes:
    """A whole frame that holds one cluster of zeroes, and says that it holds so many bytes."""
    # The magic; an 8-byte size, and a window; a window of 64 KiB; one block, the last, of one byte
    # that repeats.
    block = _CLUSTER << 3 | 1 << 1 | 1
    return (
        b"\x28\xb5\x2f\xfd\xc0\x30"
        + declared.to_bytes(8, "little")
        + block.to_bytes(3, "little")
        + b"\0"
    )


def _zstd_bomb() -> bytes:
    """A frame of 60 MiB of zeroes in blocks of 64 KiB, which says nothing of its size."""
    block = _CLUSTER << 3 | 1 << 1
    blocks = 960
    return b"\x28\xb5\x2f\xfd\x00\x30" + b"".join(
        (block | (number == blocks - 1)).to_bytes(3, "little") + b"\0" for number in range(blocks)
    )


#: Whatever comes out of it, no more than a cluster does.
_CAPPED = Rule(reading=Reading.ANY, damaged=_RANGE, writing=Writing.EITHER)

RECIPES = [
    _recipe(
        117,
        "compressed-past-the-end",
        "compressed data lies past the end of the file",
        _entry(lambda _: layout.COMPRESSED | 1 << 40),
    ),
    _recipe(
        117,
        "compressed-in-the-header",
        "compressed data lies in the header",
        _entry(lambda _: layout.COMPRESSED | 512),
    ),
    _recipe(
        117,
        "compressed-beyond-2-56",
        "compressed data lies at the last offset that there is",
        _entry(lambda _: layout.COMPRESSED | (1 << _SHIFT) - 1),
    ),
    _recipe(
        118,
        "compressed-longer-than-the-file",
        "compressed data is said to go on past the end of the file",
        _entry(lambda entry: entry + (8 << _SHIFT), cluster=32),
        rule=HARMLESS,
    ),
    _recipe(
        118,
        "compressed-into-the-next-cluster",
        "compressed data is said to go on in a cluster past the end of the file",
        _entry(lambda entry: entry | 255 << _SHIFT, cluster=32),
        rule=Rule(writing=Writing.EITHER),
    ),
    _recipe(119, "garbage-deflate", "compressed data is garbage", _stream(b"\xff" * 20_000)),
    _recipe(
        119,
        "garbage-zstd",
        "compressed data is garbage, with zstd",
        _stream(b"\xff" * 20_000),
        base="zstd",
    ),
    _recipe(
        120,
        "deflate-bomb",
        "compressed data inflates to 60 MiB",
        _stream(_deflated(bytes(60 << 20))),
        rule=_CAPPED,
    ),
    _recipe(
        120,
        "zstd-bomb",
        "compressed data inflates to 60 MiB, with zstd",
        _stream(_zstd_bomb()),
        base="zstd",
        rule=_CAPPED,
    ),
    _recipe(
        121,
        "deflate-short",
        "compressed data inflates to less than a cluster",
        _stream(_deflated(text(0, _CLUSTER - 1))),
    ),
    _recipe(121, "deflate-empty", "compressed data inflates to nothing", _stream(_deflated(b""))),
    _recipe(
        122,
        "zlib-header",
        "compressed data has the header of zlib",
        _stream(zlib.compress(text(0, _CLUSTER))),
    ),
    _recipe(
        123,
        "zstd-declares-2-40",
        "a zstd frame declares 2^40 bytes",
        _stream(_zstd_frame(1 << 40)),
        base="zstd",
    ),
    _recipe(
        124,
        "compressed-copied",
        "COPIED is set on a compressed cluster",
        _entry(lambda entry: entry | layout.COPIED),
        rule=HARMLESS,
    ),
]
