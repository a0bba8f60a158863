"""What an image needs besides itself: its data file and its backing image.

The core asks for ``references()`` and gives what they lead to with ``attach()``. A program that
holds a ``Qcow2`` directly can do the same by hand, or let the image's own names be opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from underlay.driver import FormatDriverInstance
from underlay.errors import OptionError
from underlay.face import run_blocking
from underlay.gate import (
    ImplicitOpenGate,
    PermissiveImplicitOpenGate,
    Reference,
    ReferenceKind,
)
from underlay.handle import StorageHandle
from underlay.limits import Limits
from underlay.storage import AnyStorage, is_storage
from underlay_drivers.qcow2.header import Header
from underlay_drivers.qcow2.mappings import ClusterMap

if TYPE_CHECKING:
    from underlay.access import FormatAccess, Resources
    from underlay.sync import SyncFormatAccess
    from underlay_drivers.qcow2.tables import Table

__all__ = ["Dependencies", "named_objects"]


def named_objects(header: Header, *, writable: bool = False) -> Iterator[Reference]:
    """Every other object that an image names; a data file that it does not name has no name."""
    if header.external_data_file:
        yield Reference(
            kind=ReferenceKind.DATA_FILE,
            name=header.data_file or "",
            format="raw",
            writable=writable,
        )
    if header.backing_file is not None:
        yield Reference(
            kind=ReferenceKind.BACKING, name=header.backing_file, format=header.backing_format
        )


class Dependencies(ClusterMap):
    """The part of the driver that knows about other objects."""

    __slots__ = ("_limits", "_resources", "header")

    def __init__(
        self, image: StorageHandle, header: Header, *, limits: Limits, cache_size: int
    ) -> None:
        super().__init__(image, header, cache_size=cache_size)
        #: What is on disk.
        self.header = header
        self._limits = limits
        #: What this image opened by itself, and so closes; the core keeps its own.
        self._resources: Resources | None = None

    # -- for the core

    def follow(self, header: Header, l1: Table | None = None) -> None:
        """See ``ClusterTables.follow``. A backing image that is attached stays."""
        self.header = header
        super().follow(header, l1)
        if self._backing_pending is not None:
            self._backing_pending = header.backing_file

    def references(self) -> Sequence[Reference]:
        """See ``FormatDriverInstance.references``."""
        pending: list[Reference] = []
        for reference in named_objects(self.header, writable=self.writable()):
            backing = reference.kind is ReferenceKind.BACKING
            if self._backing_pending is not None if backing else self._data_pending:
                pending.append(reference)
        return pending

    def attach(
        self, reference: Reference, opened: StorageHandle | FormatDriverInstance | None
    ) -> None:
        """See ``FormatDriverInstance.attach``."""
        if reference.kind is ReferenceKind.BACKING:
            if isinstance(opened, StorageHandle):
                raise TypeError("a backing image must be a driver, not a storage")
            self._backing = opened
            self._backing_pending = None
            return
        if opened is not None and not isinstance(opened, StorageHandle):
            raise TypeError("a data file must be a storage, not a driver")
        if self.header.external_data_file:
            self._data = opened
            self._data_pending = False
        elif opened is not None:
            raise OptionError(
                f"'{self.image.name()}' keeps its data in itself and takes no data file",
                option="data_file",
            )

    def backing(self) -> FormatDriverInstance | None:
        """See ``FormatDriverInstance.backing``."""
        return self._backing

    def nothing_stays_zero(self) -> bool:
        """Whether what is not mapped reads as zeroes, whoever opens the image next."""
        return self.nothing_reads_zero() and self.header.backing_file is None

    def lacks_backing(self) -> bool:
        """Whether it names a backing image that was declined.

        What is not mapped reads as zeroes now, and as something else another time.
        """
        return self.nothing_reads_zero() and self.header.backing_file is not None

    # -- for programs: what the image says

    def requires_external_data_file(self) -> bool:
        """Whether guest data lies in a file of its own; if not, the image must not get one."""
        return self.header.external_data_file

    def implicit_external_data_file(self) -> str | None:
        """The data file's name as stored. An image may need one without naming it."""
        return self.header.data_file

    def implicit_backing_file(self) -> str | None:
        """The backing image's name as stored."""
        return self.header.backing_file

    def implicit_backing_format(self) -> str | None:
        """The format recorded for the backing image.

        None is no reason to guess: a guest that writes to a raw image chooses what it looks like.
        """
        return self.header.backing_format

    # -- for programs: what the caller gives

    def set_data_file(self, file: AnyStorage | StorageHandle | None) -> None:
        """Use an open storage, which stays the caller's, as data file; None where there is none.

        Raises:
            OptionError: the image keeps its data in itself.
        """
        handle = StorageHandle(cast("AnyStorage", file), owned=False) if is_storage(file) else file
        reference = Reference(kind=ReferenceKind.DATA_FILE, name=self.header.data_file or "")
        self.attach(reference, cast("StorageHandle | None", handle))

    def set_backing(
        self, backing: FormatAccess | SyncFormatAccess | FormatDriverInstance | None
    ) -> None:
        """Use an open disk, which stays the caller's, as backing image; None reads zeroes."""
        driver = getattr(backing, "inner", backing)
        if driver is not None and FormatDriverInstance not in type(driver).__mro__:
            raise TypeError(f"a disk or a driver was expected, not {type(backing).__name__}")
        reference = Reference(kind=ReferenceKind.BACKING, name=self.header.backing_file or "")
        self.attach(reference, cast("FormatDriverInstance | None", driver))

    # -- for programs: what the image names

    async def open_implicit_dependencies_gated(self, gate: ImplicitOpenGate) -> None:
        """Open what the image names, as far as the gate allows and nothing else was set.

        Raises:
            ImplicitOpenDeniedError: the gate does not allow it.
        """
        from underlay.access import Resources
        from underlay.chain import Resolver

        resources = self._resources or Resources()
        self._resources = resources
        resolver = Resolver(
            gate=gate,
            limits=self._limits,
            lock=True,
            storage_options={},
            resources=resources,
        )
        await resolver.resolve(self, self.image)

    async def open_implicit_dependencies(self) -> None:
        """Open what the image names, whatever it is. Only for images from people you trust."""
        await self.open_implicit_dependencies_gated(PermissiveImplicitOpenGate())

    def open_implicit_dependencies_gated_sync(self, gate: ImplicitOpenGate) -> None:
        """``open_implicit_dependencies_gated`` on the blocking face."""
        run_blocking(self.open_implicit_dependencies_gated(gate))

    def open_implicit_dependencies_sync(self) -> None:
        """``open_implicit_dependencies`` on the blocking face."""
        run_blocking(self.open_implicit_dependencies())

    # -- the end

    def adopt(self, resources: Resources) -> None:
        """Close these with the image."""
        self._resources = resources

    async def close(self) -> None:
        """See ``FormatDriverInstance.close``. Closes what its own methods opened, too."""
        self._cache.clear()
        resources, self._resources = self._resources, None
        if resources is not None:
            await resources.close()

    def close_sync(self) -> None:
        """``close`` on the blocking face."""
        run_blocking(self.close())
