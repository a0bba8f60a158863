"""A tour of underlay on a small qcow2 chain that qemu-img made (``make_images.sh``).

Run it from anywhere: ``python examples/quickstart.py``. It changes nothing but a temporary folder.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import underlay
from underlay import jobs

IMAGES = Path(__file__).resolve().parent / "images"
OVERLAY = "overlay.qcow2"
MIB = 1 << 20

console = Console(highlight=False)


def step(title: str, code: str) -> None:
    """Say what comes next, and the call that does it."""
    console.print()
    console.print(Text("▍ ", style="cyan") + Text(title, style="bold"))
    console.print(Text(f"  >>> {code}", style="dim"))


def say(what: str) -> None:
    """One line of result."""
    console.print(Text(f"  {what}"))


def recognise() -> None:
    """The format comes from the content, never from the name."""
    step("What is this file?", "underlay.probe('overlay.qcow2')")
    found = underlay.probe(OVERLAY)
    say(
        f"{found.format}: {found.matches[found.format or '']}; {found.size // 1024} KiB on the host"
    )


def be_refused() -> None:
    """An image may not open other files by itself."""
    step("Open it", "underlay.open_any('overlay.qcow2')")
    try:
        underlay.open_any(OVERLAY).close()
    except underlay.ImplicitOpenDeniedError as refusal:
        sentence = Text("Refused. ", style="yellow") + Text(str(refusal))
        console.print(Padding(sentence, (0, 2)))
        say(f"The image names a {refusal.request.reference.kind.value}. That is for you to allow.")


def read(disk: underlay.SyncFormatAccess) -> None:
    """Two layers, one disk."""
    step("Read", "disk.read_bytes(offset, length)")
    for offset in (0, 16 << 10, 1 << 20):
        line = bytes(disk.read_bytes(offset, 74)).partition(b"\n")[0]
        say(f"{offset:>8}  {line.decode()}")
    say("The second line is the overlay's; the others show through from the base image.")


def runs(disk: underlay.SyncFormatAccess) -> Iterator[tuple[int, int, str, str]]:
    """Start, length, what it is, and a colour for it; neighbours of one kind are one run."""
    names = [Path(layer.info().filename).name for layer in disk.chain()]

    def kind(extent: underlay.DiskExtent) -> tuple[str, str]:
        name = names[extent.depth]
        match extent.mapping:
            case underlay.Data():
                return name, ("green", "blue")[extent.depth]
            case underlay.Special():
                return f"{name}, compressed", "magenta"
            case underlay.Zero(explicit=True):
                return f"{name} says: zeroes", "yellow"
            case _:
                return "nothing stored", "bright_black"

    for (what, colour), group in groupby(disk.extents(), key=kind):
        extents = list(group)
        yield extents[0].start, sum(extent.length for extent in extents), what, colour


def draw_map(disk: underlay.SyncFormatAccess) -> None:
    """Where everything is; no data is read for it."""
    step("Map", "for extent in disk.extents(): …")
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("offset", justify="right")
    table.add_column("KiB", justify="right")
    table.add_column("where")
    for start, length, what, colour in runs(disk):
        table.add_row(str(start), str(length // 1024), Text(what, style=colour))
    console.print(table)


def convert_and_compare(disk: underlay.SyncFormatAccess, folder: Path) -> None:
    """A raw copy of the whole chain, and proof that it is one."""
    raw = folder / "disk.raw"
    step("Convert to raw", "jobs.convert(disk, 'disk.raw')")
    jobs.convert(disk, raw)
    stat = raw.stat()
    say(f"{stat.st_size // MIB} MiB long, {stat.st_blocks // 2} KiB stored: what is zero is a hole")

    step("Compare", "jobs.compare(disk, copy)")
    with underlay.open_image(raw, format="raw") as copy:
        result = jobs.compare(disk, copy)
    console.print(
        Text("  Identical.", style="green")
        if result.identical
        else Text(f"  They differ at {result.offset}.", style="bold red")
    )
    if not result.identical:
        raise SystemExit(1)


def write(folder: Path) -> None:
    """An overlay of our own, which QEMU reads as well."""
    image, base = folder / "new.qcow2", Path(OVERLAY).resolve()
    step("Write", "underlay.create('new.qcow2', backing_file='overlay.qcow2', backing_fmt='qcow2')")
    gate = underlay.DirectoryGate()
    with underlay.create(image, backing_file=str(base), backing_fmt="qcow2", gate=gate) as disk:
        disk.write(b"Written by the tour", 0)
        disk.discard_to_zero(1 << 20, 1 << 20)
        say(f"at 0: {disk.read_bytes(0, 19).decode()}; at 1 MiB: zeroes; the rest shows through")

    step("Check", "jobs.check('new.qcow2')")
    report = jobs.check(image)
    say(f"{report.corruptions} errors, {report.leaks} leaks, {report.allocated_clusters} cluster")
    if report.corruptions or report.leaks:
        raise SystemExit(1)


def main() -> None:
    """The tour."""
    with contextlib.chdir(IMAGES):
        tour()
    console.print()


def tour() -> None:
    """Each step after the other, in the images' folder."""
    recognise()
    be_refused()
    step("Allow the image's own folder", "underlay.open_any(…, gate=underlay.DirectoryGate())")
    with (
        underlay.open_any(OVERLAY, gate=underlay.DirectoryGate()) as disk,
        tempfile.TemporaryDirectory() as folder,
    ):
        chain = " on ".join(Path(layer.info().filename).name for layer in disk.chain())
        say(f"{chain}: one disk of {disk.size // MIB} MiB")
        read(disk)
        draw_map(disk)
        convert_and_compare(disk, Path(folder))
        write(Path(folder))


if __name__ == "__main__":
    main()
