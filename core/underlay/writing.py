"""Writing a disk: two phases where room has to be made, and the fallbacks for zeroing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from underlay.buffers import split_at, total
from underlay.driver import DetectZeroes, FormatDriverInstance, Location, WriteTicket
from underlay.errors import UnsupportedOperationError
from underlay.face import gather, run_blocking, to_the_end
from underlay.mapping import Eof, Zero
from underlay.reading import PART, Reader, resolve

__all__ = ["Writer"]

#: A driver's zero or discard method: from offset and length asked for to those that were done.
_RangeMethod = Callable[[int, int], Awaitable[tuple[int, int]]]


class Writer:
    """Writes through one driver. Ranges were checked, and the disk is writable."""

    __slots__ = ("driver", "reader")

    def __init__(self, driver: FormatDriverInstance, reader: Reader) -> None:
        self.driver = driver
        self.reader = reader

    async def writev(self, views: Sequence[memoryview], offset: int, *, parallel: int = 1) -> None:
        """Write flat views at guest ``offset``."""
        if parallel <= 1:
            await self._write(views, offset)
            return
        slices: list[Callable[[], Coroutine[Any, Any, None]]] = []
        rest = list(views)
        while rest:
            here, rest = split_at(rest, PART)
            slices.append(partial(self._write, here, offset))
            offset += total(here)
        await gather(parallel, slices)

    async def _write(self, views: Sequence[memoryview], offset: int) -> None:
        mode = self.driver.detect_zeroes()
        if mode is not DetectZeroes.OFF and _all_zero(views):
            method = self.driver.ensure_zero_mapping
            if mode is DetectZeroes.UNMAP:
                method = self.driver.discard_to_zero
            await self.zero(offset, total(views), method)
        else:
            await self._write_data(views, offset)

    def try_write(
        self, data: bytes | bytearray | memoryview, offset: int, location: Location | None
    ) -> int:
        """Write as much of flat ``data``, from its start, as goes without waiting for anybody.

        ``location`` is where the driver locates ``offset``. Returns how many bytes that was; the
        rest is for ``writev``, which says too what is wrong with a range. On the blocking face
        only, by one who holds a lease.
        """
        driver = self.driver
        wanted = len(data)
        if offset < 0 or offset + wanted > driver.size():
            return 0
        done = 0
        while done < wanted:
            at, left = offset + done, wanted - done
            if location is not None and location[3]:
                length = self._joined(at, left, location)
                inline = location[0].inline_writev
                if inline is None:
                    break
                here = data if length == wanted else memoryview(data)[done : done + length]
                inline((here,), location[1])
            else:
                ticket = driver.try_begin_write(at, left)
                if ticket is None:
                    break
                length = ticket.length
                here = data if length == wanted else memoryview(data)[done : done + length]
                self._fulfil_at_once(ticket, here)
            done += length
            if done < wanted:
                location = driver.locate(offset + done)
        return done

    def _fulfil_at_once(self, ticket: WriteTicket, data: bytes | bytearray | memoryview) -> None:
        """``_fulfil`` on the blocking face; at once if there is nothing but the data to write."""
        inline = ticket.storage.inline_writev
        if inline is None or ticket.before or ticket.after:
            run_blocking(self._fulfil(ticket, [memoryview(data)]))
            return
        try:
            inline((data,), ticket.offset)
        except BaseException:
            run_blocking(self.driver.abort_write(ticket))
            raise
        if not self.driver.try_commit_write(ticket):
            run_blocking(self.driver.commit_write(ticket))

    def _joined(self, offset: int, wanted: int, location: Location) -> int:
        """How far what is writable at guest ``offset`` goes on in a row, up to ``wanted`` bytes."""
        storage, host, run, _ = location
        while run < wanted:
            further = self.driver.locate(offset + run)
            if further is None or further[:2] != (storage, host + run) or not further[3]:
                break
            run += further[2]
        return min(run, wanted)

    async def _write_data(self, views: Sequence[memoryview], offset: int) -> None:
        driver = self.driver
        rest = list(views)
        length = total(rest)
        leases = driver.leases()
        with nullcontext() if leases is None else leases.hold():
            while length:
                location = driver.locate(offset)
                if location is not None and location[3]:
                    done = self._joined(offset, length, location)
                    here, rest = split_at(rest, done)
                    await location[0].writev(here, location[1])
                else:
                    ticket = driver.try_begin_write(offset, length)
                    if ticket is None:
                        ticket = await driver.begin_write(offset, length)
                    done = ticket.length
                    if not 0 < done <= length:
                        await to_the_end(driver.abort_write(ticket))
                        name = driver.format_name
                        raise RuntimeError(f"the {name} driver's ticket is for {done} bytes")
                    here, rest = split_at(rest, done)
                    await self._fulfil(ticket, here)
                offset += done
                length -= done

    async def _fulfil(self, ticket: WriteTicket, views: list[memoryview]) -> None:
        """Write a ticket's data with what surrounds it; then show it, or give its room back."""
        reader = self.reader if ticket.driver is self.driver else Reader(ticket.driver)
        try:
            buffers = list(views)
            if ticket.before:
                head = memoryview(bytearray(ticket.before))
                await reader.readv((head,), ticket.guest_offset - ticket.before)
                buffers.insert(0, head)
            if ticket.after:
                tail = memoryview(bytearray(ticket.after))
                await reader.readv((tail,), ticket.guest_offset + ticket.length)
                buffers.append(tail)
            await ticket.storage.writev(buffers, ticket.offset - ticket.before)
        except BaseException:
            await to_the_end(self.driver.abort_write(ticket))
            raise
        if not self.driver.try_commit_write(ticket):
            await to_the_end(self.driver.commit_write(ticket))

    async def zero(self, offset: int, length: int, method: _RangeMethod) -> None:
        """Make exactly the range read as zeroes, by ``method`` as far as that goes."""
        end = offset + length
        while offset < end:
            try:
                start, done = await method(offset, end - offset)
            except UnsupportedOperationError:
                start, done = end, 0
            if start + done <= offset:
                start, done = end, 0
            start = max(start, offset)
            await self._write_zeroes(offset, min(start, end) - offset)
            offset = min(start + done, end)

    async def _write_zeroes(self, offset: int, length: int) -> None:
        """Write zeroes where the range does not read as zeroes yet."""
        zeroes = memoryview(bytes(min(length, PART)))
        while length:
            mapping, _ = await resolve(self.driver, offset, length)
            if isinstance(mapping, Eof):
                return
            done = mapping.length
            if not isinstance(mapping, Zero):
                done = min(done, len(zeroes))
                await self._write_data((zeroes[:done],), offset)
            offset += done
            length -= done

    async def discard(self, offset: int, length: int, method: _RangeMethod) -> None:
        """Discard what ``method`` can of the range, and leave the rest as it is."""
        end = offset + length
        while offset < end:
            start, done = await method(offset, end - offset)
            if start + done <= offset:
                return
            offset = start + done


def _all_zero(views: Sequence[memoryview]) -> bool:
    zeroes = bytes(min(PART, max(map(len, views), default=0)))
    return all(
        zeroes.startswith(bytes(view[at : at + PART]))
        for view in views
        for at in range(0, len(view), PART)
    )
