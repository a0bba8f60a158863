"""Making an image empty: all that it has is let go at once, and its file becomes short.

The tables of an empty image are built behind all that is in use, and the header is switched to
them. From then on nothing leads to what was there; so the same is done once more, right behind the
header, and the file is cut there. A crash leaves the image full or empty, and leaks nothing.

What is guest data is not looked at: that takes as long for a large image as for a small one.
"""

from __future__ import annotations

from array import array
from contextlib import suppress
from typing import TYPE_CHECKING

from underlay.errors import UnderlayError, UnsupportedOperationError
from underlay.face import to_the_end
from underlay.steps import Steps
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.findings import Report
from underlay_drivers.qcow2.rebuild import Front, Rebuild
from underlay_drivers.qcow2.references import References, cannot_overflow
from underlay_drivers.qcow2.writeback import HeaderSwitch

if TYPE_CHECKING:
    from underlay.limits import Limits
    from underlay_drivers.qcow2.dependencies import Dependencies
    from underlay_drivers.qcow2.tables import Table
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["make_empty"]


async def make_empty(writer: ImageWriter, limits: Limits) -> None:
    """See ``Emptiable.make_empty``."""
    disk, back = writer.disk, writer.back
    await writer.prepare()
    async with writer.alone(), back.condemning():
        await writer.make_ready()
        _check_possible(disk)
        async with back.all_at_once():
            await _empty(writer, limits)
        await back.sync()
        if disk.geometry.external:
            with suppress(UnderlayError):  # nothing leads there, and it does no harm
                await disk.data_storage().discard(0, disk.size())
                await back.sync()


def _check_possible(disk: Dependencies) -> None:
    """Refuse images that keep more than their disk."""
    header = disk.header
    kept = ""
    if header.nb_snapshots:
        kept = "snapshots"
    elif header.extension(layout.EXTENSION_BITMAPS) is not None:
        kept = "bitmaps"
    elif header.autoclear_features & layout.RAW_EXTERNAL_DATA:
        kept = "a raw data file, which has to say what the disk holds"
    if kept:
        raise UnsupportedOperationError(
            f"'{disk.image.name()}' cannot be made empty as a whole, since it has {kept}; discard "
            "what it holds"
        )


async def _empty(writer: ImageWriter, limits: Limits) -> None:
    disk = writer.disk
    former, header = disk.l1, disk.header
    nothing = array("Q", bytes(8 * len(former)))
    # At once: nobody maps anew what is about to go, and so what is mapped comes to an end.
    disk.follow(header, nothing)
    try:
        await writer.back.leases_ended()
        await to_the_end(_replace_all(writer, nothing, limits))
    except BaseException:
        if disk.header is header:
            disk.follow(header, former)
        raise


async def _replace_all(writer: ImageWriter, l1: Table, limits: Limits) -> None:
    """Let the image consist of a header and empty tables."""
    disk, back = writer.disk, writer.back
    image, bits = disk.image, disk.geometry.cluster_bits
    final = _empty_tables(disk, l1, limits, start=1)
    behind = max(await writer.allocator.end_of_use() >> bits, final.end)
    await _show(writer, l1, _empty_tables(disk, l1, limits, start=behind))
    back.forget_freed()
    try:
        await _show(writer, l1, final)
        end = final.end << bits
        try:
            await image.resize(end)
        except UnderlayError:  # a block device, say
            with suppress(UnderlayError):
                await image.discard(end, image.size() - end)
    finally:
        if not back.broken:
            await writer.look_around()


def _empty_tables(disk: Dependencies, l1: Table, limits: Limits, *, start: int) -> Rebuild:
    """What an image has beside its header that has nothing else, from the cluster ``start`` on."""
    header = disk.header
    references = References(
        1,
        refcount_bits=header.refcount_bits,
        overflow=cannot_overflow,
        limits=limits,
        name=disk.image.name(),
    )
    references.add_run(0, 1)
    front = Front("L1 table", "l1_table_offset", bytes(8 * len(l1)))
    tables = Rebuild(disk.image, header, references, Report(), start=start, front=front)
    tables.plan()
    return tables


async def _show(writer: ImageWriter, l1: Table, tables: Rebuild) -> None:
    """Write them, and let the header lead there."""
    await tables.write_structures(Steps(None))
    await writer.back.switch_header_now(HeaderSwitch(change=lambda _: tables.header, l1=l1))
