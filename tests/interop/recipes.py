"""What an image of the matrix is made of: plain values, each standing for one act of QEMU's tools.

``building`` carries them out. Offsets and lengths are guest bytes.
"""

from __future__ import annotations

from typing import TypeAlias

import attrs

__all__ = [
    "DISK",
    "Copied",
    "Crash",
    "Extension",
    "Io",
    "KiB",
    "MiB",
    "Op",
    "Patch",
    "Recipe",
    "Step",
    "Tool",
    "Truncate",
    "WiderHeader",
    "amend",
    "bitmap",
    "compressed",
    "crash",
    "discard",
    "fill",
    "forget",
    "machine_state",
    "noise",
    "rebase",
    "resize",
    "revert",
    "run",
    "snapshot",
    "text",
    "tool",
    "unmap",
    "zero",
]

KiB = 1 << 10
MiB = 1 << 20

#: Stands in a command for the image that is being made.
DISK = "@disk"


@attrs.frozen
class Op:
    """One command of qemu-io on a range of the disk."""

    verb: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.verb} {self.offset} {self.length}"


def fill(pattern: int, offset: int, length: int) -> Op:
    """Write one byte value."""
    return Op(f"write -P {pattern}", offset, length)


def noise(seed: int, offset: int, length: int) -> Op:
    """Write what cannot be compressed, and is different at every offset."""
    return Op(f"write -s ../noise-{seed % 8}", offset, length)


def text(seed: int, offset: int, length: int) -> Op:
    """Write what compresses well, and is different at every offset."""
    return Op(f"write -s ../text-{seed % 8}", offset, length)


def compressed(kind: str, offset: int, length: int) -> Op:
    """Write whole clusters compressed; ``kind`` is ``text-N`` or ``noise-N``."""
    return Op(f"write -c -s ../{kind}", offset, length)


def zero(offset: int, length: int) -> Op:
    """Write zeroes, keeping the clusters."""
    return Op("write -z", offset, length)


def unmap(offset: int, length: int) -> Op:
    """Write zeroes, giving the clusters back."""
    return Op("write -z -u", offset, length)


def discard(offset: int, length: int) -> Op:
    """Discard, passed through to the image."""
    return Op("discard", offset, length)


def machine_state(pattern: int, offset: int, length: int) -> Op:
    """Write behind the end of the disk, where a machine's state is kept."""
    return Op(f"write -b -P {pattern}", offset, length)


@attrs.frozen
class Io:
    """One run of qemu-io; every command must succeed."""

    ops: tuple[Op, ...]


@attrs.frozen
class Crash:
    """One run of qemu-io that ends in an abort, after a flush or without."""

    ops: tuple[Op, ...]
    flush: bool


@attrs.frozen
class Tool:
    """One run of qemu-img."""

    arguments: tuple[str, ...]


@attrs.frozen
class Patch:
    """Put a big-endian number (``struct`` format) at a host offset, or or it to what is there."""

    offset: int
    format: str
    value: int
    merge: bool = False


@attrs.frozen
class Extension:
    """Add a header extension behind the others."""

    type: int
    data: bytes


@attrs.frozen
class WiderHeader:
    """Give a version 3 header further fields, as a later version of the format would."""

    fields: bytes


@attrs.frozen
class Truncate:
    """Cut or grow the host file."""

    size: int


Step: TypeAlias = Io | Crash | Tool | Patch | Extension | WiderHeader | Truncate


def run(*ops: Op) -> Io:
    """Do all this in one run of qemu-io."""
    return Io(ops)


def crash(*ops: Op, flush: bool) -> Crash:
    """Do all this, and die."""
    return Crash(ops, flush)


def tool(*arguments: str) -> Tool:
    """Run qemu-img."""
    return Tool(arguments)


def snapshot(name: str) -> Tool:
    """Take an internal snapshot."""
    return tool("snapshot", "-c", name, DISK)


def revert(name: str) -> Tool:
    """Go back to an internal snapshot."""
    return tool("snapshot", "-a", name, DISK)


def forget(name: str) -> Tool:
    """Delete an internal snapshot."""
    return tool("snapshot", "-d", name, DISK)


def resize(size: int) -> Tool:
    """Grow or shrink the disk."""
    return tool("resize", "-f", "qcow2", "-q", "--shrink", DISK, str(size))


def amend(options: str) -> Tool:
    """Change what was chosen at the creation."""
    return tool("amend", "-f", "qcow2", "-o", options, DISK)


def bitmap(*arguments: str) -> Tool:
    """Work on a dirty bitmap: ``bitmap("--add", "name")``."""
    *flags, name = arguments
    return tool("bitmap", *flags, DISK, name)


def rebase(backing: str, *flags: str) -> Tool:
    """Change the backing file (``""``: none)."""
    chosen = ("-b", backing, "-F", "qcow2") if backing else ("-b", "")
    return tool("rebase", *flags, *chosen, DISK)


@attrs.frozen(kw_only=True)
class Copied:
    """The image is what ``qemu-img convert`` makes of another one."""

    source: Recipe
    arguments: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Recipe:
    """One image, and all that belongs to it."""

    #: Unique in the matrix; the file's name for a backing image.
    name: str
    #: Bytes, at its creation.
    size: int
    #: As after ``-o``.
    options: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    backing: Recipe | None = None
    #: Further images in the same folder, which the steps name.
    beside: tuple[Recipe, ...] = ()
    copied: Copied | None = None
    format: str = "qcow2"
    #: The exit codes of ``qemu-img check`` that are as they should be.
    check: tuple[int, ...] = (0,)

    @property
    def chain(self) -> tuple[Recipe, ...]:
        """This one and what backs it as created, the top first."""
        return (self, *(self.backing.chain if self.backing else ()))

    @property
    def has_data_file(self) -> bool:
        """Whether the guest's bytes are in a file of their own."""
        return any(option.startswith("data_file=") for option in self.options)

    @property
    def has_snapshots(self) -> bool:
        """Whether internal snapshots were taken of it."""
        commands = [step.arguments for step in self.steps if isinstance(step, Tool)]
        return any(command[:2] == ("snapshot", "-c") for command in commands)

    @property
    def has_odd_size(self) -> bool:
        """Whether QEMU, which counts in sectors, shows less of the disk than there is."""
        sizes = [step.value for step in self.steps if isinstance(step, Patch) and step.offset == 24]
        return any(size % 512 for size in sizes)

    @property
    def has_odd_raw_file(self) -> bool:
        """Whether QEMU, which counts in sectors, shows more of a raw backing file than there is."""
        steps = (step for layer in self.chain for step in layer.steps)
        return any(isinstance(step, Truncate) and step.size % 512 for step in steps)

    def ops(self) -> list[Op]:
        """What touches this image's data."""
        return [op for step in self.steps if isinstance(step, Io | Crash) for op in step.ops]
