"""Changing what was chosen when an image was created.

All that can be refused is refused before anything is changed. Then one thing changes after the
other, each by one write of the header's first sector, so that a crash leaves an image that has some
of the changes and is sound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import attrs

from underlay.errors import OptionError
from underlay.face import to_the_end
from underlay.steps import Steps, StepsCallback
from underlay.storage import PreallocateMode
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.create import (
    COMPAT,
    check_backing_name,
    check_size,
    feature_names,
    has_names,
)
from underlay_drivers.qcow2.create_options import AMEND_OPTIONS
from underlay_drivers.qcow2.downgrading import check_downgrade, expand_zero_clusters
from underlay_drivers.qcow2.header import Extension, Header
from underlay_drivers.qcow2.snapshots import SnapshotEntry, read_snapshots
from underlay_drivers.qcow2.writeback import HeaderSwitch

if TYPE_CHECKING:
    from underlay.limits import Limits
    from underlay_drivers.qcow2.refcount_width import RefcountWidth
    from underlay_drivers.qcow2.writing import ImageWriter

__all__ = ["Amendment", "amend"]

T = TypeVar("T")

_LEVEL = "compatibility level 1.1"


def _refuse(what: str, option: str) -> OptionError:
    return OptionError(what, option=option)


@attrs.frozen(kw_only=True)
class Amendment:
    """The options, made sense of; None is as it was."""

    version: int | None
    refcount_bits: int | None
    lazy_refcounts: bool | None
    data_file: str | None
    data_file_raw: bool | None
    #: Empty for none.
    backing_file: str | None
    backing_fmt: str | None
    #: Bytes.
    size: int | None

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Amendment:
        """The options as they were given.

        Raises:
            OptionError: a value is impossible whatever the image.
        """
        for name in options:
            if name not in AMEND_OPTIONS:
                known = ", ".join(AMEND_OPTIONS)
                raise _refuse(f"Unknown option '{name}' for amending qcow2; known: {known}", name)
        compat = _given(options, "compat", str)
        if compat is not None and compat not in COMPAT:
            raise _refuse(f"Unknown compatibility level {compat}", "compat")
        bits = _given(options, "refcount_bits", int)
        if bits is not None and bits not in {1 << n for n in range(layout.REFCOUNT_ORDER_MAX + 1)}:
            raise _refuse(
                "Refcount width must be a power of two and may not exceed 64 bits", "refcount_bits"
            )
        size = _given(options, "size", int)
        if size is not None and size < 0:
            raise _refuse("Image size cannot be negative", "size")
        backing_file = _given(options, "backing_file", str)
        backing_fmt = _given(options, "backing_fmt", str) or None
        if backing_file == "" and backing_fmt is not None:
            raise _refuse("Backing format cannot be used without backing file", "backing_fmt")
        if backing_file and backing_fmt is None:
            raise _refuse("Backing file specified without backing format", "backing_fmt")
        return cls(
            version=None if compat is None else COMPAT[compat],
            refcount_bits=bits,
            lazy_refcounts=_given(options, "lazy_refcounts", bool),
            data_file=_given(options, "data_file", str),
            data_file_raw=_given(options, "data_file_raw", bool),
            backing_file=backing_file,
            backing_fmt=backing_fmt,
            size=size,
        )

    def check(self, header: Header) -> None:
        """Refuse what this image cannot become, as far as its header tells.

        Raises:
            OptionError: a value, or a combination of values, is impossible.
            LimitExceededError: the names are too long for the first cluster.
        """
        version = self.version or header.version
        bits = self.refcount_bits or header.refcount_bits
        raw = self.data_file_raw
        if raw and not header.autoclear_features & layout.RAW_EXTERNAL_DATA:
            raise _refuse("data-file-raw cannot be set on existing images", "data_file_raw")
        if self.data_file is not None and not header.external_data_file:
            raise _refuse(
                "data-file can only be set for images that use an external data file", "data_file"
            )
        if version == 2:  # noqa: PLR2004 (a version is its own best name)
            self._check_version_2(header, bits)
        self._check_backing(header)
        if self.size is not None:
            check_size(self.size, cluster_size=header.cluster_size, extended_l2=header.extended_l2)
        self.target(header).to_bytes()

    def _check_version_2(self, header: Header, bits: int) -> None:
        if bits != header.refcount_bits and bits != 1 << layout.REFCOUNT_ORDER_V2:
            raise _refuse(
                f"Refcount widths other than 16 bits require {_LEVEL} or above "
                "(use compat=1.1 or greater)",
                "refcount_bits",
            )
        if self.lazy_refcounts:
            raise _refuse(
                f"Lazy refcounts only supported with {_LEVEL} and above (use compat=1.1 or "
                "greater)",
                "lazy_refcounts",
            )
        if header.version > 2:  # noqa: PLR2004
            check_downgrade(header, refcount_bits=bits)

    def _check_backing(self, header: Header) -> None:
        if self.backing_fmt is not None and not (self.backing_file or header.backing_name):
            raise _refuse("Backing format cannot be used without backing file", "backing_fmt")
        check_backing_name(self.backing_file or "", self.backing_fmt or "")
        raw = (
            header.autoclear_features & layout.RAW_EXTERNAL_DATA and self.data_file_raw is not False
        )
        if self.backing_file and raw:
            raise _refuse(
                "Backing file and data-file-raw cannot be used at the same time", "backing_file"
            )

    def target(self, header: Header) -> Header:
        """``header`` with the names, and the newer version, that it is to have first of all."""
        if self.version == 3 and header.version == 2:  # noqa: PLR2004
            header = upgraded(header)
        extensions = list(header.extensions)
        name = header.backing_name
        if self.backing_file is not None:
            name = _stored(self.backing_file)
        if self.backing_file is not None or self.backing_fmt is not None:
            data = None if self.backing_fmt is None else _stored(self.backing_fmt)
            _put(extensions, layout.EXTENSION_BACKING_FORMAT, data, first=0)
        if self.data_file is not None:
            data = _stored(self.data_file) or None
            after = bool(extensions) and extensions[0].type == layout.EXTENSION_BACKING_FORMAT
            _put(extensions, layout.EXTENSION_DATA_FILE, data, first=int(after))
        return attrs.evolve(header, backing_name=name, extensions=tuple(extensions))

    def flags(self, header: Header) -> Header:
        """``header`` with the feature bits that it is to have."""
        compatible, autoclear = header.compatible_features, header.autoclear_features
        if self.lazy_refcounts is not None:
            compatible &= ~layout.LAZY_REFCOUNTS
            compatible |= layout.LAZY_REFCOUNTS if self.lazy_refcounts else 0
        if self.data_file_raw is False:
            autoclear &= ~layout.RAW_EXTERNAL_DATA
        return attrs.evolve(header, compatible_features=compatible, autoclear_features=autoclear)


async def amend(
    writer: ImageWriter,
    amendment: Amendment,
    limits: Limits,
    progress: StepsCallback | None = None,
) -> None:
    """See ``Amendable.amend``. ``progress`` counts the disk's tables, once for each change.

    Raises:
        OptionError: a value is impossible for this image, as it says; nothing was changed.
        LimitExceededError: something does not fit; nothing was changed.
    """
    disk = writer.disk
    amendment.check(disk.header)
    await writer.survey()
    size = disk.size() if amendment.size is None else amendment.size
    limits.check("virtual_size", size, what=f"'{disk.image.name()}': the virtual size")
    downgrades = amendment.version == 2 and disk.header.version > 2  # noqa: PLR2004
    share = max(disk.header.l1_size, 1)
    steps = Steps(progress, share)
    steps.expect(share * ((size != disk.size()) + downgrades))
    async with writer.alone():
        entries = await read_snapshots(disk.image, disk.header, limits)
        if downgrades:
            _check_snapshots(entries, size)
        width = _new_width(writer, amendment, limits)
        if width is not None:
            steps.expect(2 * share)
            await width.check(steps.phase(share))
        if amendment.target(disk.header).version > disk.header.version:
            await _complete_snapshots(writer, entries)
        await _switch(writer, amendment.target)
        if width is not None:
            await width.change(steps.phase(share))
        await _switch(writer, amendment.flags)
    if size > disk.size():
        await disk.resize_grow(size, PreallocateMode.OFF, steps.part(share))
    elif size < disk.size():
        await disk.resize_shrink(size, steps.part(share))
    if downgrades:
        async with writer.alone():
            await expand_zero_clusters(writer, limits, steps.phase(share))
            await _switch(writer, downgraded)
    steps.end()


def _new_width(writer: ImageWriter, amendment: Amendment, limits: Limits) -> RefcountWidth | None:
    bits = amendment.refcount_bits
    if bits is None or bits == writer.disk.header.refcount_bits:
        return None
    from underlay_drivers.qcow2.refcount_width import RefcountWidth

    return RefcountWidth(writer, bits, limits)


async def _switch(writer: ImageWriter, change: Callable[[Header], Header]) -> None:
    """Let the header be another, if it is."""
    if change(writer.disk.header) != writer.disk.header:
        await writer.back.switch_header(HeaderSwitch(change=change))


async def _complete_snapshots(writer: ImageWriter, entries: tuple[SnapshotEntry, ...]) -> None:
    """Let all snapshots have what version 3 demands of them, before it is said to be that."""
    disk, back = writer.disk, writer.back
    wanted = tuple(entry.completed(disk.size()) for entry in entries)
    if wanted == entries:
        return
    data = b"".join(entry.pack() for entry in wanted)
    clusters = writer.clusters(len(data))
    async with back.lock:
        offset = await writer.allocator.allocate_exactly(clusters)
        writer.claim_metadata(offset, clusters)
    try:
        await back.flush()
        await disk.image.write(data, offset)
    except BaseException:
        if not back.broken:
            await to_the_end(writer.give_back_metadata(offset, clusters))
        raise

    old_bytes = sum(len(entry.pack()) for entry in entries)
    await back.switch_header(
        HeaderSwitch(
            change=lambda header: attrs.evolve(header, snapshots_offset=offset),
            freed=[(disk.header.snapshots_offset, writer.clusters(old_bytes))],
        )
    )


def _check_snapshots(entries: tuple[SnapshotEntry, ...], size: int) -> None:
    """Refuse snapshots that version 2 cannot describe."""
    for entry in entries:
        if entry.disk_size not in {None, size} or entry.vm_state_size >> 32:
            raise _refuse("Internal snapshots prevent downgrade of image", "compat")


def upgraded(header: Header) -> Header:
    """``header`` as one of version 3."""
    extensions = header.extensions
    if has_names(header.cluster_size) and header.extension(layout.EXTENSION_FEATURE_NAMES) is None:
        # Where QEMU puts it: behind the backing file's format.
        place = int(bool(extensions) and extensions[0].type == layout.EXTENSION_BACKING_FORMAT)
        names = Extension(layout.EXTENSION_FEATURE_NAMES, feature_names())
        extensions = (*extensions[:place], names, *extensions[place:])
    additional = bytes(8)
    return attrs.evolve(
        header,
        version=3,
        header_length=layout.HEADER_V3_LENGTH + len(additional),
        additional=additional,
        extensions=extensions,
    )


def downgraded(header: Header) -> Header:
    """``header`` as one of version 2, of an image that has nothing that this cannot have."""
    return attrs.evolve(
        header,
        version=2,
        header_length=layout.HEADER_V2_LENGTH,
        additional=b"",
        incompatible_features=0,
        compatible_features=0,
        autoclear_features=0,
        extensions=tuple(
            extension
            for extension in header.extensions
            if extension.type != layout.EXTENSION_FEATURE_NAMES
        ),
    )


def _given(options: Mapping[str, object], name: str, kind: type[T]) -> T | None:
    value = options.get(name)
    if value is None:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _refuse(f"{value!r} is no {kind.__name__} for the option '{name}'", name)
    return value


def _put(extensions: list[Extension], kind: int, data: bytes | None, *, first: int) -> None:
    """Replace an extension where it stands, add it at ``first``, or remove it."""
    at = next((n for n, extension in enumerate(extensions) if extension.type == kind), None)
    if at is not None:
        extensions[at : at + 1] = [] if data is None else [Extension(kind, data)]
    elif data is not None:
        extensions.insert(first, Extension(kind, data))


def _stored(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
