"""Opening disks, as coroutines of either face.

``underlay`` offers these on the blocking face, ``underlay.aio`` on the asynchronous one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

import attrs

from underlay.access import FormatAccess, Resources
from underlay.chain import FROM_IMAGE, BackingChoice, DataFileChoice, Resolver, WrittenBelow
from underlay.driver import FormatDriverInstance, FormatOpenOptions
from underlay.errors import UnderlayError
from underlay.gate import DenyImplicitOpenGate, ImplicitOpenGate
from underlay.guard import GuardedHandle
from underlay.handle import StorageHandle
from underlay.limits import DEFAULT_LIMITS, Limits
from underlay.option_values import checked_options
from underlay.plugins import registry
from underlay.probing import ProbeResult
from underlay.recognition import Guess, matching_formats, recognise, tell_guess
from underlay.storage import AnyStorage, is_storage
from underlay.targets import Target, open_storage, options_for

__all__ = [
    "Opening",
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
    opening = Opening(
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
    opening = Opening(
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
    opening = Opening(
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
    written: WrittenBelow,
    writable: bool = True,
    format: str | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    format_options: Mapping[str, object] | None = None,
) -> FormatAccess:
    """Open a disk, ``writable``, and for writing those images below it that are to be ``written``.

    The gate is asked for these as references that are ``writable``; they must be of a recorded
    format. The disk flushes and syncs them too when it is closed. Raises as ``open_any`` does.
    """
    opening = Opening(
        writable=writable,
        gate=gate or DenyImplicitOpenGate(),
        limits=limits or DEFAULT_LIMITS,
        lock=lock,
        storage_options=storage_options or {},
        written=written,
    )
    return await opening.open(target, format, format_options or {})


@attrs.define(kw_only=True)
class Opening:
    """How a disk is opened, and what is open for it already."""

    writable: bool
    gate: ImplicitOpenGate
    limits: Limits
    lock: bool
    storage_options: Mapping[str, object]
    follow: bool = True
    to_check: bool = False
    written: WrittenBelow | None = None
    resources: Resources = attrs.field(factory=Resources, init=False)
    #: Of a data file that the caller names.
    data_file_options: Mapping[str, object] = attrs.field(factory=dict[str, object], init=False)

    async def open(
        self, target: Target, format_name: str | None, options: Mapping[str, Any]
    ) -> FormatAccess:
        if format_name is not None:
            registry().driver(format_name)  # an unknown one is an error before anything is opened
        try:
            told = options_for((target, options.get("data_file")), self.storage_options)
            self.storage_options, self.data_file_options = told
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
        driver = await self.open_driver(storage, format_name, options)
        return FormatAccess(driver, resources=self.resources)

    async def open_driver(
        self, storage: StorageHandle, format_name: str | None, options: dict[str, Any]
    ) -> FormatDriverInstance:
        if format_name is None:
            recognition = await recognise(storage)
            format_name = recognition.require_format(storage.name())
            if recognition.result.guessed:
                name, foreign = storage.name(), recognition.foreign
                if self.writable:
                    recognition.refuse_writing(name)
                    storage = self._guarded(storage)
                tell_guess(Guess(name=name, writable=self.writable, foreign=foreign))
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
        return driver

    def _guarded(self, storage: StorageHandle) -> StorageHandle:
        """The handle for a guess that is to be written, in place of ``storage``."""
        guarded = GuardedHandle(storage, matches=matching_formats)
        handles = self.resources.handles
        handles[:] = [guarded if handle is storage else handle for handle in handles]
        return guarded

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
            data_file_options=self.data_file_options,
            resources=self.resources,
            written=self.written,
        )
        await resolver.resolve(driver, storage, backing=backing, data_file=data_file)


def _shown(target: Target) -> str:
    """What messages call a target."""
    if is_storage(target):
        return cast("AnyStorage", target).name()
    return os.fsdecode(cast("str | os.PathLike[str]", target))
