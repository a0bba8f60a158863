"""Opening and creating disks, as coroutines of either face.

``underlay`` offers these on the blocking face, ``underlay.aio`` on the asynchronous one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import attrs

from underlay.access import FormatAccess, Resources
from underlay.chain import FROM_IMAGE, BackingChoice, DataFileChoice, Resolver
from underlay.driver import FormatCreateOptions, FormatDriverInstance, FormatOpenOptions, OptionSpec
from underlay.errors import ConflictError, OptionError, StorageError, UnderlayError
from underlay.face import to_the_end
from underlay.gate import DenyImplicitOpenGate, ImplicitOpenGate
from underlay.guard import RawGuard
from underlay.handle import StorageHandle
from underlay.limits import DEFAULT_LIMITS, Limits
from underlay.plugins import registry
from underlay.probing import ProbeResult
from underlay.recognition import matching_formats, recognise
from underlay.storage import AnyStorage, PreallocateMode, is_storage
from underlay.targets import Target, create_storage, open_storage, scheme_of
from underlay.units import parse_size

__all__ = [
    "beside",
    "create",
    "create_image",
    "open_any",
    "open_image",
    "open_to_commit",
    "open_without_references",
    "probe",
]


async def probe(
    target: Target, *, storage_options: Mapping[str, object] | None = None
) -> ProbeResult:
    """Say what format an object has, opening nothing but it, read-only and without a lock.

    The answer holds for this moment only: do not store it. Two formats that match are reported, not
    raised.
    """
    storage = await open_storage(target, lock=False, storage_options=storage_options)
    try:
        return (await recognise(storage)).result
    finally:
        await storage.close()


async def open_any(
    target: Target,
    *,
    writable: bool = False,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    **format_options: Any,
) -> FormatAccess:
    """Open a disk image of whatever format it has.

    An object that no format claims is opened as raw, and guarded: a write after which it would look
    like another format is refused. Where anybody untrusted can write to raw images, say
    ``open_image(format="raw")`` instead.

    Raises:
        AmbiguousFormatError: more than one format matches.
        ImplicitOpenDeniedError: the image names another object, and ``gate`` (by default the one
            that denies everything) does not allow it.
        ImageInUseError: somebody else uses it; ``lock=False`` takes no lock.
        UnderlayError: as the storage and the driver say.
    """
    opening = _Opening(
        writable=writable,
        gate=gate or DenyImplicitOpenGate(),
        limits=limits or DEFAULT_LIMITS,
        lock=lock,
        storage_options=storage_options or {},
    )
    return await opening.open(target, None, format_options)


async def open_image(
    target: Target,
    *,
    format: str,
    backing: BackingChoice = FROM_IMAGE,
    data_file: DataFileChoice = FROM_IMAGE,
    snapshot: str | None = None,
    writable: bool = False,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    **format_options: Any,
) -> FormatAccess:
    """Open a disk image as ``format``, without probing.

    ``backing`` and ``data_file`` replace what the image names: a disk, or a target; None suppresses
    it. ``snapshot`` (an ID or a name) opens an internal snapshot, read-only. Raises as ``open_any``
    does.
    """
    if not isinstance(format, str):
        raise TypeError(f"A format's name was expected, not {format!r}; open_any() finds it out")
    opening = _Opening(
        writable=writable,
        gate=gate or DenyImplicitOpenGate(),
        limits=limits or DEFAULT_LIMITS,
        lock=lock,
        storage_options=storage_options or {},
    )
    choices = {"backing": backing, "data_file": data_file, "snapshot": snapshot}
    return await opening.open(target, format, choices | format_options)


async def open_without_references(
    target: Target,
    *,
    format: str | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    to_check: bool = False,
    writable: bool = False,
    format_options: Mapping[str, object] | None = None,
) -> FormatAccess:
    """Open one object to look at its metadata: nothing that it names is opened.

    Data that lies elsewhere cannot be read through this disk. For ``info``, and the like. For
    ``check`` much may be wrong with it; to repair it, it is opened writable.
    """
    opening = _Opening(
        writable=writable,
        gate=DenyImplicitOpenGate(),
        limits=limits or DEFAULT_LIMITS,
        lock=lock,
        storage_options=storage_options or {},
        follow=False,
        to_check=to_check,
    )
    return await opening.open(target, format, format_options or {})


async def open_to_commit(
    target: Target,
    *,
    depth: int,
    format: str | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    format_options: Mapping[str, object] | None = None,
) -> FormatAccess:
    """Open a disk for writing, and with it the image that lies ``depth`` (from 1) below it.

    The gate is asked for that one as a reference that is ``writable``; it must be of a recorded
    format. The disk flushes and syncs it too when it is closed. Raises as ``open_any`` does.
    """
    opening = _Opening(
        writable=True,
        gate=gate or DenyImplicitOpenGate(),
        limits=limits or DEFAULT_LIMITS,
        lock=lock,
        storage_options=storage_options or {},
        writable_depth=depth,
    )
    return await opening.open(target, format, format_options or {})


@attrs.define(kw_only=True)
class _Opening:
    writable: bool
    gate: ImplicitOpenGate
    limits: Limits
    lock: bool
    storage_options: Mapping[str, object]
    follow: bool = True
    to_check: bool = False
    writable_depth: int | None = None
    resources: Resources = attrs.field(factory=Resources, init=False)

    async def open(
        self, target: Target, format_name: str | None, options: Mapping[str, Any]
    ) -> FormatAccess:
        if format_name is not None:
            registry().driver(format_name)  # an unknown one is an error before anything is opened
        try:
            storage = await open_storage(
                target, writable=self.writable, lock=self.lock, storage_options=self.storage_options
            )
            self.resources.handles.append(storage)
            return await self.open_storage(storage, format_name, dict(options))
        except BaseException as error:
            if isinstance(error, UnderlayError):
                error.opened = _shown(target)
            await self.resources.close()
            raise

    async def open_storage(
        self, storage: StorageHandle, format_name: str | None, options: dict[str, Any]
    ) -> FormatAccess:
        driver, guard = await self.open_driver(storage, format_name, options)
        return FormatAccess(driver, resources=self.resources, guard=guard)

    async def open_driver(
        self, storage: StorageHandle, format_name: str | None, options: dict[str, Any]
    ) -> tuple[FormatDriverInstance, RawGuard | None]:
        guessed = False
        if format_name is None:
            recognition = await recognise(storage)
            format_name = recognition.require_format(storage.name())
            guessed = recognition.result.guessed
            if self.writable:
                recognition.refuse_writing(storage.name())
        backing = options.pop("backing", FROM_IMAGE)
        data_file = options.pop("data_file", FROM_IMAGE)
        snapshot = options.pop("snapshot", None)
        driver_class = registry().driver(format_name)
        driver = await driver_class.open(
            FormatOpenOptions(
                storage=storage,
                writable=self.writable,
                limits=self.limits,
                snapshot=snapshot,
                to_check=self.to_check,
                options=checked_options(
                    options, driver_class.open_options, what=f"opening {format_name}"
                ),
            )
        )
        self.resources.drivers.append(driver)
        self.limits.check(
            "virtual_size", driver.size(), what=f"The virtual size of '{storage.name()}'"
        )
        if self.follow:
            await self._follow(driver, storage, backing, data_file)
        guard = None
        if guessed and self.writable:
            base = parse_size(options.get("offset") or 0, option="offset")
            guard = RawGuard(storage, base=base, matches=matching_formats)
        return driver, guard

    async def _follow(
        self,
        driver: FormatDriverInstance,
        storage: StorageHandle,
        backing: BackingChoice,
        data_file: DataFileChoice,
    ) -> None:
        resolver = Resolver(
            gate=self.gate,
            limits=self.limits,
            lock=self.lock,
            storage_options=self.storage_options,
            resources=self.resources,
            writable_depth=self.writable_depth,
        )
        await resolver.resolve(driver, storage, backing=backing, data_file=data_file)


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
    ``size`` the disk is as large as its backing image.

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
    announce: Callable[[Mapping[str, object]], None] | None = None,
) -> FormatAccess:
    """``create``; for programs that want to say what is being made, or to open no backing image.

    ``announce`` is told the facts of the new image before anything is written. Without
    ``open_backing`` the new disk has no backing image while it is open.
    """
    limits = limits or DEFAULT_LIMITS
    driver_class = registry().driver(format)
    options = checked_options(options, driver_class.create_options, what=f"creating {format}")
    preallocation = options.pop("preallocation", PreallocateMode.OFF)
    creation = _Creation(
        target=target,
        overwrite=overwrite,
        opening=_Opening(
            writable=True,
            gate=gate or DenyImplicitOpenGate(),
            limits=limits,
            lock=lock,
            storage_options=storage_options or {},
        ),
        open_backing=open_backing,
        preallocation=preallocation,
        announce=announce,
    )
    wanted = FormatCreateOptions(
        storage=None,
        size=0 if size is None else parse_size(size),
        limits=limits,
        options=options,
    )
    try:
        return await creation.run(driver_class, wanted, size_given=size is not None)
    except BaseException:
        await to_the_end(creation.undo())
        raise


@attrs.define(kw_only=True)
class _Creation:
    """Making an image, and what it is made upon."""

    target: Target
    overwrite: bool
    opening: _Opening
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
            if self.open_backing and (found := await self._looks_like(options)) is not None:
                error.add_note(f"Detected format of {found}.")
            raise error
        backing = await self._open_backing(options) if self.open_backing else None
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
        if isinstance(name := wanted.options.get("data_file"), str):
            data_file = await self._make(beside(self.target, name), {})
        await driver_class.create(attrs.evolve(wanted, storage=storage, data_file=data_file))
        attached: dict[str, Any] = {}
        if backing is not None or not self.open_backing:
            attached["backing"] = backing
        if data_file is not None:
            attached["data_file"] = data_file.storage
        return await self.opening.open_storage(storage, driver_class.format_name, attached)

    async def _looks_like(self, options: Mapping[str, object]) -> str | None:
        """What format the image below seems to have: to be told, and not to be relied upon."""
        name = options.get("backing_file")
        if not isinstance(name, str):
            return None
        try:
            return (await probe(beside(self.target, name))).format
        except UnderlayError as error:
            error.add_note("Could not open backing image.")
            raise

    async def _open_backing(self, options: Mapping[str, object]) -> FormatDriverInstance | None:
        """The image that the new one is to lie upon, if the caller names one."""
        name = options.get("backing_file")
        if not isinstance(name, str):
            return None
        below = attrs.evolve(self.opening, writable=False, storage_options={})
        below.resources = self.opening.resources
        format_name = options.get("backing_fmt")
        try:
            storage = await open_storage(beside(self.target, name), lock=below.lock)
            below.resources.handles.append(storage)
            driver, _ = await below.open_driver(storage, cast("str", format_name), {})
        except UnderlayError as error:
            error.add_note("Could not open backing image.")
            raise
        await self._refuse_overwriting(driver)
        return driver

    async def _refuse_overwriting(self, backing: FormatDriverInstance) -> None:
        """The new image must not take the place of one that it is to lie upon."""
        try:
            present = await open_storage(self.target, lock=False)
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
        )
        self.opening.resources.handles.append(storage)
        self._made.append(storage)
        return storage

    async def undo(self) -> None:
        """Remove what is new, and close everything."""
        for storage in self._made:
            await storage.abandon()
        await self.opening.resources.close()


def _shown(target: Target) -> str:
    """What messages call a target."""
    if is_storage(target):
        return cast("AnyStorage", target).name()
    return os.fsdecode(cast("str | os.PathLike[str]", target))


def beside(target: Target, name: str) -> Target:
    """What ``name`` means in an image at ``target``: it is seen from that image's own folder."""
    if is_storage(target):
        return cast("AnyStorage", target).resolve_relative(name)
    if isinstance(target, str) and scheme_of(target) is not None and not os.path.lexists(target):
        if scheme_of(name) is not None or name.startswith("/"):
            return name
        return target[: max(target.rfind("/"), target.find(":")) + 1] + name
    path = os.fsdecode(os.fspath(cast("str | os.PathLike[str]", target)))
    beside = os.path.join(os.path.dirname(path), name)
    # What looks like a URL is none here.
    return beside if scheme_of(beside) is None else os.path.join(os.curdir, beside)


def checked_options(
    given: Mapping[str, Any], known: Mapping[str, OptionSpec], *, what: str
) -> dict[str, object]:
    """The options, each made the type that its ``OptionSpec`` says.

    Raises:
        OptionError: one is unknown or of the wrong type.
    """
    checked: dict[str, object] = {}
    for name, value in given.items():
        spec = known.get(name)
        if spec is None:
            listed = ", ".join(known) or "none"
            raise OptionError(f"Unknown option '{name}' for {what}; known: {listed}", option=name)
        if value is not None:
            checked[name] = _typed(name, value, spec)
    return checked


def _typed(name: str, value: object, spec: OptionSpec) -> object:
    if spec.type == "size" and isinstance(value, int | str):
        return parse_size(value, option=name)
    if spec.type == "int" and not isinstance(value, bool):
        if isinstance(value, int):
            return value
        if isinstance(value, str) and value.isdecimal():
            return int(value)
    if spec.type == "bool":
        if isinstance(value, bool):
            return value
        if value in ("on", "yes", "true", "y"):
            return True
        if value in ("off", "no", "false", "n"):
            return False
    if spec.type == "str":
        return value
    raise OptionError(f"'{value}' is no {spec.type} for the option '{name}'", option=name)
