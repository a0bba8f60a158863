"""``underlay info``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Unpack, cast

import attrs
import click

from underlay.chain import FROM_IMAGE
from underlay.cli import options
from underlay.cli.output import echo, echo_json, human_size, warn
from underlay.cli.problems import CommandError, seen_from_here
from underlay.cli.snapshot_table import snapshot_table
from underlay.errors import StorageError, UnderlayError, printable
from underlay.info import ImageInfo
from underlay.jobs.info import image_info_json, info

__all__ = ["command"]


@options.command("info")
@options.format_option("-f", "--format", "format_name", what="The image's format.")
@options.output_option
@click.option("--backing-chain", is_flag=True, help="Tell of all images below it, too.")
@options.force_share
@options.access_options
@options.names()
def command(
    names: tuple[str, ...],
    *,
    format_name: str | None,
    output: str,
    backing_chain: bool,
    force_share: bool,
    **access: Unpack[options.Access],
) -> int:
    """Tell what an image says of itself.

    Without --backing-chain nothing that the image names is opened.
    """
    name = options.one_name(names)
    try:
        chain = _chain(
            name, format_name, access, force_share=force_share, backing_chain=backing_chain
        )
    except UnderlayError as error:
        if error.opened is not None and not error.images_above:
            error.opened = name
        if error.images_above and isinstance(error, StorageError) and error.errno:
            # Each image of a chain is looked at for itself.
            below = seen_from_here(error.filename or "", name)
            raise CommandError(
                f"Could not open '{below}': Could not open '{below}': {os.strerror(error.errno)}"
            ) from error
        raise
    for image in chain:
        for warning in _warnings(image, locked=not force_share):
            warn(warning)
    if output == "json":
        fields = [image_info_json(image) for image in chain]
        echo_json(fields if backing_chain else fields[0])
    else:
        for number, image in enumerate(chain):
            if number:
                echo("")
            for line in _human(image):
                echo(line)
    return 0


def _chain(
    name: str,
    format_name: str | None,
    access: options.Access,
    *,
    force_share: bool,
    backing_chain: bool,
) -> list[ImageInfo]:
    node = options.block_node(name)
    for child in ("backing", "data_file"):
        if node is not None and getattr(node, child) is not FROM_IMAGE:
            raise CommandError(
                f"Could not open '{name}': Block format '{node.format}' does not support the "
                f"option '{child.replace('_', '-')}.driver'"
            )
    target, opening = options.named(name, format_name, access, force_share=force_share)
    chain = info(target, backing_chain=backing_chain, gate=access["gate"], **opening)
    if node is not None and node.name is not None:
        chain[0] = attrs.evolve(chain[0], filename=node.name)
    return chain


def _warnings(image: ImageInfo, *, locked: bool) -> Iterator[str]:
    for warning in image.description.warnings:
        yield f"'{image.filename}': {warning}"
    if locked and image.storage.get("locked") is False:
        yield (
            f"'{image.filename}': its filesystem has no locks, so that nothing keeps "
            f"two programs from changing it at once"
        )


def _human(image: ImageInfo) -> Iterator[str]:
    """The lines of qemu-img; what comes from the image cannot break out of its line."""
    about = image.description
    yield f"image: {printable(image.filename)}"
    yield f"file format: {image.format}"
    yield f"virtual size: {human_size(image.virtual_size)} ({image.virtual_size} bytes)"
    size = image.actual_size
    yield f"disk size: {'unavailable' if size is None else human_size(size)}"
    if about.encrypted:
        yield "encrypted: yes"
    if about.cluster_size is not None:
        yield f"cluster_size: {about.cluster_size}"
    if about.dirty:
        yield "cleanly shut down: no"
    if about.backing_name is not None:
        full = image.full_backing_name
        where = "" if full in {None, about.backing_name} else f" (actual path: {full})"
        yield printable(f"backing file: {about.backing_name}{where}")
    if about.backing_format is not None:
        yield f"backing file format: {printable(about.backing_format)}"
    if about.snapshots:
        yield "Snapshot list:"
        yield from snapshot_table(about.snapshots)
    if about.details:
        yield "Format specific information:"
        yield from _tree(about.details, 1)


def _tree(value: object, depth: int) -> Iterator[str]:
    """A format's own facts: a line each, what is inside of another one indented below it."""
    if isinstance(value, Mapping):
        facts = cast("Mapping[str, object]", value)
        items = [(name.replace("-", " "), item) for name, item in facts.items()]
    else:
        items = [(f"[{at}]", item) for at, item in enumerate(cast("Sequence[object]", value))]
    for name, item in items:
        start = f"{'    ' * depth}{printable(name)}:"
        if isinstance(item, Mapping | list | tuple):
            yield start
            yield from _tree(cast("object", item), depth + 1)
        elif isinstance(item, bool):
            yield f"{start} {'true' if item else 'false'}"
        else:
            yield f"{start} {printable(str(item))}"
