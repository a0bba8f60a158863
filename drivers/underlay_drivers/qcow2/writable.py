"""The part of the driver that changes the image: what the core calls, handed to who does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from underlay.driver import FormatOpenOptions, WriteTicket
from underlay.errors import ReadOnlyError
from underlay_drivers.qcow2.dependencies import Dependencies
from underlay_drivers.qcow2.header import Header

if TYPE_CHECKING:
    from underlay.handle import StorageHandle
    from underlay.lease import Leases
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["Writable"]


class Writable(Dependencies):
    """An image that may have a writing side; one that is open read-only has none."""

    __slots__ = ("_writer",)

    def __init__(self, options: FormatOpenOptions, header: Header, *, cache_size: int) -> None:
        super().__init__(options.storage, header, limits=options.limits, cache_size=cache_size)
        self._writer: ImageWriter | None = None

    def _start_writing(self, *, cache_size: int, refcount_cache_size: int) -> None:
        from underlay_drivers.qcow2.writing import ImageWriter

        self._writer = ImageWriter(
            self,
            limits=self._limits,
            cache_size=cache_size,
            refcount_cache_size=refcount_cache_size,
        )

    @property
    def writer(self) -> ImageWriter:
        """The writing side.

        Raises:
            ReadOnlyError: there is none.
        """
        if self._writer is None:
            raise ReadOnlyError(
                f"'{self.image.name()}' is open read-only; open it with writable=True"
            )
        return self._writer

    def writable(self) -> bool:
        """See ``FormatDriverInstance.writable``."""
        return self._writer is not None

    def leases(self) -> Leases | None:
        """See ``FormatDriverInstance.leases``."""
        return None if self._writer is None else self._writer.back.leases

    async def begin_write(self, offset: int, length: int) -> WriteTicket:
        """See ``FormatDriverInstance.begin_write``."""
        return await self.writer.begin(offset, length)

    async def commit_write(self, ticket: WriteTicket) -> None:
        """See ``FormatDriverInstance.commit_write``."""
        await self.writer.commit(ticket)

    async def abort_write(self, ticket: WriteTicket) -> None:
        """See ``FormatDriverInstance.abort_write``."""
        await self.writer.abort(ticket)

    async def ensure_data_mapping(
        self, offset: int, length: int, overwrite: bool
    ) -> tuple[StorageHandle, int, int]:
        """See ``FormatDriverInstance.ensure_data_mapping``."""
        return await self.writer.ensure_data(offset, length)

    async def flush(self) -> None:
        """See ``FormatDriverInstance.flush``; the order is in ``writeback``."""
        if self._writer is not None:
            await self._writer.back.flush()

    async def sync(self) -> None:
        """See ``FormatDriverInstance.sync``."""
        if self._writer is not None:
            await self._writer.back.sync()

    async def close(self) -> None:
        """See ``FormatDriverInstance.close``. What was freed and still waits is freed now."""
        try:
            if self._writer is not None:
                await self._writer.back.finish()
        finally:
            await super().close()
