"""Creating disks, as coroutines of either face.

``underlay.create`` and ``underlay.aio.create`` are this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import attrs

from underlay.access import FormatAccess
from underlay.driver import FormatCreateOptions, FormatDriverInstance
from underlay.errors import ConflictError, OptionError, StorageError, UnderlayError
from underlay.face import to_the_end
from underlay.gate import DenyImplicitOpenGate, ImplicitOpenGate
from underlay.handle import StorageHandle
from underlay.limits import DEFAULT_LIMITS, Limits
from underlay.opening import Opening, probe
from underlay.option_values import checked_options
from underlay.plugins import registry
from underlay.steps import StepsCallback
from underlay.storage import PreallocateMode
from underlay.targets import Target, create_storage, named_in, open_storage, options_for
from underlay.units import parse_size

__all__ = ["create", "create_image"]


async def create(
    target: Target,
    *,
    format: str = "qcow2",
    size: int | str | None = None,
    overwrite: bool = False,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    **format_options: Any,
) -> FormatAccess:
    """Create a disk image of ``size`` virtual bytes, and open it for writing.

    Options are qemu-img's with underscores. A target that exists is an error unless ``overwrite``
    is set; then nothing of its old content survives. If creating fails, a new object is removed
    again. What ``backing_file`` and ``data_file`` name, seen from the new image's folder, is the
    caller's word: it is opened, and the data file created, without asking the gate. Without a
    ``size`` the disk is as large as its backing image. Each of the three gets those of
    ``storage_options`` that its storage has.

    Raises:
        StorageExistsError: the target exists.
        OptionError: an option is unknown (the message lists the known ones), or its value is.
    """
    return await create_image(
        target,
        format=format,
        size=size,
        overwrite=overwrite,
        gate=gate,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
        options=format_options,
    )


async def create_image(
    target: Target,
    *,
    format: str,
    size: int | str | None,
    overwrite: bool,
    gate: ImplicitOpenGate | None,
    limits: Limits | None,
    lock: bool,
    storage_options: Mapping[str, object] | None,
    options: Mapping[str, Any],
    open_backing: bool = True,
    backing_storage_options: Mapping[str, object] | None = None,
    announce: Callable[[Mapping[str, object]], None] | None = None,
    progress: StepsCallback | None = None,
    made: list[FormatAccess] | None = None,
) -> FormatAccess:
    """``create``; for programs that want to say what is being made, or to open no backing image.

    ``backing_storage_options`` are for the backing image, in place of ``storage_options``.
    ``announce`` is told the facts of the new image before anything is written. Without
    ``open_backing`` the new disk has no backing image while it is open. ``progress`` counts bytes
    that are preallocated.
    """
    limits = limits or DEFAULT_LIMITS
    driver_class = registry().driver(format)
    options = checked_options(options, driver_class.create_options, what=f"creating {format}")
    preallocation = options.pop("preallocation", PreallocateMode.OFF)
    data_file = named_in(options, "data_file", target)
    backing = named_in(options, "backing_file", target) if open_backing else None
    if backing_storage_options:
        own, of_data_file = options_for((target, data_file), storage_options)
        [of_backing] = options_for((backing,), backing_storage_options)
    else:
        own, of_data_file, of_backing = options_for((target, data_file, backing), storage_options)
    creation = _Creation(
        target=target,
        overwrite=overwrite,
        opening=Opening(
            writable=True,
            gate=gate or DenyImplicitOpenGate(),
            limits=limits,
            lock=lock,
            storage_options=own,
        ),
        data_file=data_file,
        data_file_options=of_data_file,
        backing=backing,
        backing_options=of_backing,
        open_backing=open_backing,
        preallocation=preallocation,
        announce=announce,
    )
    wanted = FormatCreateOptions(
        storage=None,
        size=0 if size is None else parse_size(size),
        limits=limits,
        options=options,
        progress=progress,
    )
    try:
        disk = await creation.run(driver_class, wanted, size_given=size is not None)
        if made is not None:
            made.append(disk)
        return disk  # noqa: TRY300 - what comes up until here undoes it
    except BaseException:
        await to_the_end(creation.undo())
        raise


@attrs.define(kw_only=True)
class _Creation:
    """Making an image, and what it is made upon."""

    target: Target
    overwrite: bool
    opening: Opening
    #: Where they are, and the options of their storages.
    data_file: Target | None
    data_file_options: Mapping[str, object]
    backing: Target | None
    backing_options: Mapping[str, object]
    open_backing: bool
    preallocation: object
    announce: Callable[[Mapping[str, object]], None] | None
    _made: list[StorageHandle] = attrs.field(factory=list[StorageHandle], init=False)

    async def run(
        self,
        driver_class: type[FormatDriverInstance],
        wanted: FormatCreateOptions,
        *,
        size_given: bool,
    ) -> FormatAccess:
        options = wanted.options
        named = "backing_file" in options and "backing_fmt" in driver_class.create_options
        if named and options.get("backing_fmt") is None:
            # Before it is opened as whatever it looks like.
            error = OptionError(
                "Backing file specified without backing format", option="backing_fmt"
            )
            if (found := await self._looks_like()) is not None:
                error.add_note(f"Detected format of {found}.")
            raise error
        backing = await self._open_backing(options)
        if backing is not None and not size_given:
            wanted = attrs.evolve(wanted, size=backing.size())
        elif not size_given:
            raise OptionError("Image creation needs a size parameter", option="size")
        if self.announce is not None:
            self.announce(driver_class.creation_facts(wanted))
        wanted = attrs.evolve(wanted, preallocation=PreallocateMode.parse(self.preallocation))
        driver_class.check_create(wanted)
        self.opening.limits.check("virtual_size", wanted.size, what="The virtual size")
        storage = await self._make(self.target, self.opening.storage_options)
        data_file: StorageHandle | None = None
        if self.data_file is not None:
            data_file = await self._make(self.data_file, self.data_file_options)
        await driver_class.create(attrs.evolve(wanted, storage=storage, data_file=data_file))
        attached: dict[str, Any] = {}
        if backing is not None or not self.open_backing:
            attached["backing"] = backing
        if data_file is not None:
            attached["data_file"] = data_file.storage
        return await self.opening.open_storage(storage, driver_class.format_name, attached)

    async def _looks_like(self) -> str | None:
        """What format the image below seems to have: to be told, and not to be relied upon."""
        if self.backing is None:
            return None
        try:
            return (await probe(self.backing, storage_options=self.backing_options)).format
        except UnderlayError as error:
            error.add_note("Could not open backing image.")
            raise

    async def _open_backing(self, options: Mapping[str, object]) -> FormatDriverInstance | None:
        """The image that the new one is to lie upon, if the caller names one."""
        if self.backing is None:
            return None
        told = self.backing_options
        below = attrs.evolve(self.opening, writable=False, storage_options=told)
        below.resources = self.opening.resources
        format_name = options.get("backing_fmt")
        try:
            storage = await open_storage(self.backing, lock=below.lock, storage_options=told)
            below.resources.handles.append(storage)
            driver = await below.open_driver(storage, cast("str", format_name), {})
        except UnderlayError as error:
            error.add_note("Could not open backing image.")
            raise
        await self._refuse_overwriting(driver)
        return driver

    async def _refuse_overwriting(self, backing: FormatDriverInstance) -> None:
        """The new image must not take the place of one that it is to lie upon."""
        try:
            present = await open_storage(
                self.target, lock=False, storage_options=self.opening.storage_options
            )
        except StorageError:
            return  # it does not exist, or creating it says what is wrong
        try:
            identity = present.identity()
        finally:
            await present.close()
        layer: FormatDriverInstance | None = backing
        while layer is not None:
            for handle in layer.collect_storage_dependencies():
                if identity is not None and handle.identity() == identity:
                    raise ConflictError(
                        f"'{handle.name()}' cannot be created upon itself; choose another target"
                    )
            layer = layer.backing()

    async def _make(self, target: Target, options: Mapping[str, object]) -> StorageHandle:
        storage = await create_storage(
            target,
            overwrite=self.overwrite,
            lock=self.opening.lock,
            storage_options=options,
            made=self._made,
        )
        self.opening.resources.handles.append(storage)
        return storage

    async def undo(self) -> None:
        """Remove what is new, and close everything."""
        for storage in self._made:
            await storage.abandon()
        await self.opening.resources.close()
