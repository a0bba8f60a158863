"""The images on which workloads run: as small as can be, so that tables grow in few operations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

import underlay
from underlay import SyncFormatAccess
from underlay.storage import (
    BlockingStorage,
    PreallocateMode,
    StorageCreateOptions,
    StorageOpenOptions,
)
from underlay_storage.memory import MemoryStorage

from .bitmaps import Kept, with_bitmap
from .guest import (
    Amend,
    Apply,
    ChangeBitmap,
    Compress,
    CopyBitmaps,
    Delete,
    Discard,
    Grow,
    History,
    Moment,
    Operation,
    Push,
    Reread,
    Shrink,
    Take,
    WriteData,
    WriteZeroes,
    pattern,
)
from .judging import content_of

__all__ = ["SHAPES", "Prepared", "Shape"]

_names = itertools.count()


@attrs.frozen(kw_only=True)
class Shape:
    """How an image is made."""

    name: str
    cluster: int = 512
    #: Virtual bytes.
    size: int = 48 << 10
    options: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    has_data_file: bool = False
    #: Bytes of the backing image; 0 without one.
    backing: int = 0
    #: Whether it can have internal snapshots.
    snapshots: bool = True
    compression: bool = True
    #: Whether it has a bitmap that is up to date.
    bitmap: bool = False
    #: Guest bytes that are written beforehand, beside a few clusters.
    filled: int = 0
    #: For the driver, when the image is opened for writing.
    open_options: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    #: What is tried besides.
    further: tuple[Operation, ...] = ()
    #: Of how many states one is judged.
    thinned: int = 1

    @property
    def l2_covers(self) -> int:
        """Guest bytes of one L2 table."""
        return self.cluster // (16 if self.options.get("extended_l2") else 8) * self.cluster

    def operations(self) -> list[Operation]:
        """What is tried alone and in pairs."""
        cluster = self.cluster
        border = self.l2_covers if self.l2_covers < self.size else 12 * cluster
        some: list[Operation] = [
            # Inside a cluster that is new, and in one that is there.
            WriteData(9 * cluster + 100, 300),
            WriteData(cluster + cluster // 2 - 10, 20),
            WriteData(10 * cluster, cluster),
            WriteData(border - cluster // 2, 2 * cluster),
            WriteZeroes(2 * cluster - cluster // 2, 2 * cluster),
            Discard(cluster, 4 * cluster),
            Push(),
            Grow(self.size // 2),
            Shrink(self.size - 3 * cluster),
        ]
        if self.compression:
            some += [Compress(11 * cluster, cluster), Compress(2 * cluster, cluster)]
        if self.snapshots:
            some += [Take("new"), Apply("old"), Delete("old")]
        if self.bitmap:
            some += [
                ChangeBitmap("add", "new"),
                ChangeBitmap("clear", "dirty"),
                ChangeBitmap("disable", "dirty"),
                ChangeBitmap("merge", "new", "dirty"),
                ChangeBitmap("remove", "dirty"),
                CopyBitmaps(("copied", "copied too"), (3, 4, 50)),
            ]
        return [*some, *self.further]

    def prepared(self) -> Prepared:
        """An image with some content, and with a snapshot where it can have one."""
        cluster = self.cluster
        below = pattern(0xBAC0, 0, self.backing)
        history = History([Moment(below[: self.size].ljust(self.size, b"\0"))])
        filled = max(6 * cluster, self.filled)
        before: list[Operation] = [WriteData(0, filled), WriteZeroes(0, cluster)]
        if self.compression:
            before.append(Compress(4 * cluster, cluster))
        if self.snapshots:
            before += [Take("old"), WriteData(2 * cluster, cluster)]
        folder = f"memory:crash-{next(_names)}"
        names = [f"{folder}/disk.qcow2"]
        options = dict(self.options)
        if self.has_data_file:
            options["data_file"] = "data.raw"
            names.append(f"{folder}/data.raw")
        if self.backing:
            options |= {"backing_file": "base.raw", "backing_fmt": "raw"}
            make_memory(f"{folder}/base.raw", below)
        # An open storage: names are resolved beside it.
        target = MemoryStorage.create_open(StorageCreateOptions(name=names[0], lock=False))
        with underlay.create(
            target,
            size=self.size,
            cluster_size=self.cluster,
            gate=underlay.PermissiveImplicitOpenGate(),
            **options,
        ) as disk:
            for operation in before:
                operation.run(disk, history.add(operation))
        contents = tuple(map(memory_content, names))
        if self.bitmap:
            contents = (with_bitmap(contents[0]), *contents[1:])
            now = history.now
            kept = {"dirty": Kept(frozenset({0}), now.content)}
            history.moments[-1] = attrs.evolve(now, bitmaps=kept)
        for name in names:
            MemoryStorage.remove(name)
        if self.backing:
            MemoryStorage.remove(f"{folder}/base.raw")
        backing = None
        if self.backing:
            backing = underlay.open_image(MemoryStorage(below, writable=False), format="raw")
        return Prepared(
            shape=self,
            contents=contents,
            history=history,
            below=below,
            backing=backing,
        )


@attrs.frozen(kw_only=True)
class Prepared:
    """An image to start from."""

    shape: Shape
    #: Of its files.
    contents: tuple[bytes, ...]
    #: How it came to be.
    history: History
    #: What the backing image holds, and its disk.
    below: bytes
    backing: SyncFormatAccess | None

    def again(self) -> History:
        """A history that can be continued."""
        moments = list(self.history.moments)
        return History(moments, start=len(moments) - 1)

    def open(
        self, storages: Sequence[BlockingStorage], snapshot: str | None = None, *, writable: bool
    ) -> SyncFormatAccess:
        """Open the image in these storages."""
        return underlay.open_image(
            storages[0],
            format="qcow2",
            writable=writable,
            backing=self.backing,
            data_file=storages[1] if self.shape.has_data_file else None,
            snapshot=snapshot,
            **(self.shape.open_options if writable else {}),
        )

    def close(self) -> None:
        """Close the backing image, which serves all that is opened."""
        if self.backing is not None:
            self.backing.close()


def make_memory(name: str, content: bytes) -> None:
    """Make an object in memory, under a name."""
    storage = MemoryStorage.create_open(StorageCreateOptions(name=name, lock=False))
    storage.writev((content,), 0)
    storage.close()


def memory_content(name: str) -> bytes:
    """What an object in memory holds."""
    storage = MemoryStorage.open(StorageOpenOptions(name=name, lock=False))
    content = content_of(storage)
    storage.close()
    return content


SHAPES = (
    Shape(name="v3", further=(Grow(2 << 20), Grow(24 << 10, PreallocateMode.METADATA))),
    Shape(name="v2", options={"compat": "v2"}, further=(Amend("compat", "v3"),)),
    Shape(name="refcount-1", options={"refcount_bits": 1}, snapshots=False, compression=False),
    Shape(
        name="refcount-2",
        options={"refcount_bits": 2},
        compression=False,
        open_options={"cache_size": 2048, "refcount_cache_size": 2048},
    ),
    Shape(name="refcount-4", options={"refcount_bits": 4, "lazy_refcounts": True}),
    Shape(name="refcount-64", options={"refcount_bits": 64}, further=(Amend("refcount_bits", 4),)),
    Shape(name="bitmap", bitmap=True),
    Shape(
        name="backing",
        options={"refcount_bits": 32},
        backing=80 << 10,
        further=(Amend("lazy_refcounts", True),),  # noqa: FBT003 (what the option takes)
    ),
    Shape(
        name="data-file",
        options={"refcount_bits": 8},
        has_data_file=True,
        snapshots=False,
        compression=False,
        further=(Grow(24 << 10, PreallocateMode.FULL),),
    ),
    Shape(
        name="raw-data-file",
        options={"data_file_raw": True},
        has_data_file=True,
        snapshots=False,
        compression=False,
    ),
    Shape(
        name="subclusters",
        cluster=16 << 10,
        size=512 << 10,
        options={"extended_l2": True, "refcount_bits": 8},
    ),
    Shape(
        name="subclusters-backing",
        cluster=16 << 10,
        size=512 << 10,
        options={"extended_l2": True},
        backing=600 << 10,
    ),
    # Its refcount table has no room for what comes next.
    Shape(
        name="table-growth",
        options={"refcount_bits": 64},
        size=2100 << 10,
        filled=3790 * 512,
        further=(WriteData(3790 * 512, 150 * 512), Reread()),
        thinned=20,
    ),
    Shape(name="zstd", cluster=4096, size=2112 << 10, options={"compression_type": "zstd"}),
)
