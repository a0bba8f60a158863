"""Resolving what an image names: through the gate, in a loop, with a cap and without cycles."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Hashable, Mapping
from typing import Final, Literal, TypeAlias, cast

import attrs

from underlay.access import FormatAccess, Resources
from underlay.driver import FormatDriverInstance, FormatOpenOptions
from underlay.errors import (
    ImageInUseError,
    ImplicitOpenDeniedError,
    InvalidImageError,
    ReadOnlyError,
    StorageError,
    UnderlayError,
    UnsupportedOperationError,
    printable,
)
from underlay.gate import (
    Allow,
    Deny,
    ImplicitOpenGate,
    ImplicitOpenRequest,
    OpenedObject,
    Reference,
    ReferenceKind,
    Substitute,
)
from underlay.handle import StorageHandle
from underlay.limits import Limits
from underlay.plugins import registry
from underlay.recognition import recognise
from underlay.storage import AnyStorage, StorageOpenOptions, is_storage
from underlay.sync import SyncFormatAccess
from underlay.targets import Target, open_storage, open_with, scheme_of

__all__ = [
    "FROM_IMAGE",
    "BackingChoice",
    "DataFileChoice",
    "FromImage",
    "Resolver",
    "WrittenBelow",
]


class FromImage(enum.Enum):
    """The type of ``FROM_IMAGE``."""

    FROM_IMAGE = "whatever the image names, if the gate allows it"

    def __repr__(self) -> str:
        return "FROM_IMAGE"


#: Use what the image names, if the gate allows it.
FROM_IMAGE: Final = FromImage.FROM_IMAGE

BackingChoice: TypeAlias = (
    "Literal[FromImage.FROM_IMAGE] | FormatAccess | SyncFormatAccess | FormatDriverInstance | None"
)
#: Whether an image below is opened for writing: told the storage of the image that names it, how
#: that names it, and how many images below the opened one it lies (from 1).
WrittenBelow: TypeAlias = Callable[[StorageHandle, Reference, int], bool]
DataFileChoice: TypeAlias = "Literal[FromImage.FROM_IMAGE] | Target | None"


@attrs.define
class _Layer:
    driver: FormatDriverInstance
    storage: StorageHandle
    depth: int


@attrs.define(kw_only=True)
class Resolver:
    """Opens what the images of one chain name, and records it in ``resources``."""

    gate: ImplicitOpenGate
    limits: Limits
    lock: bool
    storage_options: Mapping[str, object]
    resources: Resources
    #: Storage options of a data file that the caller names.
    data_file_options: Mapping[str, object] = attrs.field(factory=dict[str, object])
    #: Which images below the opened one are opened for writing too.
    written: WrittenBelow | None = None
    _identities: set[Hashable] = attrs.field(factory=set[Hashable], init=False)
    _top: str = attrs.field(default="?", init=False)

    async def resolve(
        self,
        driver: FormatDriverInstance,
        storage: StorageHandle,
        *,
        backing: BackingChoice = FROM_IMAGE,
        data_file: DataFileChoice = FROM_IMAGE,
    ) -> None:
        """Attach everything that ``driver`` and the images below it name.

        The caller's own ``backing`` and ``data_file`` are for the top image, and pass no gate.
        """
        self._remember(storage)
        self._top = storage.name()
        await self._attach_given(driver, backing, data_file)
        layer: _Layer | None = _Layer(driver, storage, 1)
        while layer is not None:
            below: _Layer | None = None
            for reference in driver_references(layer.driver):
                is_backing = reference.kind is ReferenceKind.BACKING
                if is_backing:
                    what = f"The depth of the chain of '{self._top}'"
                    self.limits.check("chain_depth", layer.depth + 1, what=what)
                try:
                    if is_backing:
                        below = await self._backing(layer, reference) or below
                    else:
                        layer.driver.attach(reference, await self._object(layer, reference))
                except UnderlayError as error:
                    error.images_above = layer.depth if is_backing else layer.depth - 1
                    raise
            layer = below

    async def _attach_given(
        self, driver: FormatDriverInstance, backing: BackingChoice, data_file: DataFileChoice
    ) -> None:
        for reference in driver_references(driver):
            if reference.kind is ReferenceKind.BACKING and backing is not FROM_IMAGE:
                driver.attach(reference, self._given_disk(backing))
                backing = FROM_IMAGE
            elif reference.kind is ReferenceKind.DATA_FILE and data_file is not FROM_IMAGE:
                driver.attach(reference, await self._given_file(reference, data_file))
                data_file = FROM_IMAGE
        if backing is not FROM_IMAGE and backing is not None:
            # The image names none; a disk that the caller gives shows through all the same.
            driver.attach(Reference(kind=ReferenceKind.BACKING, name=""), self._given_disk(backing))
        if data_file is not FROM_IMAGE and data_file is not None:
            reference = Reference(kind=ReferenceKind.DATA_FILE, name="", writable=driver.writable())
            driver.attach(reference, await self._given_file(reference, data_file))

    def _given_disk(self, disk: object) -> FormatDriverInstance | None:
        """The driver of a disk that somebody else opened, and closes."""
        if isinstance(disk, FormatAccess | SyncFormatAccess):
            self.resources.lent.append(disk.awaitable())
        return as_driver(disk)

    async def _given_file(
        self, reference: Reference, target: Target | None
    ) -> StorageHandle | None:
        if target is None:
            return None
        handle = await open_storage(
            target,
            writable=reference.writable,
            lock=self.lock,
            storage_options=self.data_file_options,
        )
        self.resources.handles.append(handle)
        return handle

    async def _backing(self, layer: _Layer, reference: Reference) -> _Layer | None:
        """Open and attach a backing image; the layer it makes, unless somebody else made it."""
        written = self.written
        writable = written is not None and written(layer.storage, reference, layer.depth)
        found = await self._ask(layer, attrs.evolve(reference, writable=writable))
        if not isinstance(found, _Opened):
            layer.driver.attach(reference, self._given_disk(found))
            return None
        if writable and not found.handle.writable():
            raise ReadOnlyError(f"{found.handle.name()}: the given backing file is read-only")
        self._remember(found.handle)
        format_name = reference.format
        if format_name is None:
            if writable:
                raise InvalidImageError(
                    f"'{layer.storage.name()}' records no format for its backing file "
                    f"'{quotable(reference.name)}', which is to be written; record one "
                    "(qemu-img rebase -u -F)"
                )
            format_name = (await recognise(found.handle)).require_format(found.handle.name())
        driver = (
            await registry()
            .driver(format_name)
            .open(FormatOpenOptions(storage=found.handle, limits=self.limits, writable=writable))
        )
        self.resources.drivers.append(driver)
        self.limits.check(
            "virtual_size", driver.size(), what=f"The virtual size of '{found.handle.name()}'"
        )
        layer.driver.attach(reference, driver)
        return _Layer(driver, found.handle, layer.depth + 1)

    async def _object(self, layer: _Layer, reference: Reference) -> StorageHandle:
        """Open a data file or an extent."""
        found = await self._ask(layer, reference)
        if not isinstance(found, _Opened):
            raise TypeError(f"A gate must substitute a storage for a {reference.kind.value}")
        identity = found.handle.identity()
        if identity is not None and identity == layer.storage.identity():
            raise InvalidImageError(
                f"'{layer.storage.name()}' names itself as its {reference.kind.value}"
            )
        if reference.writable and not found.handle.writable():
            raise ReadOnlyError(
                f"{found.handle.name()}: the given {reference.kind.value} is read-only"
            )
        return found.handle

    async def _ask(self, layer: _Layer, reference: Reference) -> object:
        """Ask the gate, and open what it allows; or the disk that it gave in place of that."""
        request = self._request(layer, reference)
        decision = self.gate.decide(request)
        if isinstance(decision, Deny):
            raise denied(request, decision.reason)
        if isinstance(decision, Substitute):
            if not is_storage(decision.replacement):
                return decision.replacement
            _check_format(request, Allow())
            handle = StorageHandle(cast("AnyStorage", decision.replacement), owned=False)
            self.resources.handles.append(handle)
            return _Opened(handle)
        if not isinstance(decision, Allow):
            raise TypeError(f"A gate answers with Allow, Deny or Substitute, not {decision!r}")
        if not reference.name:
            raise InvalidImageError(
                f"'{request.image}' needs a {reference.kind.value} and does not name it; give one "
                "when opening it"
            )
        _check_format(request, decision)
        handle = await self._open(layer, request, decision)
        self.resources.handles.append(handle)
        verdict = self.gate.confirm(
            request, OpenedObject(name=handle.name(), real_path=handle.real_path())
        )
        if isinstance(verdict, Deny):
            raise denied(request, verdict.reason)
        if not isinstance(verdict, Allow):
            raise TypeError(f"A gate confirms with Allow or Deny, not {verdict!r}")
        return _Opened(handle)

    def _request(self, layer: _Layer, reference: Reference) -> ImplicitOpenRequest:
        try:
            resolved = layer.storage.resolve_relative(reference.name)
        except (UnderlayError, ValueError):
            resolved = None
        folder = layer.storage.real_path()
        return ImplicitOpenRequest(
            reference=reference,
            resolved=resolved,
            scheme=scheme_of(reference.name),
            image=layer.storage.name(),
            image_folder=None if folder is None else os.path.dirname(folder),
            depth=layer.depth,
        )

    async def _open(
        self, layer: _Layer, request: ImplicitOpenRequest, allow: Allow
    ) -> StorageHandle:
        reference = request.reference
        if allow.url and request.scheme is not None:
            backend, name = registry().backend(request.scheme), reference.name
        elif request.resolved is not None:
            backend, name = type(layer.storage.storage), request.resolved
        else:
            raise UnsupportedOperationError(
                f"'{request.image}' names the {reference.kind.value} "
                f"'{quotable(reference.name)}', which leads nowhere from there"
            )
        # What was said of one server is not told another: it may be a secret.
        schemes = {scheme_of(name), scheme_of(layer.storage.name())} - {None}
        same = backend is type(layer.storage.storage) and len(schemes) <= 1
        try:
            return await open_with(
                backend,
                StorageOpenOptions(
                    name=name,
                    writable=reference.writable,
                    lock=self.lock,
                    options=self.storage_options if same else {},
                ),
            )
        except (ImageInUseError, StorageError) as error:
            kind = reference.kind.value
            error.whose = f"the {kind} '{quotable(reference.name)}' of '{request.image}'"
            raise

    def _remember(self, handle: StorageHandle) -> None:
        identity: Hashable = handle.identity()
        if identity is None:
            identity = ("handle", id(handle))
        if identity in self._identities:
            raise InvalidImageError(
                f"The chain of '{self._top}' loops: '{handle.name()}' is in it already"
            )
        self._identities.add(identity)


@attrs.frozen
class _Opened:
    handle: StorageHandle


def _check_format(request: ImplicitOpenRequest, allow: Allow) -> None:
    """Refuse what could not be used once it was open, before it is opened."""
    reference = request.reference
    if reference.kind is not ReferenceKind.BACKING:
        return
    if reference.format is not None:
        registry().driver(reference.format)
    elif not allow.probe:
        raise InvalidImageError(
            f"'{request.image}' records no format for its backing file "
            f"'{quotable(reference.name)}'; "
            f"record one (qemu-img rebase -u -F), or pass a gate made with probe=True"
        )


def driver_references(driver: FormatDriverInstance) -> list[Reference]:
    """What a driver still needs, data files before backing images."""
    return sorted(driver.references(), key=lambda ref: ref.kind is ReferenceKind.BACKING)


def as_driver(disk: object) -> FormatDriverInstance | None:
    """The driver of a disk of either face, for use as a backing image."""
    if disk is None:
        return None
    if isinstance(disk, FormatAccess | SyncFormatAccess):
        return disk.inner
    if FormatDriverInstance in type(disk).__mro__:
        return cast("FormatDriverInstance", disk)
    raise TypeError(f"an open disk was expected as backing image, not {type(disk).__name__}")


def quotable(name: str) -> str:
    """A stored name for use between quotes in a message."""
    return printable(name).replace("'", "\\'")


def denied(request: ImplicitOpenRequest, reason: str) -> ImplicitOpenDeniedError:
    """The error for a gate's no; it says how to say yes."""
    reference = request.reference
    return ImplicitOpenDeniedError(
        f"'{request.image}' names the {reference.kind.value} '{quotable(reference.name)}', which "
        f"was not opened: {reason}. To allow it pass gate=DirectoryGate() (files in or below the "
        f"image's folder) or gate=PermissiveImplicitOpenGate() (anything)",
        request=request,
        reason=reason,
    )
