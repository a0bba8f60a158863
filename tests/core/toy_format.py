"""A small format with everything that a writable driver can have, for tests of the core.

Clusters, tickets, leases, a backing image, a data file that is only named, compressed clusters. It
is written for being read: the whole table is kept in memory, and a flush writes all of it.

Layout, big-endian: a header, at byte 4096 a table with one entry for each of ``_ENTRIES``
clusters, then clusters. An entry is 0 (look in the backing image), ``_ZERO``, or a host offset; for
a compressed cluster ``_PACKED`` is set and its length stands from bit 48 on.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar, Self, cast

from underlay import plugins
from underlay.driver import (
    FormatCreateOptions,
    FormatDriverInstance,
    FormatOpenOptions,
    Location,
    OptionSpec,
    WriteTicket,
)
from underlay.errors import CorruptImageError, InvalidImageError, OptionError, ReadOnlyError
from underlay.gate import Reference, ReferenceKind
from underlay.handle import StorageHandle
from underlay.lease import Leases
from underlay.locks import RangeLocks
from underlay.mapping import Backing, Data, Eof, ShallowMapping, Special, Zero
from underlay.probing import Match, NoMatch, ProbeVerdict, ProbeView
from underlay.reading import Reader
from underlay.steps import StepsCallback
from underlay.storage import PreallocateMode

CLUSTER = 4096
_MAGIC = b"\x93TOY\r\n\x1a\n"
_VERSION = 1
_HEADER = struct.Struct(">8sIQHHH")
_ENTRIES = 512
_TABLE_AT = CLUSTER
_TABLE = struct.Struct(f">{_ENTRIES}Q")
_FIRST = _TABLE_AT + _TABLE.size
_ZERO = 1
_PACKED = 2
_OFFSET = (1 << 48) - 4


def pack(
    content: bytes,
    *,
    backing: str | None = None,
    backing_format: str | None = "toy",
    data_file: str | None = None,
    compressed: bool = False,
    size: int | None = None,
) -> bytes:
    """An image of ``content``; over a backing image its zero clusters are left to that one."""
    entries, clusters, at = [0] * _ENTRIES, bytearray(), _FIRST
    for number in range(-(-len(content) // CLUSTER)):
        cluster = content[number * CLUSTER : (number + 1) * CLUSTER].ljust(CLUSTER, b"\0")
        if cluster == bytes(CLUSTER):
            entries[number] = 0 if backing is not None else _ZERO
            continue
        stored, flag = cluster, 0
        if compressed and number % 2:
            packed = zlib.compress(cluster)
            if len(packed) < CLUSTER:
                stored, flag = packed.ljust(CLUSTER, b"\0"), len(packed) << 48 | _PACKED
        entries[number] = at | flag
        clusters += stored
        at += CLUSTER
    head = _header(
        len(content) if size is None else size, backing or "", backing_format or "", data_file or ""
    )
    return head + _TABLE.pack(*entries) + bytes(clusters)


def _header(size: int, backing: str, backing_format: str, data_file: str) -> bytes:
    names = [name.encode(errors="surrogateescape") for name in (backing, backing_format, data_file)]
    header = _HEADER.pack(_MAGIC, _VERSION, size, *map(len, names))
    return (header + b"".join(names)).ljust(CLUSTER, b"\0")


class Toy(FormatDriverInstance):
    """One open toy image."""

    format_name: ClassVar[str] = "toy"
    open_options: ClassVar[Mapping[str, OptionSpec]] = {"nothing": OptionSpec("Does nothing")}
    create_options: ClassVar[Mapping[str, OptionSpec]] = {
        "backing_file": OptionSpec("Name of the backing image"),
        "flavour": OptionSpec("Sweet or sour", default="sweet"),
    }

    def __init__(
        self, storage: StorageHandle, *, size: int, entries: list[int], references: list[Reference]
    ) -> None:
        self._storage = storage
        self._size = size
        self._entries = entries
        self._references = references
        self._backing: FormatDriverInstance | None = None
        self._data_file: StorageHandle | None = None
        self._writable = False
        self._leases: Leases | None = None
        self._locks = RangeLocks()
        self._dirty = False
        self._free: list[int] = []
        #: Let go of, but the table on the disk still shows them: to be reused after a flush only.
        self._freed: list[int] = []
        self._end = max([_FIRST, *((e & _OFFSET) + CLUSTER for e in entries if e & _OFFSET)])

    # -- coming to be

    @classmethod
    def probe(cls, view: ProbeView) -> ProbeVerdict:
        if len(view.head) < _HEADER.size or not view.head.startswith(_MAGIC):
            return NoMatch()
        _, version, *_ = _HEADER.unpack_from(view.head)
        return Match(f"magic {_MAGIC!r}") if version == _VERSION else NoMatch()

    @classmethod
    async def open(cls, options: FormatOpenOptions) -> Self:
        storage = options.storage
        head = await storage.read_bytes(0, CLUSTER)
        magic, version, size, *lengths = _HEADER.unpack_from(head)
        if magic != _MAGIC or version != _VERSION:
            raise InvalidImageError(f"{storage.name()}: no toy image")
        if sum(lengths) > CLUSTER - _HEADER.size:
            raise CorruptImageError(f"{storage.name()}: its names are too long", field="names")
        options.limits.check("virtual_size", size, what=f"{storage.name()}: the virtual size")
        if size > _ENTRIES * CLUSTER:
            raise CorruptImageError(f"{storage.name()}: its size is {size}", field="size")
        names: list[str] = []
        at = _HEADER.size
        for length in lengths:
            names.append(bytes(head[at : at + length]).decode(errors="surrogateescape"))
            at += length
        entries = list(_TABLE.unpack(await storage.read_bytes(_TABLE_AT, _TABLE.size)))
        last = storage.size() - CLUSTER
        for entry in entries:
            if entry not in (0, _ZERO) and not _FIRST <= entry & _OFFSET <= last:
                raise CorruptImageError(f"{storage.name()}: an entry is {entry:#x}", value=entry)
        self = cls(
            storage,
            size=size,
            entries=entries,
            references=_references(*names, writable=options.writable),
        )
        if options.writable:
            self._writable = True
            self._leases = Leases()
        return self

    @classmethod
    def check_create(cls, options: FormatCreateOptions) -> None:
        if options.options.get("flavour", "sweet") not in ("sweet", "sour"):
            raise OptionError("a flavour is sweet or sour", option="flavour")

    @classmethod
    async def create(cls, options: FormatCreateOptions) -> None:
        assert options.storage is not None
        if options.options.get("flavour") == "sour":
            await options.storage.write(b"half an image", 0)
            raise InvalidImageError("sour images fail half-way, for tests")
        backing = str(options.options.get("backing_file", ""))
        image = pack(b"", backing=backing, size=options.size)
        await options.storage.write(image, 0)

    def references(self) -> Sequence[Reference]:
        return self._references

    def attach(
        self, reference: Reference, opened: StorageHandle | FormatDriverInstance | None
    ) -> None:
        if reference.kind is ReferenceKind.BACKING:
            assert not isinstance(opened, StorageHandle)
            self._backing = opened
        else:
            assert opened is None or isinstance(opened, StorageHandle)
            self._data_file = opened
        self._references = [mine for mine in self._references if mine.kind is not reference.kind]

    # -- facts

    def size(self) -> int:
        return self._size

    def writable(self) -> bool:
        return self._writable

    def zero_granularity(self) -> int:
        return CLUSTER

    def collect_storage_dependencies(self) -> Sequence[StorageHandle]:
        return (self._storage,) if self._data_file is None else (self._storage, self._data_file)

    def backing(self) -> FormatDriverInstance | None:
        return self._backing

    def leases(self) -> Leases | None:
        return self._leases

    # -- mapping

    def locate(self, offset: int) -> Location | None:
        left = self._size - offset
        if offset < 0 or left <= 0:
            return None
        number, skip = divmod(offset, CLUSTER)
        entry = self._entries[number]
        if entry in (0, _ZERO) or entry & _PACKED:
            return None
        return self._storage, entry + skip, min(CLUSTER - skip, left), self._writable

    async def get_mapping(self, offset: int, max_length: int) -> ShallowMapping:
        left = self._size - offset
        if left <= 0:
            return Eof()
        number, skip = divmod(offset, CLUSTER)
        length = min(CLUSTER - skip, left)
        entry = self._entries[number]
        if entry == _ZERO:
            return Zero(length, explicit=True)
        if entry == 0:
            if self._backing is None:
                return Zero(length, explicit=False)
            return Backing(self._backing, offset, length)
        if entry & _PACKED:
            return Special(
                self, self._storage, entry & _OFFSET, entry >> 48, length, skip, unit=CLUSTER
            )
        return Data(self._storage, entry + skip, length, self._writable)

    def decode(self, host_length: int, raw: memoryview, out: memoryview) -> None:
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(raw[:host_length], len(out) + 1)
        except zlib.error as error:
            raise CorruptImageError(f"a compressed cluster is damaged: {error}") from error
        if len(data) != len(out):
            raise CorruptImageError(f"a compressed cluster has {len(data)} bytes")
        out[:] = data

    # -- writing

    async def begin_write(self, offset: int, length: int) -> WriteTicket:
        self._need_writable()
        number, skip = divmod(offset, CLUSTER)
        release = await self._acquire(number)
        taken = min(length, CLUSTER - skip)
        location = self.locate(offset)
        if location is not None:  # somebody made room while this one waited
            return self._ticket(offset, location[1], taken, token=(release, None))
        host = self._allocate()
        after = CLUSTER - skip - taken
        return self._ticket(offset, host + skip, taken, (release, host), before=skip, after=after)

    def _ticket(
        self,
        offset: int,
        host: int,
        length: int,
        token: object,
        *,
        before: int = 0,
        after: int = 0,
    ) -> WriteTicket:
        return WriteTicket(
            driver=self,
            storage=self._storage,
            guest_offset=offset,
            offset=host,
            length=length,
            before=before,
            after=after,
            token=token,
        )

    async def commit_write(self, ticket: WriteTicket) -> None:
        release, host = _token(ticket)
        if host is not None:
            self._show(ticket.guest_offset // CLUSTER, host)
        release()

    async def abort_write(self, ticket: WriteTicket) -> None:
        release, host = _token(ticket)
        if host is not None:
            self._free.append(host)
        release()

    async def ensure_data_mapping(
        self, offset: int, length: int, overwrite: bool
    ) -> tuple[StorageHandle, int, int]:
        self._need_writable()
        number, skip = divmod(offset, CLUSTER)
        async with self._hold(number, number + 1):
            host = await self._materialise(number)
        return self._storage, host + skip, min(length, CLUSTER - skip)

    async def ensure_zero_mapping(self, offset: int, length: int) -> tuple[int, int]:
        return await self._mark(offset, length, _ZERO, only_unallocated=True)

    async def discard_to_zero(self, offset: int, length: int) -> tuple[int, int]:
        return await self._mark(offset, length, _ZERO)

    async def discard_to_any(self, offset: int, length: int) -> tuple[int, int]:
        return await self._mark(offset, length, _ZERO)

    async def discard_to_backing(self, offset: int, length: int) -> tuple[int, int]:
        return await self._mark(offset, length, 0)

    async def _mark(
        self, offset: int, length: int, entry: int, *, only_unallocated: bool = False
    ) -> tuple[int, int]:
        """Set the entries of the whole clusters of a range, or of as many as come first."""
        self._need_writable()
        first = -(-offset // CLUSTER)
        last = (offset + length) // CLUSTER
        if offset + length == self._size:
            last = -(-self._size // CLUSTER)
        if first >= last:
            return offset, 0
        async with self._hold(first, last):
            done = first
            while done < last and not (only_unallocated and self._entries[done] & _OFFSET):
                self._show(done, entry)
                done += 1
        start = first * CLUSTER
        return start, min(done * CLUSTER, offset + length) - start if done > first else 0

    async def resize_grow(
        self, size: int, preallocation: PreallocateMode, progress: StepsCallback | None = None
    ) -> None:
        if size > _ENTRIES * CLUSTER:
            raise OptionError(f"a toy disk has at most {_ENTRIES * CLUSTER} bytes", option="size")
        old = self._size
        async with self._hold(0, _ENTRIES):
            # The cluster that the old end lies in must hide what a longer backing image has there.
            if old % CLUSTER and self._entries[old // CLUSTER] == 0 and self._backing is not None:
                await self._materialise(old // CLUSTER)
            for number in range(-(-old // CLUSTER), -(-size // CLUSTER)):
                self._show(number, _ZERO)
            self._size = size
            self._dirty = True

    async def resize_shrink(self, size: int, progress: StepsCallback | None = None) -> None:
        async with self._hold(0, _ENTRIES):
            number, keep = divmod(size, CLUSTER)
            if keep and self._entries[number] & _OFFSET:
                host = await self._materialise(number)
                await self._storage.write(bytes(CLUSTER - keep), host + keep)
            self._size = size
            self._dirty = True
            for cut in range(-(-size // CLUSTER), _ENTRIES):
                self._show(cut, 0)

    # -- buffers

    async def flush(self) -> None:
        if not self._dirty:
            return
        self._dirty = False
        freed, self._freed = self._freed, []
        try:
            await self._storage.sync()  # data before the entries that show them
            await self._storage.write(_TABLE.pack(*self._entries), _TABLE_AT)
            await self._storage.write(struct.pack(">Q", self._size), 12)
            await self._storage.sync()
        except BaseException:
            self._dirty = True
            self._freed += freed
            raise
        self._free += freed

    async def invalidate_cache(self) -> None:
        self._entries = list(_TABLE.unpack(await self._storage.read_bytes(_TABLE_AT, _TABLE.size)))

    # -- helpers

    def _need_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyError(f"{self._storage.name()} is open read-only")

    async def _acquire(self, number: int) -> Callable[[], None]:
        """Lock a cluster; call what this returns to let go of it."""
        holder = await self._locks.acquire(number, number + 1, exclusive=True)
        return lambda: self._locks.release(holder)

    def _hold(self, first: int, last: int) -> AbstractAsyncContextManager[None]:
        return self._locks.hold(first, last, exclusive=True)

    def _allocate(self) -> int:
        if self._free:
            return self._free.pop()
        self._end += CLUSTER
        return self._end - CLUSTER

    def _show(self, number: int, entry: int) -> None:
        """Set an entry, and let go of the cluster that the old one led to."""
        old, self._entries[number] = self._entries[number], entry
        self._dirty = True
        if old & _OFFSET:
            assert self._leases is not None
            self._leases.defer(lambda: self._freed.append(old & _OFFSET))

    async def _materialise(self, number: int) -> int:
        """Give a cluster plain data of its own, with the content that it has."""
        entry = self._entries[number]
        if entry & _OFFSET and not entry & _PACKED:
            return entry
        content = memoryview(bytearray(CLUSTER))
        await Reader(self).readv([content], number * CLUSTER)
        host = self._allocate()
        await self._storage.write(content, host)
        self._show(number, host)
        return host


def _token(ticket: WriteTicket) -> tuple[Callable[[], None], int | None]:
    """What unlocks a ticket's cluster, and where its room is, if room was made."""
    return cast("tuple[Callable[[], None], int | None]", ticket.token)


def _references(
    backing: str, backing_format: str, data_file: str, *, writable: bool
) -> list[Reference]:
    found: list[Reference] = []
    if backing:
        found.append(
            Reference(kind=ReferenceKind.BACKING, name=backing, format=backing_format or None)
        )
    if data_file:
        found.append(Reference(kind=ReferenceKind.DATA_FILE, name=data_file, writable=writable))
    return found


def underlay_format_drivers() -> Iterable[type[FormatDriverInstance]]:
    return (Toy,)


def register() -> plugins.Registry:
    """The plug-ins that are installed, and this one."""
    real = plugins.registry()
    record = plugins.PluginRecord(
        name="toy", value="toy_format", distribution="toys", version="1", formats=("toy",)
    )
    return plugins.Registry(
        records=(*real.records, record),
        formats={**real._formats, "toy": [plugins._Claim(Toy, record)]},
        schemes=real._schemes,
    )
