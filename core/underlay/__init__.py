"""Virtual-disk images: open, probe, inspect, read, map, compare and convert them, safe by default.

::

    import underlay

    with underlay.open_any("disk.qcow2") as disk:
        first_sector = disk.read_bytes(0, 512)

Functions here block; ``underlay.aio`` has awaitable twins. ``underlay.jobs`` works on whole images,
``underlay.testing`` has the contract suites for plug-in authors.
"""

from underlay import aio, capabilities, errors
from underlay.access import FormatAccess
from underlay.blocking import create, inspect, open_any, open_image, probe
from underlay.buffers import aligned_buffer
from underlay.chain import FROM_IMAGE
from underlay.driver import (
    FormatCreateOptions,
    FormatDriverInstance,
    FormatOpenOptions,
    Location,
    OptionSpec,
    WriteTicket,
)
from underlay.errors import (
    AmbiguousFormatError,
    ClosedError,
    ConflictError,
    CorruptImageError,
    ImageInUseError,
    ImplicitOpenDeniedError,
    InvalidImageError,
    LimitExceededError,
    OptionError,
    OutOfRangeError,
    PluginConflictError,
    PluginError,
    ReadOnlyError,
    StorageAccessError,
    StorageChangedError,
    StorageError,
    StorageExistsError,
    StorageNotFoundError,
    UnderlayError,
    UnsupportedFeatureError,
    UnsupportedOperationError,
)
from underlay.fileobj import DiskFile
from underlay.gate import (
    Allow,
    Deny,
    DenyImplicitOpenGate,
    DirectoryGate,
    ImplicitOpenGate,
    ImplicitOpenRequest,
    OpenedObject,
    PermissiveImplicitOpenGate,
    Reference,
    ReferenceKind,
    Substitute,
)
from underlay.handle import StorageHandle
from underlay.hookspecs import hookimpl
from underlay.info import ImageInfo
from underlay.inspection import InspectionReport
from underlay.limits import Limits
from underlay.mapping import Backing, Data, DiskExtent, Eof, Mapping, ShallowMapping, Special, Zero
from underlay.probing import Match, NoMatch, ProbeResult, ProbeView
from underlay.storage import (
    BlockingStorage,
    Extent,
    PreallocateMode,
    Storage,
    StorageCreateOptions,
    StorageOpenOptions,
)
from underlay.sync import SyncFormatAccess

__all__ = [
    "FROM_IMAGE",
    "Allow",
    "AmbiguousFormatError",
    "Backing",
    "BlockingStorage",
    "ClosedError",
    "ConflictError",
    "CorruptImageError",
    "Data",
    "Deny",
    "DenyImplicitOpenGate",
    "DirectoryGate",
    "DiskExtent",
    "DiskFile",
    "Eof",
    "Extent",
    "FormatAccess",
    "FormatCreateOptions",
    "FormatDriverInstance",
    "FormatOpenOptions",
    "ImageInUseError",
    "ImageInfo",
    "ImplicitOpenDeniedError",
    "ImplicitOpenGate",
    "ImplicitOpenRequest",
    "InspectionReport",
    "InvalidImageError",
    "LimitExceededError",
    "Limits",
    "Location",
    "Mapping",
    "Match",
    "NoMatch",
    "OpenedObject",
    "OptionError",
    "OptionSpec",
    "OutOfRangeError",
    "PermissiveImplicitOpenGate",
    "PluginConflictError",
    "PluginError",
    "PreallocateMode",
    "ProbeResult",
    "ProbeView",
    "ReadOnlyError",
    "Reference",
    "ReferenceKind",
    "ShallowMapping",
    "Special",
    "Storage",
    "StorageAccessError",
    "StorageChangedError",
    "StorageCreateOptions",
    "StorageError",
    "StorageExistsError",
    "StorageHandle",
    "StorageNotFoundError",
    "StorageOpenOptions",
    "Substitute",
    "SyncFormatAccess",
    "UnderlayError",
    "UnsupportedFeatureError",
    "UnsupportedOperationError",
    "WriteTicket",
    "Zero",
    "aio",
    "aligned_buffer",
    "capabilities",
    "create",
    "errors",
    "hookimpl",
    "inspect",
    "open_any",
    "open_image",
    "probe",
]
