"""Formatting a storage as qcow2 step by step, without ``underlay.create``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self, cast

import attrs

from underlay.driver import FormatCreateOptions
from underlay.errors import OptionError
from underlay.face import run_blocking
from underlay.gate import ImplicitOpenGate
from underlay.handle import StorageHandle
from underlay.limits import DEFAULT_LIMITS, Limits
from underlay.storage import AnyStorage, PreallocateMode
from underlay.units import parse_size

if TYPE_CHECKING:
    from underlay_drivers.qcow2.builder import Qcow2OpenBuilder
    from underlay_drivers.qcow2.driver import Qcow2

__all__ = ["Qcow2CreateBuilder"]

#: From the storage that was formatted to the builder that opens it.
Opener = Callable[[StorageHandle], "Qcow2OpenBuilder"]


class Qcow2CreateBuilder:
    """Collects what a new image is to be; every setter returns the builder.

    The storage stays the caller's. Nothing is written before ``create`` or ``create_open``, and
    then nothing of what the storage held survives.
    """

    __slots__ = (
        "_data_file",
        "_driver",
        "_image",
        "_limits",
        "_options",
        "_preallocation",
        "_size",
    )

    def __init__(self, driver: type[Qcow2], image: AnyStorage | StorageHandle) -> None:
        self._driver = driver
        self._image = _handle(image)
        self._size = 0
        self._preallocation = PreallocateMode.OFF
        self._limits = DEFAULT_LIMITS
        self._data_file: StorageHandle | None = None
        self._options: dict[str, object] = {}

    def size(self, size: int | str) -> Self:
        """The virtual size in bytes; 0 by default."""
        self._size = parse_size(size)
        return self

    def preallocate(self, mode: PreallocateMode | str) -> Self:
        """How much of it to reserve."""
        self._preallocation = PreallocateMode.parse(mode)
        return self

    def limits(self, limits: Limits) -> Self:
        """What the image may ask for."""
        self._limits = limits
        return self

    def backing(self, name: str, format_name: str) -> Self:
        """Record a backing image; it is not looked at, so the size has to be given."""
        self._options |= {"backing_file": name, "backing_fmt": format_name}
        return self

    def data_file(self, name: str, file: AnyStorage | StorageHandle) -> Self:
        """Keep guest data in this storage, which stays the caller's, and record its name."""
        self._options["data_file"] = name
        self._data_file = _handle(file)
        return self

    def cluster_size(self, size: int) -> Self:
        """Bytes of a cluster: a power of two from 512 to 2 MiB, 64 KiB by default."""
        self._options["cluster_size"] = size
        return self

    def refcount_width(self, bits: int) -> Self:
        """Bits of a reference count: 1, 2, 4, … 64; 16 by default."""
        self._options["refcount_bits"] = bits
        return self

    def option(self, name: str, value: object) -> Self:
        """Set any other of the driver's ``create_options``, as ``underlay.create`` takes it.

        Raises:
            OptionError: there is none of this name.
        """
        if name not in self._driver.create_options:
            known = ", ".join(self._driver.create_options)
            raise OptionError(f"Unknown option '{name}'; known: {known}", option=name)
        if name == "preallocation":
            return self.preallocate(cast("str", value))
        if name == "data_file":
            raise OptionError("A data file needs a storage: call data_file(…)", option=name)
        self._options[name] = value
        return self

    def get_size(self) -> int:
        """The virtual size in bytes."""
        return self._size

    def get_preallocate(self) -> PreallocateMode:
        """How much of it is reserved."""
        return self._preallocation

    async def create(self) -> None:
        """Format the storage.

        Raises:
            OptionError: a value, or a combination of values, is impossible; nothing was written.
            UnderlayError: as the storage says.
        """
        options = FormatCreateOptions(
            storage=self._image,
            size=self._size,
            preallocation=self._preallocation,
            limits=self._limits,
            data_file=self._data_file,
            options={name: value for name, value in self._options.items() if value is not None},
        )
        self._driver.check_create(attrs.evolve(options, storage=None))
        self._limits.check("virtual_size", self._size, what="The virtual size")
        for storage in (self._image, self._data_file):
            if storage is not None and storage.size():
                await storage.resize(0)
        await self._driver.create(options)

    async def create_open(
        self, gate: ImplicitOpenGate | None = None, opener: Opener | None = None
    ) -> Qcow2:
        """Format the storage, and open it for writing; no gate allows nothing.

        ``opener`` makes the builder that opens it; without one what was given here is used, and a
        backing image is up to the gate. Raises as ``create`` and ``Qcow2OpenBuilder.open`` do.
        """
        await self.create()
        if opener is not None:
            return await opener(self._image).open(gate)
        builder = self._driver.builder(self._image).limits(self._limits)
        builder.write(True)  # noqa: FBT003 (imago's name says it)
        if self._data_file is not None:
            builder.data_file(self._data_file.storage)
        return await builder.open(gate)

    def create_sync(self) -> None:
        """``create`` on the blocking face."""
        run_blocking(self.create())

    def create_open_sync(
        self, gate: ImplicitOpenGate | None = None, opener: Opener | None = None
    ) -> Qcow2:
        """``create_open`` on the blocking face."""
        return run_blocking(self.create_open(gate, opener))


def _handle(image: AnyStorage | StorageHandle) -> StorageHandle:
    return image if isinstance(image, StorageHandle) else StorageHandle(image, owned=False)
