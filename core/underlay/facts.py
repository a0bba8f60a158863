"""What drivers tell of an image, as plain values.

The capabilities by which a program asks for them are in ``underlay.capabilities``, which has these
names too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from underlay.gate import Reference

__all__ = [
    "Bitmap",
    "CheckResult",
    "DirtyRanges",
    "Feature",
    "Finding",
    "ImageDescription",
    "Inspection",
    "Measurement",
    "Repair",
    "Snapshot",
]


@attrs.frozen(kw_only=True)
class Snapshot:
    """One internal snapshot."""

    id: str
    name: str
    #: The disk's size when it was taken, in bytes.
    disk_size: int
    #: Bytes of saved machine state.
    vm_state_size: int
    #: When it was taken: seconds since the epoch, and nanoseconds beside them.
    date_sec: int
    date_nsec: int
    #: How long the guest had run, in nanoseconds.
    vm_clock_nsec: int
    #: Instructions executed by a deterministic guest, or None.
    icount: int | None = None


@attrs.frozen(kw_only=True)
class Bitmap:
    """One persistent dirty bitmap."""

    name: str
    #: Bytes that one bit stands for.
    granularity: int
    #: Not saved properly: its content must not be used.
    in_use: bool
    #: Recording guest writes.
    auto: bool


@attrs.frozen(kw_only=True)
class DirtyRanges:
    """Some of what a bitmap says: its dirty guest bytes up to ``end``."""

    #: Guest offset and length in bytes, in ascending order.
    ranges: tuple[tuple[int, int], ...]
    #: The guest offset from which to ask on; at the end of the disk, its size.
    end: int
    #: Of the disk that the bitmap is about, in bytes.
    size: int


@attrs.frozen(kw_only=True)
class Feature:
    """A feature that an image declares."""

    name: str
    #: ``"incompatible"``, ``"compatible"`` or ``"autoclear"``.
    kind: str
    bit: int
    #: Whether this driver understands it.
    supported: bool


@attrs.frozen(kw_only=True)
class ImageDescription:
    """What ``info`` tells of an image besides its name, format and sizes."""

    #: Bytes, or None where the format has no clusters.
    cluster_size: int | None = None
    encrypted: bool = False
    compressed: bool = False
    #: Not closed properly; its reference counts may be stale.
    dirty: bool = False
    #: Marked as damaged.
    corrupt: bool = False
    backing_name: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    snapshots: tuple[Snapshot, ...] = ()
    bitmaps: tuple[Bitmap, ...] = ()
    features: tuple[Feature, ...] = ()
    #: One sentence each, for people.
    warnings: tuple[str, ...] = ()
    #: The format's own facts, under the names that qemu-img's JSON has for them.
    details: Mapping[str, object] = attrs.field(factory=dict[str, object])


@attrs.frozen(kw_only=True)
class Inspection:
    """What one untrusted image says of itself, as far as it can be read."""

    #: Bytes; None where it cannot be told.
    virtual_size: int | None = None
    encrypted: bool = False
    features: tuple[Feature, ...] = ()
    #: Every other object that the image names.
    references: tuple[Reference, ...] = ()
    #: What contradicts itself, one sentence each.
    damage: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Finding:
    """One thing that a check found."""

    #: ``"corruption"``, ``"leak"``, ``"error"`` (something could not be checked) or ``"note"``.
    kind: str
    #: What is wrong, in one sentence.
    what: str
    #: The host byte offset that it is about, where it has one.
    offset: int | None = None
    found: int | None = None
    expected: int | None = None
    #: The line that qemu-img prints of it; empty where it prints none.
    line: str = ""


@attrs.frozen(kw_only=True)
class Repair:
    """One change that a repair makes, or with ``dry_run`` would make."""

    #: What is done, in one sentence.
    what: str
    #: The host byte offset that is written.
    offset: int
    before: int | None = None
    after: int | None = None


@attrs.frozen(kw_only=True)
class CheckResult:
    """A check's verdict and counts, named as qemu-img names them."""

    #: The image's format, where a job says it.
    format: str = ""
    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    #: What a repair mended, or with ``dry_run`` would mend.
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    #: Host bytes.
    image_end_offset: int = 0
    #: Of the virtual disk.
    total_clusters: int = 0
    allocated_clusters: int = 0
    #: Allocated clusters that do not lie right behind the one before.
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    #: The first of them; the counts count all.
    findings: tuple[Finding, ...] = ()
    #: How many more findings there were.
    findings_omitted: int = 0
    #: The first changes of a repair, in the order of their being made.
    repairs: tuple[Repair, ...] = ()
    repairs_omitted: int = 0


@attrs.frozen(kw_only=True)
class Measurement:
    """The host bytes that an image of this format would need."""

    #: For the data that there is.
    required: int
    #: When every byte of the disk has been written.
    fully_allocated: int
    #: For the source's bitmaps, beyond the others; None where they cannot be taken over.
    bitmaps: int | None = None
