"""Opening a qcow2 image step by step, without ``underlay.open_image``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from underlay.driver import FormatDriverInstance, FormatOpenOptions
from underlay.face import run_blocking
from underlay.gate import DenyImplicitOpenGate, ImplicitOpenGate
from underlay.handle import StorageHandle
from underlay.limits import DEFAULT_LIMITS, Limits
from underlay.storage import AnyStorage

if TYPE_CHECKING:
    from underlay.access import FormatAccess, Resources
    from underlay.sync import SyncFormatAccess
    from underlay.targets import Target
    from underlay_drivers.qcow2.driver import Qcow2

__all__ = ["Qcow2OpenBuilder"]


class Qcow2OpenBuilder:
    """Collects what is to be opened, and how; every setter returns the builder.

    What is not set is what the image names, if the gate given to ``open`` allows it.
    """

    __slots__ = (
        "_backing",
        "_backing_path",
        "_data_file",
        "_driver",
        "_limits",
        "_set",
        "_storage_options",
        "_target",
        "_writable",
    )

    def __init__(
        self, driver: type[Qcow2], image: AnyStorage | StorageHandle | str | os.PathLike[str]
    ) -> None:
        self._driver = driver
        self._target = image
        self._writable = False
        self._limits = DEFAULT_LIMITS
        self._storage_options: Mapping[str, object] = {}
        self._backing: FormatAccess | SyncFormatAccess | FormatDriverInstance | None = None
        self._backing_path: tuple[str | os.PathLike[str], str] | None = None
        self._data_file: Target | None = None
        #: Which of ``backing`` and ``data_file`` the caller has decided.
        self._set: set[str] = set()

    def write(self, writable: bool) -> Self:
        """Open it for writing."""
        self._writable = writable
        return self

    def limits(self, limits: Limits) -> Self:
        """What the image may ask for."""
        self._limits = limits
        return self

    def storage_open_options(self, options: Mapping[str, object]) -> Self:
        """Options for every storage that is opened by name."""
        self._storage_options = dict(options)
        return self

    def backing(self, disk: FormatAccess | SyncFormatAccess | FormatDriverInstance | None) -> Self:
        """Use this disk, which stays the caller's, as backing image; None for none."""
        self._backing, self._backing_path = disk, None
        self._set.add("backing")
        return self

    def backing_path(self, path: str | os.PathLike[str], format: str) -> Self:
        """Open this image as backing image. What it names in turn is up to the gate."""
        self._backing, self._backing_path = None, (path, format)
        self._set.add("backing")
        return self

    def data_file(self, storage: Target | None) -> Self:
        """Use this storage, which stays the caller's, as data file; None for none."""
        self._data_file = storage
        self._set.add("data_file")
        return self

    def get_image_path(self) -> str | None:
        """The path that is to be opened, or None for an open storage."""
        return os.fspath(self._target) if isinstance(self._target, str | os.PathLike) else None

    def get_writable(self) -> bool:
        """Whether it is to be opened for writing."""
        return self._writable

    async def open(self, gate: ImplicitOpenGate | None = None) -> Qcow2:
        """Open the image and what it needs. Close it with ``close``; no gate allows nothing.

        Raises:
            ImplicitOpenDeniedError: the image names something that the gate does not allow.
            UnderlayError: as storages and drivers say.
        """
        from underlay.access import Resources

        resources = Resources()
        try:
            return await self._open(gate or DenyImplicitOpenGate(), resources)
        except BaseException:
            await resources.close()
            raise

    def open_sync(self, gate: ImplicitOpenGate | None = None) -> Qcow2:
        """``open`` on the blocking face."""
        return run_blocking(self.open(gate))

    async def _open(self, gate: ImplicitOpenGate, resources: Resources) -> Qcow2:
        from underlay.chain import Resolver
        from underlay.targets import open_storage

        image = self._target
        if not isinstance(image, StorageHandle):
            image = await open_storage(
                image,
                writable=self._writable,
                storage_options=self._storage_options,
            )
            resources.handles.append(image)
        disk = await self._driver.open(
            FormatOpenOptions(storage=image, writable=self._writable, limits=self._limits)
        )
        resolver = Resolver(
            gate=gate,
            limits=self._limits,
            lock=True,
            storage_options=self._storage_options,
            resources=resources,
        )
        given: dict[str, Any] = {}
        if "backing" in self._set:
            given["backing"] = self._backing
        if self._backing_path is not None:
            given["backing"] = await self._open_backing(resolver, *self._backing_path)
        if "data_file" in self._set:
            given["data_file"] = self._data_file
        await resolver.resolve(disk, image, **given)
        disk.adopt(resources)
        return disk

    async def _open_backing(
        self, resolver: Any, path: str | os.PathLike[str], format_name: str
    ) -> FormatDriverInstance:
        from underlay.plugins import registry
        from underlay.targets import open_storage

        driver_class = registry().driver(format_name)
        storage = await open_storage(path, storage_options=self._storage_options)
        resolver.resources.handles.append(storage)
        driver = await driver_class.open(FormatOpenOptions(storage=storage, limits=self._limits))
        resolver.resources.drivers.append(driver)
        await resolver.resolve(driver, storage)
        return driver
