"""Pictures of where the data of a disk lies: they tell the truth, stay small, and obey no name."""

from __future__ import annotations

import json
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import attrs
import pytest

import underlay
from underlay.jobs.picture import HostFile, Ink, Kind, Picture, PictureLayer, picture
from underlay.jobs.picture.cells import cell_height
from underlay.jobs.picture.model import COLOURS, PLOT_COLUMNS, PLOT_ROWS

from .conftest import Make, Tool

_LIMIT = 300 << 10
_SVG = "{http://www.w3.org/2000/svg}"
#: A name that would end a text, an attribute, an element or a script, or steer a terminal.
_HOSTILE = "]]>\"'&lt;</title><script>alert(1)</script>--><svg onload=x>\x1b[2J\n\u202e\ufffe\udcff"


def _picture(path: Path, **more: Any) -> Picture:
    with underlay.open_any(path, gate=underlay.DirectoryGate()) as disk:
        return picture(disk, **more)


def _agrees_with_qemu(drawing: Picture, path: Path, qemu_img: Tool) -> None:
    entries = json.loads(qemu_img("map", "--output=json", path))

    def total(wanted: Callable[[dict[str, Any]], bool]) -> int:
        return sum(entry["length"] for entry in entries if wanted(entry))

    assert drawing.runs == len(entries)
    assert drawing.data + drawing.compressed == total(lambda e: e["data"] and not e["zero"])
    assert drawing.zero == total(lambda e: e["zero"] and e["present"])
    assert drawing.unallocated == total(lambda e: not e["present"])
    stored = [entry for entry in entries if entry["data"] and not entry["zero"]]
    assert [layer.data + layer.compressed for layer in drawing.layers] == [
        sum(entry["length"] for entry in stored if entry["depth"] == layer.depth)
        for layer in drawing.layers
    ]
    drawn = {
        kind: sum(sum(row) for ink, row in drawing.cells.items() if ink.kind is kind)
        for kind in Kind
    }
    assert drawn == {kind: drawing.total(kind) for kind in Kind}
    assert sum(drawn.values()) == drawing.length


def _parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg.encode())  # noqa: S314 - it is our own


def _texts(svg: str) -> list[str]:
    return [element.text or "" for element in _parsed(svg).iter()]


def test_a_chain_is_drawn_as_qemu_img_maps_it(make: Make, qemu_img: Tool) -> None:
    base = make("base.qcow2", "qcow2", "32M", "write 0 8M", "write -z 16M 4M", "write 24M 1M")
    middle = make("middle.qcow2", "qcow2", "32M", "write 4M 6M", backing=base)
    top = make("top.qcow2", "qcow2", "40M", "write 5M 1M", "write -z 6M 64k", backing=middle)

    drawing = _picture(top)

    _agrees_with_qemu(drawing, top, qemu_img)
    assert [layer.data >> 20 for layer in drawing.layers] == [1, 4, 5]
    texts = _texts(drawing.svg())
    assert {"40 MiB", "Data", "1 MiB data · 2.5%"} <= set(texts)
    assert sorted(Path(file.name).name for file in drawing.files) == [
        "base.qcow2",
        "middle.qcow2",
        "top.qcow2",
    ]


def test_what_is_compressed_is_told_with_what_it_takes(make: Make, qemu_img: Tool) -> None:
    raw = make("disk.raw", "raw", "8M", "write -P 7 0 4M")
    path = raw.with_name("disk.qcow2")
    qemu_img("convert", "-c", "-O", "qcow2", raw, path)

    drawing = _picture(path)

    _agrees_with_qemu(drawing, path, qemu_img)
    assert (drawing.compressed, drawing.data) == (4 << 20, 0)
    assert 0 < drawing.compressed_size < 1 << 20
    assert (drawing.fragments, drawing.fragmentation) == (1, 0.0)
    assert 'class="c0"' in drawing.svg()


@pytest.mark.parametrize("size", ["0", "512", "1M", "1T"])
def test_a_disk_with_nothing_in_it_is_drawn_too(make: Make, size: str) -> None:
    drawing = _picture(make("empty.qcow2", "qcow2", size))

    texts = _texts(drawing.svg())
    assert drawing.unallocated == drawing.virtual_size == drawing.length
    assert "nothing is stored" in texts
    assert ("it has no bytes" in texts) == (size == "0")


def test_fragmentation_is_none_in_order_and_whole_in_disorder(make: Make) -> None:
    places = list(range(64))
    random.Random(1).shuffle(places)
    tidy = _picture(make("tidy.qcow2", "qcow2", "8M", *(f"write {i * 64}k 64k" for i in range(64))))
    wild = _picture(make("wild.qcow2", "qcow2", "8M", *(f"write {i * 64}k 64k" for i in places)))

    assert (tidy.fragments, tidy.fragmentation) == (1, 0.0)
    assert wild.fragments > 56
    assert wild.fragmentation > 0.9
    # In order it is a line, in disorder a cloud.
    assert len(tidy.files[0].plot) < 2 * PLOT_ROWS < len(wild.files[0].plot)


def test_a_part_of_a_disk_is_drawn_in_more_detail(make: Make) -> None:
    path = make("disk.qcow2", "qcow2", "1G", "write 512M 1M")

    part = _picture(path, start=512 << 20, length=2 << 20)

    assert (part.start, part.length, part.data, part.unallocated) == (
        512 << 20,
        2 << 20,
        1 << 20,
        1 << 20,
    )
    assert part.cell_size < _picture(path).cell_size
    assert "from 512 MiB on" in _texts(part.svg())
    assert _picture(path, start=2 << 30).length == 0
    with pytest.raises(underlay.OutOfRangeError):
        _picture(path, start=-1)


def test_the_diagram_has_each_stored_byte_once(make: Make) -> None:
    path = make("disk.qcow2", "qcow2", "100M", "write 3M 40M", "write 1M 512", "write 90M 5M")

    (file,) = _picture(path).files

    assert sum(file.plot.values()) == file.stored
    assert all(0 <= place < PLOT_COLUMNS * PLOT_ROWS for place in file.plot)


# -- names


def _hostile(make: Make) -> Picture:
    found = _picture(make("disk.qcow2", "qcow2", "1M", "write 0 64k"))
    layers = [attrs.evolve(layer, name=_HOSTILE) for layer in found.layers]
    files = [attrs.evolve(file, name=_HOSTILE) for file in found.files]
    return attrs.evolve(found, name=_HOSTILE, layers=layers, files=files)


def test_no_name_breaks_out_of_an_svg_file(make: Make) -> None:
    svg = _hostile(make).svg()

    root = _parsed(svg)
    kinds = {element.tag.removeprefix(_SVG) for element in root.iter()}
    assert kinds <= {"svg", "title", "desc", "style", "defs", "pattern", "g", "rect", "path"} | {
        "text",
        "tspan",
        "clipPath",
    }
    assert not any(name.startswith("on") for element in root.iter() for name in element.attrib)
    assert r"\x1b[2J\n\u202e\ufffe\xff" in (root.findtext(f"{_SVG}title") or "")


class _Page(HTMLParser):
    """What a browser would run or load."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0
        self.suspicious: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.suspicious += [
            name
            for name, value in attrs
            if name in {"src", "href", "onload"} or (value or "").startswith("http:")
            if name != "xmlns"
        ]


def test_no_name_runs_in_a_page_and_nothing_is_loaded(make: Make) -> None:
    html = _hostile(make).html()

    page = _Page()
    page.feed(html)
    assert page.scripts == 1
    assert not page.suspicious
    assert re.findall(r"url\((?!#)", html) == []
    assert "default-src 'none'" in html


# -- size


def _noise(files: int) -> Picture:
    """As busy as a picture can be: every ink in every cell, every dot, the longest names."""
    dice = random.Random(2)
    inks = [Ink(kind, colour) for kind in Kind if kind.stored for colour in range(COLOURS)]
    inks += [Ink(Kind.ZERO), Ink(Kind.UNALLOCATED)]
    cells = {ink: [dice.randrange(1 << 50) for _ in range(2048)] for ink in inks}
    dense = 1 << 55
    plot = {place: (1, dense)[place % 2] for place in range(PLOT_COLUMNS * PLOT_ROWS)}
    name = "\udcff&" * 4000
    return Picture(
        name=name,
        format="x",
        virtual_size=1 << 61,
        start=1,
        length=(1 << 61) - 1,
        data=1 << 60,
        compressed=1 << 59,
        zero=1,
        unallocated=1,
        compressed_size=1 << 58,
        runs=1 << 50,
        layers=[
            PictureLayer(depth=i, name=name, format="x", data=1, compressed=1) for i in range(200)
        ],
        files=[
            HostFile(
                name=name, size=1 << 60, stored=1 << 59, fragments=1 << 40, colour=i, plot=plot
            )
            for i in range(files)
        ],
        cell_size=1 << 50,
        cells=cells,
    )


@pytest.mark.parametrize("files", [1, 8])
def test_no_picture_is_larger_than_300_kib(files: int) -> None:
    busiest = _noise(files)
    svg = busiest.svg()

    assert len(svg.encode()) < _LIMIT
    assert len(busiest.html().encode()) < _LIMIT
    assert len(_parsed(svg).findall(f".//{_SVG}title")) > 500
    # Beside many small diagrams there is no room for words between the numbers of their axes.
    assert any(text.endswith("file →") for text in _texts(svg)) == (files == 1)


def test_what_is_there_at_all_is_seen_in_its_cell() -> None:
    little, much = Ink(Kind.DATA), Ink(Kind.UNALLOCATED)

    assert dict(cell_height([(little, 1), (much, 1 << 40)], 8)) == {little: 1, much: 7}
    every = [(Ink(Kind.DATA, colour), 1 + colour) for colour in range(COLOURS)]
    assert sum(height for _, height in cell_height(every, 8)) == 8
