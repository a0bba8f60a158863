"""An open disk as such: what it is and can do, and how it ends.

``FormatAccess`` (``underlay.access``) is one whose bytes can be read and written.
"""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import attrs

from underlay.capabilities import offers
from underlay.counted import CountedCapability
from underlay.driver import FormatDriverInstance
from underlay.face import to_the_end
from underlay.handle import StorageHandle, StorageStats
from underlay.info import ImageInfo, describe_image
from underlay.lifecycle import Lifecycle
from underlay.storage import AnyStorage

__all__ = ["OpenDisk", "Resources", "flush_driver"]

T = TypeVar("T")


@attrs.define
class Resources:
    """What an open disk closes: images from the top down, and the handles of their storages."""

    drivers: list[FormatDriverInstance] = attrs.field(factory=list[FormatDriverInstance])
    handles: list[StorageHandle] = attrs.field(factory=list[StorageHandle])
    #: Disks of the caller that this one reads through; it does not close them.
    lent: list[OpenDisk] = attrs.field(factory=list["OpenDisk"])

    async def close(self, *, abandon: bool = False) -> None:
        """Close everything, however many of them fail; the first error is raised at the end.

        With ``abandon`` objects that were created for the disk are removed.
        """
        first: BaseException | None = None
        closers = [driver.close for driver in self.drivers]
        closers += [handle.abandon if abandon else handle.close for handle in self.handles]
        self.drivers.clear()
        self.handles.clear()
        for close in closers:
            try:
                await to_the_end(close())
            except BaseException as error:  # noqa: BLE001 - raised when all is closed
                first = first or error
        if first is not None:
            raise first


class OpenDisk:
    """An open disk, whatever is done with its bytes; on the asynchronous face."""

    def __init__(
        self,
        driver: FormatDriverInstance,
        *,
        resources: Resources | None = None,
        view_of: OpenDisk | None = None,
    ) -> None:
        self._resources: Resources | None = None
        self._driver = driver
        self._life: Lifecycle = Lifecycle() if view_of is None else view_of._life
        self._is_view = view_of is not None
        for disk in resources.lent if resources is not None else ():
            disk._life.serve(self._life)  # one that is closed is an error, and this disk none
        if resources is None and view_of is None:
            resources = Resources(drivers=[driver])
        self._resources = resources

    # -- facts

    @property
    def inner(self) -> FormatDriverInstance:
        """The driver."""
        return self._driver

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        self._life.check()
        return self._driver.size()

    @property
    def format_name(self) -> str:
        """The name of the disk's format."""
        return self._driver.format_name

    @property
    def writable(self) -> bool:
        """Whether the disk was opened for writing."""
        return self._driver.writable()

    @property
    def closed(self) -> bool:
        """Whether the disk can no longer be used."""
        return self._life.reason is not None

    @property
    def backing(self) -> Self | None:
        """The backing image as a disk, or None. It closes with this one."""
        driver = self._driver.backing()
        return None if driver is None else type(self)(driver, view_of=self)

    def chain(self) -> list[Self]:
        """This disk and its backing images, the top first."""
        found: list[Self] = [self]
        while (below := found[-1].backing) is not None:
            found.append(below)
        return found

    def collect_storage_dependencies(self) -> list[AnyStorage]:
        """Every storage that the disk uses, those of its backing images included."""
        return [handle.storage for handle in self._handles()]

    def req_align(self) -> int:
        """The alignment of offsets and lengths that needs no bounce buffer."""
        return max((handle.req_align for handle in self._handles()), default=1)

    def mem_align(self) -> int:
        """The alignment of buffers that needs no bounce buffer; see ``aligned_buffer``."""
        return max((handle.mem_align for handle in self._handles()), default=1)

    def stats(self) -> dict[str, StorageStats]:
        """What went through each storage, by its name."""
        return {handle.name(): handle.stats for handle in self._handles()}

    def capability(self, kind: type[T]) -> T | None:
        """The driver as a ``kind`` (``underlay.capabilities``), or None if it is none.

        Its calls count as the disk's own: closing waits for them.
        """
        found = self._offered(kind)
        return None if found is None else cast("T", CountedCapability(found, self._life))

    def _offered(self, kind: type[T]) -> T | None:
        """The driver itself, for who counts its calls."""
        self._life.check()
        return self._driver if offers(self._driver, kind) else None

    async def info(self) -> ImageInfo:
        """What the image tells of itself; opens nothing further."""
        with self._life.call():
            return await describe_image(self._driver)

    def _handles(self) -> list[StorageHandle]:
        found: list[StorageHandle] = []
        layer: FormatDriverInstance | None = self._driver
        while layer is not None:
            found += [h for h in layer.collect_storage_dependencies() if h not in found]
            layer = layer.backing()
        return found

    # -- the end

    async def close(self) -> None:
        """Wait for calls in flight, flush and sync what is writable, and close what was opened.

        A storage that the caller gave stays open. Closing twice is allowed; closing a view (a
        slice, a backing image) does nothing, since it closes with its disk.
        """
        if not self._is_view and await self._life.end():
            await to_the_end(self._close())

    async def _close(self) -> None:
        resources, self._resources = self._resources, None
        own = [] if resources is None else [d for d in resources.drivers if d is not self._driver]
        try:
            # An image below is writable too where a job writes to it.
            for driver in (*reversed(own), self._driver):
                if driver.writable():
                    await flush_driver(driver)
                    await driver.sync()
        finally:
            if resources is not None:
                await resources.close()

    async def abandon(self) -> None:
        """Close a disk that was created in vain: nothing is flushed, and what is new is removed.

        An object that was there before its creation stays, with whatever it holds by now.
        """
        if not self._is_view and await self._life.end():
            resources, self._resources = self._resources, None
            if resources is not None:
                await to_the_end(resources.close(abandon=True))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        # An __init__ that raised may have set nothing yet.
        open_ = getattr(self, "_resources", None) is not None
        if open_ and not self._life.ended and not self._life.forked:
            _warn(f"unclosed disk {self!r}", ResourceWarning, source=self)

    def __repr__(self) -> str:
        names = [handle.name() for handle in self._driver.collect_storage_dependencies()[:1]]
        state = "closed" if self.closed else "writable" if self.writable else "read-only"
        return f"<{type(self).__name__} {self.format_name} {names[0] if names else ''} {state}>"


async def flush_driver(driver: FormatDriverInstance) -> None:
    """Write what a driver has buffered to its storages, and what these have to the system."""
    await driver.flush()
    for handle in driver.collect_storage_dependencies():
        if handle.writable():
            await handle.flush()
