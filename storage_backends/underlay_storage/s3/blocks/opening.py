"""Ways to a disk: its client, taking it over, making it, and what it cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from underlay.errors import (
    StorageChangedError,
    StorageExistsError,
    StorageNotFoundError,
    UnsupportedOperationError,
)
from underlay.storage import PreallocateMode
from underlay_storage.s3.blocks.layout import Root, largest_size, new_writer
from underlay_storage.s3.blocks.objects import Objects, Published
from underlay_storage.s3.client import ObjectClient
from underlay_storage.s3.conditions import require_conditions
from underlay_storage.s3.location import locate
from underlay_storage.s3.settings import Settings

__all__ = ["begin", "check_length", "connect", "objects_of", "refuse_reserving", "take_over"]

#: How often taking over is tried while others do the same.
_TRIES: Final = 5


def connect(name: str, options: Mapping[str, object]) -> tuple[ObjectClient, str]:
    """The client and the prefix that a URL and its options stand for; nothing is sent yet."""
    location = locate(name)
    return ObjectClient.connect(location, Settings.read(options)), location.key


def objects_of(client: ObjectClient, prefix: str, *, writable: bool) -> Objects:
    """The objects of a disk.

    Raises:
        UnsupportedOperationError: it is to be writable, and the server cannot keep writers apart.
    """
    objects = Objects(client, prefix, conditional=not client.settings.single_writer)
    if writable:
        require_conditions(client, f"{prefix}/root")
    return objects


def take_over(objects: Objects) -> Published:
    """The root, with this writer in it: from now on, nobody else's takes its place."""
    for again in range(_TRIES):
        found = objects.read_root()
        root = attrs.evolve(found.root, generation=found.root.generation + 1, writer=new_writer())
        try:
            return objects.replace_root(root, found.etag)
        except StorageChangedError:
            if again == _TRIES - 1:
                raise
    raise AssertionError("unreachable")


def begin(objects: Objects, root: Root, *, overwrite: bool) -> tuple[Published, bool]:
    """The first root of a disk, and whether there was none before."""
    for again in range(_TRIES):
        try:
            return objects.create_root(root), True
        except StorageExistsError:
            if not overwrite:
                raise
        try:
            generation, etag = objects.root_facts()
            root = attrs.evolve(root, generation=generation + 1)
            return objects.replace_root(root, etag), False
        except (StorageNotFoundError, StorageChangedError):
            if again == _TRIES - 1:
                raise
    raise AssertionError("unreachable")


def check_length(objects: Objects, size: int, block_size: int) -> None:
    """Refuse a length that the disk cannot have.

    Raises:
        UnsupportedOperationError: its root would get too large.
    """
    most = largest_size(block_size)
    if size > most:
        raise UnsupportedOperationError(
            f"'{objects}' has blocks of {block_size} bytes and can be {most} bytes long, not "
            f"{size}; create it with a larger block_size"
        )


def refuse_reserving(objects: Objects, preallocation: PreallocateMode) -> None:
    """Refuse to reserve space for bytes that are not there.

    Raises:
        UnsupportedOperationError: the mode would reserve some.
    """
    if preallocation.reserves:
        raise UnsupportedOperationError(
            f"'{objects}': a bucket reserves no space; leave preallocation away, or say metadata "
            "where the format has that"
        )
