"""Gates: who decides what an image may make this program open.

An image can name other objects: a backing image, an external data file, extents. None of them is
opened without the word of the gate that the caller gave, and the default gate says no. The gate
decides; the core opens, and asks once more when it knows what was really opened.
"""

from __future__ import annotations

import enum
import os
from abc import abstractmethod
from typing import Protocol, TypeAlias

import attrs

__all__ = [
    "Allow",
    "Deny",
    "DenyImplicitOpenGate",
    "DirectoryGate",
    "GateDecision",
    "ImplicitOpenGate",
    "ImplicitOpenRequest",
    "OpenedObject",
    "PermissiveImplicitOpenGate",
    "Reference",
    "ReferenceKind",
    "Substitute",
]


class ReferenceKind(enum.Enum):
    """What an image needs the object for."""

    BACKING = "backing file"
    DATA_FILE = "data file"
    EXTENT = "extent"


@attrs.frozen(kw_only=True)
class Reference:
    """One object that an image names by itself."""

    kind: ReferenceKind
    #: Exactly as stored; bytes that are no UTF-8 are surrogates
    #: (``name.encode(errors="surrogateescape")``).
    name: str
    #: The format that the image records for it, or None. A data file and an extent are always raw
    #: bytes.
    format: str | None = None
    #: Whether the disk needs to write to it.
    writable: bool = False


@attrs.frozen(kw_only=True)
class ImplicitOpenRequest:
    """What a gate is asked: may this be opened?"""

    reference: Reference
    #: The full name that ``reference.name`` resolves to as a plain name, never as a URL; None where
    #: the naming image's storage has no folders, or the name cannot be a name.
    resolved: str | None
    #: The registered URL scheme that the stored name starts with, or None.
    scheme: str | None
    #: The name of the image that names it.
    image: str
    #: The real folder of that image, symbolic links resolved, where it is a file.
    image_folder: str | None
    #: 1 for what the opened image itself names, 2 for what that one names, …
    depth: int


@attrs.frozen(kw_only=True)
class OpenedObject:
    """What was really opened after a gate allowed it, before a byte of it is used."""

    name: str
    #: The real path behind the open descriptor, or None where the storage has none.
    real_path: str | None


@attrs.frozen
class Allow:
    """Open it."""

    #: Take a name with a registered scheme as a URL; without it every name is a plain name.
    url: bool = False
    #: Probe a backing image whose format is not recorded; without it that is an error.
    probe: bool = False


@attrs.frozen
class Deny:
    """Do not open it."""

    reason: str


@attrs.frozen
class Substitute:
    """Use this instead: a storage, or for a backing image a disk.

    It stays the caller's to close.
    """

    replacement: object


GateDecision: TypeAlias = Allow | Deny | Substitute


class ImplicitOpenGate(Protocol):
    """Decides on every object that an image names by itself. Subclass it by name."""

    __slots__ = ()

    @abstractmethod
    def decide(self, request: ImplicitOpenRequest) -> GateDecision:
        """Allow, deny or replace the object. Called before anything of it is touched."""

    def confirm(self, request: ImplicitOpenRequest, opened: OpenedObject) -> Allow | Deny:
        """Say whether what an ``Allow`` really opened may be used.

        Not asked after a ``Substitute``.
        """
        return Allow()


class DenyImplicitOpenGate(ImplicitOpenGate):
    """Opens nothing but what the caller named. The default everywhere."""

    __slots__ = ()

    def decide(self, request: ImplicitOpenRequest) -> GateDecision:
        return Deny("the image names it, and no gate allows that")

    def __repr__(self) -> str:
        return "DenyImplicitOpenGate()"


class PermissiveImplicitOpenGate(ImplicitOpenGate):
    """Opens whatever an image names, anywhere. Only for images from people you trust.

    With ``probe``, a backing image without a recorded format is probed: whoever can write into that
    image (the guest of a raw disk) then chooses its format, and through it further files.
    """

    __slots__ = ("_probe",)

    def __init__(self, *, probe: bool = False) -> None:
        self._probe = probe

    def decide(self, request: ImplicitOpenRequest) -> GateDecision:
        return Allow(url=True, probe=self._probe)

    def __repr__(self) -> str:
        return f"PermissiveImplicitOpenGate(probe={self._probe})"


class DirectoryGate(ImplicitOpenGate):
    """Opens what really lies in or below given folders; without any, the naming image's own folder.

    Symbolic links are followed before the decision, and the path of what was really opened is
    checked again before a byte of it is read: a link that is swapped in between changes nothing.
    """

    __slots__ = ("_probe", "_roots")

    def __init__(self, *roots: str | os.PathLike[str], probe: bool = False) -> None:
        self._roots = tuple(os.path.realpath(root) for root in roots)
        self._probe = probe

    def decide(self, request: ImplicitOpenRequest) -> GateDecision:
        # Names on other storages ("s3://…", "memory:…") are no paths.
        if request.resolved is None or not os.path.isabs(request.resolved):
            return Deny("its name leads to no file")
        try:
            real_path = os.path.realpath(request.resolved)
        except ValueError:
            return Deny("its name cannot be a path")
        if not self._contains(request, real_path):
            return Deny(f"it lies outside {self._where(request)}")
        return Allow(probe=self._probe)

    def confirm(self, request: ImplicitOpenRequest, opened: OpenedObject) -> Allow | Deny:
        if opened.real_path is None or not self._contains(request, opened.real_path):
            return Deny(f"what was opened lies outside {self._where(request)}")
        return Allow()

    def _folders(self, request: ImplicitOpenRequest) -> tuple[str, ...]:
        if self._roots:
            return self._roots
        return () if request.image_folder is None else (request.image_folder,)

    def _contains(self, request: ImplicitOpenRequest, real_path: str) -> bool:
        # What has no path ("pipe:[1234]") lies in no folder.
        return os.path.isabs(real_path) and any(
            os.path.commonpath((folder, real_path)) == folder for folder in self._folders(request)
        )

    def _where(self, request: ImplicitOpenRequest) -> str:
        return (
            " and ".join(f"'{folder}'" for folder in self._folders(request)) or "any known folder"
        )

    def __repr__(self) -> str:
        return f"DirectoryGate({', '.join([*map(repr, self._roots), f'probe={self._probe}'])})"
