"""The runs of large ranges: whole L2 tables at a time, with numpy.

Tables that are cached are used as they are; others are read past the cache, several at once where
they follow each other in the file: a walk over everything would only push out what is in use.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from underlay.errors import CorruptImageError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.tables import (
    COMPRESSED,
    DATA,
    MIXED,
    NOWHERE,
    UNALLOCATED,
    ZERO,
    Geometry,
    Run,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from underlay_drivers.qcow2.mappings import ClusterMap
    from underlay_drivers.qcow2.validation import Region

__all__ = ["Classifier", "Words", "table_runs"]

#: The words of L2 tables in the machine's order.
Words: TypeAlias = "NDArray[np.uint64]"

#: Beyond the kinds of ``tables``: an entry that is at fault.
BAD: Final = 255
#: Bytes of L2 tables read at once.
_BATCH: Final = 4 << 20


async def table_runs(disk: ClusterMap, offset: int, end: int) -> AsyncIterator[Iterable[Run]]:
    """The runs of guest bytes ``offset`` to ``end``, in order, those of one L2 table at a time.

    Raises:
        CorruptImageError: at the first guest byte whose tables make no sense.
    """
    geometry = disk.geometry
    shift = geometry.l1_shift
    batch = max(1, _BATCH // geometry.cluster_size)
    classifier = Classifier(geometry, file_end=disk.file_end, regions=disk.regions)
    last = (end - 1) >> shift
    present = _present(disk, offset >> shift, last)
    position = 0
    while offset < end:
        number = offset >> shift
        following = present[position] if position < len(present) else last + 1
        if number < following:
            until = min(end, following << shift)
            yield ((UNALLOCATED, NOWHERE, until - offset),)
            offset = until
            continue
        tables = await _tables(disk, present[position : position + batch])
        for words in tables:
            until = min(end, (offset >> shift) + 1 << shift)
            runs = classifier.runs(words, offset, until)
            yield _judged(disk, words, offset, until, runs)
            offset = until
        position += len(tables)


def _present(disk: ClusterMap, first: int, last: int) -> list[int]:
    """The L1 entries from ``first`` to ``last`` that lead somewhere."""
    entries = np.frombuffer(disk.l1, dtype=np.uint64)[first : last + 1]
    return [int(number) + first for number in np.flatnonzero(entries)]


async def _tables(disk: ClusterMap, numbers: list[int]) -> list[Words]:
    """The L2 table of the first of these L1 entries, and as many more as one read brings."""
    cached = disk.cached_table(numbers[0])
    if cached is not None:
        words = np.frombuffer(cached, dtype=np.uint64)
        # What may change while it is looked at is copied.
        return [words.copy() if disk.writable() else words]
    size = disk.geometry.cluster_size
    start = disk.l2_offset(numbers[0])
    count = 1
    for expected, number in enumerate(numbers[1:], numbers[0] + 1):
        if number != expected or disk.cached_table(number) is not None:
            break
        try:
            if disk.l2_offset(number) != start + count * size:
                break
        except CorruptImageError:
            break  # found again, and raised, when its turn comes
        count += 1
    data = await disk.image.read_bytes(start, count * size)
    words = np.frombuffer(data, dtype=">u8").astype(np.uint64)
    return [words[at : at + size // 8] for at in range(0, len(words), size // 8)]


def _judged(
    disk: ClusterMap, words: Words, offset: int, until: int, runs: Iterable[Run]
) -> Iterator[Run]:
    """The runs, cut at the end, with those that are at fault looked at more closely."""
    table = None
    for found in runs:
        run = found
        if run[0] == BAD:
            if table is None:
                table = array("Q", words.tobytes())
            run = disk.run(table, offset, 1)
        if run[2] > until - offset:
            run = (run[0], run[1], until - offset)
        yield run
        offset += run[2]


class Classifier:
    """Sorts the entries of whole tables into runs, by the rules of ``Geometry.fault``."""

    __slots__ = ("_file_end", "_geometry", "_regions", "_steps")

    def __init__(self, geometry: Geometry, *, file_end: int, regions: Iterable[Region]) -> None:
        self._geometry = geometry
        self._file_end = file_end
        self._regions = tuple(regions)
        #: How far the clusters of a table are from its first, where they follow each other.
        self._steps = np.arange(geometry.l2_entries, dtype=np.uint64) * geometry.cluster_size

    def runs(self, words: Words, offset: int, until: int) -> Iterator[Run]:
        """The runs of guest bytes ``offset`` to ``until``, which lie in this table.

        The last one may reach further; one of the kind ``BAD`` is a single cluster.
        """
        geometry = self._geometry
        size = geometry.cluster_size
        within = offset & (size - 1)
        first = (offset >> geometry.cluster_bits) % geometry.l2_entries
        count = (until - 1 >> geometry.cluster_bits) - (offset >> geometry.cluster_bits) + 1
        entries = words[first * geometry.words : (first + count) * geometry.words]
        host = self._all_in_a_row(entries)
        if host is not None:
            yield DATA, host + within, count * size - within
            return
        bitmaps = None
        if geometry.extended:
            entries, bitmaps = entries[0::2], entries[1::2]
        kinds, hosts = self._classify(entries, bitmaps, offset - within)
        starts = _run_starts(kinds, hosts, size)
        counts = np.diff(starts, append=count)
        for start, kind, host, length in zip(
            starts.tolist(),
            kinds[starts].tolist(),
            hosts[starts].tolist(),
            counts.tolist(),
            strict=True,
        ):
            if kind == MIXED and bitmaps is not None:
                yield from self._mixed(int(bitmaps[start]), host, within)
            elif kind == COMPRESSED or host == NOWHERE:
                yield kind, host, length * size - within
            else:
                yield kind, host + within, length * size - within
            within = 0

    def _all_in_a_row(self, entries: Words) -> int | None:
        """Where the clusters are, if they are plain data that follow each other on the host.

        So they are in most tables of large images, and one look is much less than ``_classify``.
        """
        geometry = self._geometry
        first, count = int(entries[0]), len(entries)
        host = first & layout.HOST_OFFSET
        if not host or first & geometry.plain_bad or geometry.extended or geometry.external:
            return None
        if not (entries - self._steps[:count] == entries[0]).all():
            return None
        last = host + (count - 1) * geometry.cluster_size
        if last >= min(self._file_end, layout.HOST_OFFSET_LIMIT):
            return None
        for region in self._regions:
            if region.offset <= last and host < region.offset + region.length:
                return None
        return host

    def _mixed(self, bitmap: int, host: int, within: int) -> Iterator[Run]:
        size = self._geometry.subcluster_size
        while within < self._geometry.cluster_size:
            kind, count = self._geometry.subcluster_run(bitmap, within // size)
            length = (within // size + count) * size - within
            yield kind, host if host == NOWHERE else host + within, length
            within += length

    def _classify(
        self, entries: Words, bitmaps: Words | None, guest: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The kind and the host offset of each cluster; ``guest`` is where the first one lies."""
        geometry = self._geometry
        offsets = (entries & layout.HOST_OFFSET).astype(np.int64)
        if not (geometry.extended or geometry.external):
            plain = not (entries & geometry.plain_bad).any() and bool(offsets.all())
            if plain and not self._misplaced(offsets).any():
                return np.full(len(entries), DATA, np.uint8), offsets
        compressed = (entries & layout.COMPRESSED) != 0
        copied = (entries & layout.COPIED) != 0
        allocated = offsets != 0
        bad = (entries & geometry.standard_bad) != 0
        if geometry.external:
            allocated |= copied
            own = np.arange(len(entries), dtype=np.int64) * geometry.cluster_size + guest
            bad |= allocated & (offsets != own)
            bad |= compressed
        else:
            bad |= copied & ~allocated
        hosts = np.where(allocated, offsets, NOWHERE)
        if bitmaps is None:
            kinds = np.where(allocated, DATA, UNALLOCATED).astype(np.uint8)
            zero = (entries & layout.ZERO) != 0
            kinds[zero] = ZERO
            hosts[zero & (offsets == 0)] = NOWHERE
            reads_data = kinds == DATA
        else:
            low = bitmaps & layout.ALL_ALLOCATED
            kinds = np.full(len(entries), MIXED, np.uint8)
            kinds[bitmaps == layout.ALL_ALLOCATED] = DATA
            kinds[bitmaps == 0] = UNALLOCATED
            kinds[bitmaps == layout.ALL_ZERO] = ZERO
            reads_data = low != 0
            bad |= (low & bitmaps >> layout.SUBCLUSTERS) != 0
            bad |= reads_data & ~allocated
        if not geometry.external:
            bad |= reads_data & self._misplaced(offsets)
        if compressed.any():
            descriptors = entries & ~np.uint64(layout.COPIED)
            kinds[compressed] = COMPRESSED
            hosts[compressed] = descriptors[compressed].astype(np.int64)
            bad[compressed] = self._misplaced_compressed(entries[compressed])
            if geometry.external:
                bad |= compressed
            if bitmaps is not None:
                bad |= compressed & (bitmaps != 0)
        kinds[bad] = BAD
        return kinds, hosts

    def _misplaced(self, offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which host offsets no data can have."""
        wrong: NDArray[np.bool_] = offsets >= self._file_end
        low, high = int(offsets.min()), int(offsets.max())
        for region in self._regions:
            end = region.offset + region.length
            if region.offset <= high and low < end:
                wrong |= (offsets >= region.offset) & (offsets < end)
        return wrong

    def _misplaced_compressed(self, entries: Words) -> NDArray[np.bool_]:
        offsets = entries & ((1 << self._geometry.compressed_shift) - 1)
        limit = min(self._file_end, layout.HOST_OFFSET_LIMIT)
        return (offsets >= limit) | (offsets < self._geometry.cluster_size)


def _run_starts(
    kinds: NDArray[np.uint8], hosts: NDArray[np.int64], cluster_size: int
) -> NDArray[np.int64]:
    """The indexes at which something else begins than what was before."""
    begins = np.empty(len(kinds), np.bool_)
    begins[0] = True
    before, after = hosts[:-1], hosts[1:]
    np.not_equal(after, before + cluster_size, out=begins[1:])
    nowhere = before == NOWHERE
    if nowhere.any():
        begins[1:][nowhere] = after[nowhere] != NOWHERE
    begins[1:] |= kinds[1:] != kinds[:-1]
    alone = (kinds == COMPRESSED) | (kinds == MIXED) | (kinds == BAD)
    if alone.any():
        begins |= alone
        begins[1:] |= alone[:-1]
    return np.flatnonzero(begins)
