"""Jobs that move what an overlay has, or what it lies upon: on small images in memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import attrs

import underlay
from underlay.jobs import commit, rebase
from underlay.storage import BlockingStorage, StorageCreateOptions
from underlay_storage.memory import MemoryStorage

from .judging import content_of
from .shapes import Shape, make_memory, memory_content

__all__ = ["Move", "committing", "rebasing"]

_GATE = underlay.PermissiveImplicitOpenGate()
_names = itertools.count()


@attrs.frozen(kw_only=True)
class Move:
    """One run of such a job."""

    #: Of the files that it may change, the overlay first.
    contents: tuple[bytes, ...]
    #: Those of them that are qcow2 images, by their numbers.
    images: tuple[int, ...]
    #: What the overlay shows, at any time.
    want: bytes
    #: Does it to these storages.
    run: Callable[[Sequence[BlockingStorage]], None]
    #: What the overlay shows with these files.
    show: Callable[[Sequence[bytes]], bytes]


def committing(shape: Shape, base: str = "qcow2") -> Move:
    """Commit an image of a shape that has a backing image, which is here of the format ``base``."""
    prepared = shape.prepared()
    below = MemoryStorage(b"")
    options: dict[str, Any] = {"cluster_size": 4096} if base == "qcow2" else {}
    with underlay.create(below, format=base, size=shape.backing, **options) as disk:
        disk.write(prepared.below, 0)

    def opened(
        storages: Sequence[BlockingStorage], lower: underlay.SyncFormatAccess, *, writable: bool
    ) -> underlay.SyncFormatAccess:
        return underlay.open_image(
            storages[0],
            format="qcow2",
            backing=lower,
            data_file=storages[2] if shape.has_data_file else None,
            writable=writable,
        )

    def run(storages: Sequence[BlockingStorage]) -> None:
        with (
            underlay.open_image(storages[1], format=base, writable=True) as lower,
            opened(storages, lower, writable=True) as disk,
        ):
            commit(disk, parallel=1)

    def show(contents: Sequence[bytes]) -> bytes:
        storages = [MemoryStorage(content, writable=False) for content in contents]
        with (
            underlay.open_image(storages[1], format=base) as lower,
            opened(storages, lower, writable=False) as disk,
        ):
            return disk.read_bytes(0, disk.size)

    prepared.close()
    return Move(
        contents=(prepared.contents[0], content_of(below), *prepared.contents[1:]),
        images=(0, 1) if base == "qcow2" else (0,),
        want=prepared.history.now.content,
        run=run,
        show=show,
    )


def rebasing(cluster: int, size: int = 320 << 10) -> Move:
    """Rebase an overlay to an image that has little in common with the old one."""
    chance = random.Random(cluster)
    old, new = chance.randbytes(size * 3 // 4), bytearray(chance.randbytes(size))
    new[: size // 32] = old[: size // 32]
    names = [f"memory:move-{next(_names)}" for _ in range(3)]
    make_memory(names[0], old)
    make_memory(names[1], bytes(new))
    target = MemoryStorage.create_open(StorageCreateOptions(name=names[2], lock=False))
    options: dict[str, Any] = {
        "backing_file": names[0],
        "backing_fmt": "raw",
        "cluster_size": cluster,
    }
    with underlay.create(target, size=size, gate=_GATE, **options) as disk:
        disk.write(chance.randbytes(size // 50), size // 11)
        disk.write_zeroes(size // 3, size // 40)
    top = memory_content(names[2])
    MemoryStorage.remove(names[2])

    def run(storages: Sequence[BlockingStorage]) -> None:
        rebase(storages[0], names[1], backing_format="raw", gate=_GATE, parallel=1)

    def show(contents: Sequence[bytes]) -> bytes:
        storage = MemoryStorage(contents[0], writable=False)
        with underlay.open_image(storage, format="qcow2", gate=_GATE) as disk:
            return disk.read_bytes(0, disk.size)

    return Move(contents=(top,), images=(0,), want=show((top,)), run=run, show=show)
