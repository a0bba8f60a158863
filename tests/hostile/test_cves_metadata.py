"""The attacks of docs/security.md by sizes and damaged metadata; see ``test_cves``."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import underlay
from underlay import jobs

from .attacks import Place, look
from .editing import Image

if TYPE_CHECKING:
    from tests.conftest import Tool

_MIB = 1 << 20


# -- disks that grow


def test_cve_2013_2096_a_huge_virtual_size_is_told_and_refused(
    place: Place, qemu_img: Tool
) -> None:
    evil = place.folder / "evil"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", evil, "1P")
    assert evil.stat().st_size < 8 * _MIB
    report = underlay.inspect(evil)
    assert (report.verdict, report.virtual_size) == ("unsafe", 1 << 50)
    with pytest.raises(underlay.LimitExceededError) as caught:
        underlay.open_any(evil)
    assert (caught.value.limit, caught.value.value) == ("virtual_size", 1 << 50)
    place.refused("convert", "evil", "out", opens=("evil",))
    place.refused("resize", "-f", "qcow2", "evil", "2P", opens=("evil",))


@pytest.mark.parametrize("packed", [True, False], ids=["compressed", "sparse"])
def test_cve_2013_4463_and_2013_4469_a_small_upload_does_not_fill_the_disk(
    place: Place, qemu_img: Tool, packed: bool
) -> None:
    """4463 is about compressed images, 4469 about ones that are stored as flat files."""
    bomb = place.folder / "bomb"
    if packed:
        source = place.root / "source"
        source.write_bytes(b"x" * (32 * _MIB))
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", source, bomb)
    else:
        qemu_img("create", "-q", "-f", "qcow2", bomb, "32M")
    assert bomb.stat().st_size < _MIB
    limits = underlay.Limits(virtual_size=32 * _MIB - 1)
    assert underlay.inspect(bomb, limits=limits).verdict == "unsafe"
    with pytest.raises(underlay.LimitExceededError):
        jobs.convert(bomb, place.folder / "out", limits=limits)
    told = place.refused("convert", "--limit=virtual_size=31M", "bomb", "out", opens=("bomb",))
    assert "virtual size" in told
    if not packed:
        assert place.run("convert", "bomb", "out", opens=("bomb", "out")).status == 0
        assert (place.folder / "out").stat().st_blocks == 0


# -- damaged metadata


def test_cve_2014_0142_what_no_driver_knows_is_not_parsed(place: Place, qemu_img: Tool) -> None:
    """Parallels with no sectors in a track, by which QEMU divided."""
    evil = place.folder / "evil"
    qemu_img("create", "-q", "-f", "parallels", evil, "1M")
    data = bytearray(evil.read_bytes())
    data[28:32] = bytes(4)
    evil.write_bytes(data)
    _is_unknown(place, evil, "parallels")


def test_cve_2014_0148_a_vhdx_with_blocks_of_nothing_is_not_parsed(
    place: Place, qemu_img: Tool
) -> None:
    evil = place.folder / "evil"
    qemu_img("create", "-q", "-f", "vhdx", evil, "8M")
    data = evil.read_bytes()
    block_size = data.index(struct.pack("<I", 8 << 20), 2 * _MIB)
    evil.write_bytes(data[:block_size] + bytes(4) + data[block_size + 4 :])
    _is_unknown(place, evil, "vhdx")


def _is_unknown(place: Place, image: Path, name: str) -> None:
    """It is bytes to us, of which it is said that others may see more in them."""
    data = image.read_bytes()
    report = underlay.inspect(image)
    assert report.verdict == "unknown"
    assert f"signature of {name}" in report.reasons[0]
    with underlay.open_any(image) as disk:
        assert disk.read_bytes(0, disk.size) == data
    assert "signature" in place.refused("resize", image.name, "16M", opens=(image.name,))
    assert place.run("inspect", image.name, opens=(image.name,)).status == 1


#: What is damaged: offset in the header, form, value. Sizes and offsets of 2013's qcow2 driver.
_OVERFLOWS: dict[str, dict[str, tuple[Any, ...]]] = {
    "2014_0143": {
        "an L1 table of 2^32 - 1 entries": (36, "I", 0xFFFF_FFFF),
        "an L1 table whose bytes overflow": (36, "I", 0x2000_0001),
        "a refcount table of 2^32 - 1 clusters": (56, "I", 0xFFFF_FFFF),
        "a size that rounds up to nothing": (24, "Q", 0xFFFF_FFFF_FFFF_FFFF),
    },
    "2014_0144": {
        "clusters of 2^63 bytes": (20, "I", 63),
        "clusters of one byte": (20, "I", 0),
        "a header of 4 GiB": (100, "I", 0xFFFF_FFF8),
        "a backing file's name of 4 GiB": (8, "QI", 200, 0xFFFF_FFFF),
        "a backing file's name past the end": (8, "QI", 1 << 62, 100),
        "refcounts of 2^255 bits": (96, "I", 255),
    },
    "2014_0145": {
        "2^32 - 1 snapshots": (60, "IQ", 0xFFFF_FFFF, 0x30000),
        "an L1 table behind the end": (40, "Q", 1 << 62),
    },
    "2014_0146": {
        "a snapshot in the middle of nowhere": (60, "IQ", 1, 1 << 61),
        "a snapshot in the middle of a cluster": (60, "IQ", 1, 0x30007),
    },
    "2014_0147": {
        "a refcount table before the file": (48, "Q", 0xFFFF_FFFF_FFFF_0000),
        "an L1 table before the file": (40, "Q", 0x8000_0000_0000_0000),
        "a refcount table upon the header": (48, "Q", 0),
    },
}


def _overflows(cve: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("lie", _OVERFLOWS[cve])


def _is_refused(place: Place, qemu_img: Tool, patch: tuple[Any, ...]) -> None:
    """It opens for nobody who would write to it, and whatever is asked ends at once."""
    evil = place.folder / "evil"
    qemu_img("create", "-q", "-f", "qcow2", evil, "1M")
    image = Image.load(evil)
    evil.write_bytes(image.put(*patch).data)
    assert underlay.inspect(evil).verdict == "unsafe"
    with pytest.raises(underlay.UnderlayError):
        underlay.open_any(evil, writable=True).close()
    for words in (("info",), ("check",), ("snapshot", "-l"), ("map",), ("inspect",), ("probe",)):
        place.run(*words, "evil", opens=("evil",))
    place.refused("resize", "-f", "qcow2", "evil", "4M", opens=("evil",))


@_overflows("2014_0143")
def test_cve_2014_0143_products_are_checked_before_anything_is_allocated(
    place: Place, qemu_img: Tool, lie: str
) -> None:
    _is_refused(place, qemu_img, _OVERFLOWS["2014_0143"][lie])


@_overflows("2014_0144")
def test_cve_2014_0144_sizes_in_a_header_are_believed_within_bounds_only(
    place: Place, qemu_img: Tool, lie: str
) -> None:
    _is_refused(place, qemu_img, _OVERFLOWS["2014_0144"][lie])


@_overflows("2014_0145")
def test_cve_2014_0145_no_table_is_longer_than_the_place_for_it(
    place: Place, qemu_img: Tool, lie: str
) -> None:
    _is_refused(place, qemu_img, _OVERFLOWS["2014_0145"][lie])


def test_cve_2014_0145_the_l1_table_of_a_snapshot_has_bounds(place: Place, qemu_img: Tool) -> None:
    evil = place.folder / "evil"
    qemu_img("create", "-q", "-f", "qcow2", evil, "1M")
    qemu_img("snapshot", "-c", "s", evil)
    image = Image.load(evil)
    image.put(image.header.snapshots_offset + 8, "I", 0x7FFF_FFFF)
    evil.write_bytes(image.data)
    with pytest.raises(underlay.UnderlayError):
        underlay.open_image(evil, format="qcow2", snapshot="s")
    place.refused("convert", "-l", "s", "evil", "out", opens=("evil",))
    for option in ("-a", "-d"):
        assert place.run("snapshot", option, "s", "evil", opens=("evil",)).status == 1
    image.set_bit(72, 1)  # marked as corrupt, and nothing else
    assert evil.read_bytes() == image.data


@_overflows("2014_0146")
def test_cve_2014_0146_snapshots_that_cannot_be_read_stop_nothing_else(
    place: Place, qemu_img: Tool, lie: str
) -> None:
    _is_refused(place, qemu_img, _OVERFLOWS["2014_0146"][lie])


@_overflows("2014_0147")
def test_cve_2014_0147_offsets_have_no_sign(place: Place, qemu_img: Tool, lie: str) -> None:
    _is_refused(place, qemu_img, _OVERFLOWS["2014_0147"][lie])


def test_cve_2026_2243_a_compressed_cluster_fills_its_cluster_and_no_more(
    place: Place, qemu_img: Tool
) -> None:
    """One lies past the end of the file, one is too short, one is a bomb; the third is sound."""
    source = place.root / "source"
    source.write_bytes(b"".join(bytes([65 + n]) * (64 << 10) for n in range(4)))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", source, place.folder / "evil")
    image = Image.load(place.folder / "evil")
    image.put(image.l2(0), "Q", 1 << 62 | (len(image.data) + _MIB))
    for cluster, data in ((1, b"short"), (3, b"L" * (64 * _MIB))):
        packed = _deflated(data)
        at = image.word(image.l2(cluster)) & ((1 << 54) - 1)
        image.data[at : at + len(packed)] = packed
        sectors = (at % 512 + len(packed) - 1) // 512
        image.put(image.l2(cluster), "Q", 1 << 62 | sectors << 54 | at)
    evil = place.folder / "evil"
    evil.write_bytes(image.data)
    with underlay.open_any(evil) as disk:
        for cluster in range(2):
            with pytest.raises(underlay.CorruptImageError):
                disk.read_bytes(cluster << 16, 512)
        assert disk.read_bytes(2 << 16, 2 << 16) == b"C" * (1 << 16) + b"L" * (1 << 16)
    place.refused("convert", "evil", "out", opens=("evil", "out"))
    place.run("convert", "--salvage", "evil", "out", opens=("evil", "out"))


def _deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


# -- memory and time


def test_cve_2015_5162_a_crafted_image_takes_neither_time_nor_memory(
    place: Place, qemu_img: Tool
) -> None:
    """Each L1 entry of a disk of 8 TiB leads to one table, in a file of less than a MiB."""
    evil = place.folder / "evil"
    qemu_img("create", "-q", "-f", "qcow2", evil, "8T")
    image = Image.load(evil)
    table, entries = image.add_cluster(), image.header.l1_size
    assert entries == 16 << 10
    image.put(image.l1(), f"{entries}Q", *([1 << 63 | table] * entries))
    evil.write_bytes(image.data)
    assert len(image.data) < _MIB
    for words in (("info",), ("inspect",), ("probe",), ("check",), ("snapshot", "-l")):
        place.run(*words, "evil", opens=("evil",))
    # What has to go through the disk takes as long as it is given.
    with pytest.raises(underlay.TimeLimitError), underlay.TimeLimit(0.2):
        jobs.digest(evil)
    for command in (("map",), ("digest",), ("convert", "out")):
        limited = (command[0], "--time-limit=0.2", *look(command, "evil")[1:])
        place.refused(*limited, opens=("evil", "out"))


def test_cve_2015_5162_a_chain_is_as_long_as_the_caller_says(place: Place, qemu_img: Tool) -> None:
    folder = place.folder
    qemu_img("create", "-q", "-f", "qcow2", folder / "0", "1M")
    for depth in range(1, 12):
        names = ("-b", str(depth - 1), "-F", "qcow2", folder / str(depth))
        qemu_img("create", "-q", "-u", "-f", "qcow2", *names, "1M")
    gate = underlay.DirectoryGate()
    underlay.open_any(folder / "9", gate=gate, limits=underlay.Limits(chain_depth=10)).close()
    with pytest.raises(underlay.LimitExceededError):
        underlay.open_any(folder / "10", gate=gate, limits=underlay.Limits(chain_depth=10))
    words = ("map", "--gate=directory", "--limit=chain_depth=10", "11")
    assert "chain" in place.refused(*words, opens=tuple(map(str, range(12))))
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "11", "-F", "qcow2", folder / "0")
    assert "loops" in place.refused(
        "map", "--gate=directory", "11", opens=tuple(map(str, range(12)))
    )
