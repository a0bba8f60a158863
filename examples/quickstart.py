"""A tour of underlay on a small qcow2 chain that qemu-img made (``make_images.sh``).

Run it from anywhere: ``python examples/quickstart.py``. It changes nothing but a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import underlay
from underlay import jobs

IMAGES = Path(__file__).resolve().parent / "images"
OVERLAY = IMAGES / "overlay.qcow2"
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
        console.print(Text("  Refused. ", style="yellow") + Text(str(refusal)))
        say(f"The image names a {refusal.request.reference.kind.value}. That is for you to allow.")


def read(disk: underlay.SyncFormatAccess) -> None:
    """Two layers, one disk."""
    step("Read", "disk.read_bytes(offset, length)")
    for offset in (0, 16 << 10, 1 << 20):
        line = bytes(disk.read_bytes(offset, 74)).partition(b"\n")[0]
        say(f"{offset:>8}  {line.decode()}")
    say("The second line is the overlay's; the others show through from the base image.")


def layers(disk: underlay.SyncFormatAccess) -> Iterator[tuple[str, str, underlay.DiskExtent]]:
    """Each run of the disk with what it is, and a colour for it."""
    names = [Path(str(layer.info().filename)).name for layer in disk.chain()]
    for extent in disk.extents():
        if isinstance(extent.mapping, underlay.Data):
            yield names[extent.depth], ("green", "blue")[extent.depth], extent
        elif isinstance(extent.mapping, underlay.Special):
            yield f"{names[extent.depth]}, compressed", "magenta", extent
        elif extent.mapping.explicit:
            yield "zeroes, says the overlay", "yellow", extent
        else:
            yield "nothing stored", "bright_black", extent


def draw_map(disk: underlay.SyncFormatAccess) -> None:
    """Where everything is; no data is read for it."""
    step("Map", "for extent in disk.extents(): ...")
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("offset", justify="right")
    table.add_column("KiB", justify="right")
    table.add_column("where")
    bar = [("bright_black", "·")] * 64
    for what, colour, extent in layers(disk):
        table.add_row(str(extent.start), str(extent.length // 1024), Text(what, style=colour))
        if what != "nothing stored":
            first, last = extent.start // MIB, (extent.start + extent.length - 1) // MIB
            bar[first : last + 1] = [(colour, "█")] * (last - first + 1)
    console.print(table)
    drawn = Text("  ")
    for colour, sign in bar:
        drawn.append(sign, style=colour)
    console.print(drawn + Text("  1 MiB each", style="dim"))


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


def main() -> None:
    """The tour."""
    recognise()
    be_refused()
    step("Allow the image's own folder", "underlay.open_any(…, gate=underlay.DirectoryGate())")
    with (
        underlay.open_any(OVERLAY, gate=underlay.DirectoryGate()) as disk,
        tempfile.TemporaryDirectory() as folder,
    ):
        chain = " on ".join(Path(str(layer.info().filename)).name for layer in disk.chain())
        say(f"{chain}: one disk of {disk.size // MIB} MiB")
        read(disk)
        draw_map(disk)
        convert_and_compare(disk, Path(folder))
    console.print()


if __name__ == "__main__":
    main()
