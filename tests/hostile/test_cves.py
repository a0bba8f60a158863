"""The attacks of docs/security.md, each played against the library and the command.

Where the real qemu-img still falls for one, it is shown to: what we withstand is an attack.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import pytest

import underlay
from underlay import jobs, plugins
from underlay.gate import (
    Deny,
    GateDecision,
    ImplicitOpenGate,
    ImplicitOpenRequest,
    Reference,
    ReferenceKind,
    Substitute,
)
from underlay.probing import Match, NoMatch, ProbeVerdict, ProbeView
from underlay.testing import WrappedStorage
from underlay_drivers.raw import Raw
from underlay_storage.memory import MemoryStorage

from .attacks import SECRET, Place
from .editing import Image

if TYPE_CHECKING:
    from tests.conftest import Tool

    from .child import Warm

_DATA_FILE_NAME = 0x44415441
_MIB = 1 << 20
#: Commands that look at one image, and what more each needs.
_LOOKS = (
    ("map",),
    ("convert", "copy.raw"),
    ("compare", "-f", "qcow2", "evil"),
    ("dd", "of=copy.raw"),
    ("digest",),
    ("bench", "-c", "1"),
    ("measure", "-O", "qcow2"),
)


@pytest.fixture
def place(tmp_path: Path, warm: Warm) -> Generator[Place]:
    place = Place(tmp_path, warm)
    place.folder.mkdir()
    place.secret.parent.mkdir()
    place.secret.write_bytes(SECRET)
    yield place
    assert place.secret.read_bytes() == SECRET


@pytest.fixture
def oracle(qemu: Callable[[str], str]) -> str:
    return qemu("qemu-img")


def _look(command: tuple[str, ...], image: str) -> tuple[str, ...]:
    """The words that look at an image by a command."""
    if command[0] == "dd":
        return ("dd", f"if={image}", *command[1:])
    if command[0] == "convert":
        return ("convert", image, *command[1:])
    return (*command, image)


def _names(image: Path) -> dict[str, str]:
    """What an image names, as ``inspect`` tells it."""
    return {
        reference.kind.value: reference.name for reference in underlay.inspect(image).references
    }


def _header(*, backing: bytes = b"", data_file: bytes = b"", size: int = 64 << 10) -> bytes:
    """What a guest writes to the start of its disk: all of a qcow2 image, in one sector and some.

    Its L1 table lies in the second cluster of 512 bytes and is empty, so that all is below.
    """
    extensions = b""
    if data_file:
        extensions += struct.pack(">II", _DATA_FILE_NAME, len(data_file)) + data_file
        extensions += bytes(-len(data_file) % 8)
    if backing:
        extensions += struct.pack(">II3s5x", 0xE2792ACA, 3, b"raw")
    extensions += bytes(8)
    name_at = 104 + len(extensions)
    head = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, name_at if backing else 0, len(backing), 9, size, 0),
        *(2, 512, 1024, 1, 0, 0),
        *(4 if data_file else 0, 0, 0, 4, 104),
    )
    head = (head + extensions + backing).ljust(512, b"\0")
    assert len(head) == 512
    # The L1 table, and the refcount table and its block, which count themselves.
    return head + bytes(512) + struct.pack(">Q504x", 1536) + struct.pack(">4H504x", 1, 1, 1, 1)


# -- names that lead out: backing files


@pytest.mark.parametrize("spelling", ["{secret}", "../host/secret", "file:{secret}", "link"])
def test_cve_2011_3147_a_crafted_backing_file_shows_no_host_file(
    place: Place, qemu_img: Tool, oracle: str, spelling: str
) -> None:
    (place.folder / "link").symlink_to(place.secret)
    name = spelling.format(secret=place.secret)
    evil = place.folder / "evil"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", evil, "64k")
    assert place.leaks(oracle, "convert", "-O", "raw", "evil")
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        underlay.open_any(evil)
    with pytest.raises((underlay.ImplicitOpenDeniedError, underlay.StorageNotFoundError)):
        underlay.open_any(evil, gate=underlay.DirectoryGate())
    assert name in place.refused("convert", "-O", "raw", "evil", "out", opens=("evil",))
    place.refused("convert", "--gate=directory", "evil", "out", opens=("evil", "out"))


@pytest.mark.parametrize("command", _LOOKS, ids=" ".join)
def test_cve_2015_5163_no_command_follows_what_an_upload_names(
    place: Place, qemu_img: Tool, command: tuple[str, ...]
) -> None:
    evil = place.folder / "evil"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", place.secret, "-F", "raw", evil, "64k")
    told = place.refused(*_look(command, "evil"), opens=("evil",))
    assert f"names the backing file '{place.secret}', which was not opened" in told


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


# -- raw disks whose guests write the header of another format


def test_cve_2014_0134_a_disk_that_a_guest_gave_a_header_is_what_it_was(
    place: Place, oracle: str
) -> None:
    """The rescue: the disk of a guest is opened once more, after the guest could write to it."""
    header = _header(backing=os.fsencode(place.secret))
    disk = place.folder / "disk"
    disk.write_bytes(bytes(_MIB))
    # In its own words, which are believed today as tomorrow.
    for _ in range(2):
        with underlay.open_image(disk, format="raw", writable=True) as opened:
            opened.write(header, 0)
            assert opened.read_bytes(0, opened.size) == header.ljust(_MIB, b"\0")
    assert place.leaks(oracle, "convert", "-O", "raw", "disk")
    place.run("convert", "-f", "raw", "disk", "out", opens=("disk", "out"))
    assert (place.folder / "out").read_bytes() == disk.read_bytes()
    # In nobody's: it is an image by now, and may name what it likes.
    assert _names(disk) == {"backing file": str(place.secret)}
    place.refused("convert", "disk", "out2", opens=("disk",))


@pytest.mark.parametrize("way", ["write", "halves", "file", "slice", "aio", "sector"])
def test_cve_2026_27211_no_guest_turns_a_guessed_raw_disk_into_an_image(
    place: Place, way: str
) -> None:
    header = _header(backing=os.fsencode(place.secret))
    disk = place.folder / "disk"
    disk.write_bytes(bytes(_MIB))

    async def write_asynchronously() -> None:
        async with await underlay.aio.open_any(disk, writable=True) as opened:
            await opened.writev([header[:100], header[100:]], 0)

    def write() -> None:
        if way == "aio":
            import asyncio

            asyncio.run(write_asynchronously())
            return
        with underlay.open_any(disk, writable=True) as opened:
            if way == "write":
                opened.write(header, 0)
            elif way == "halves":
                opened.write(header[4:], 4)
                opened.write(header[:4], 0)
            elif way == "file":
                with opened.as_file() as file:
                    file.write(header)
            elif way == "slice":
                opened.slice(0, 4096).slice(0, 2048).write(header, 0)
            else:
                opened.write(header[:512].ljust(8192, b"\0"), 0)

    with pytest.raises(underlay.ReadOnlyError, match=r"guessed to be raw.*qcow2"):
        write()
    assert underlay.probe(disk).guessed
    place.run("convert", "disk", "out", opens=("disk", "out"))


def test_cve_2015_1850_and_2015_1851_a_volume_with_a_signature_gives_its_own_bytes(
    place: Place, qemu_io: Tool, oracle: str
) -> None:
    """Upload of a volume: what QEMU's guest wrote there is data, whatever it looks like."""
    volume, header = place.folder / "volume", place.root / "header"
    volume.write_bytes(bytes(_MIB))
    header.write_bytes(_header(backing=os.fsencode(place.secret)))
    qemu_io("-f", "raw", "-c", f"write -s {header} 0 2048", volume)
    assert place.leaks(oracle, "convert", "-O", "raw", "volume")
    place.refused("convert", "-O", "qcow2", "volume", "image", opens=("volume",))
    done = place.run(
        *("convert", "-f", "raw", "-O", "qcow2", "volume", "image"), opens=("volume", "image")
    )
    assert done.status == 0
    with underlay.open_image(place.folder / "image", format="qcow2") as disk:
        assert disk.read_bytes(0, disk.size) == volume.read_bytes()


def test_cve_2026_24708_a_resize_without_a_format_harms_no_host_file(place: Place) -> None:
    disk = place.folder / "disk"
    disk.write_bytes(bytes(_MIB))
    with underlay.open_any(disk, writable=True) as opened, pytest.raises(underlay.ReadOnlyError):
        opened.write(_header(data_file=os.fsencode(place.secret)), 0)
    disk.write_bytes(_header(data_file=os.fsencode(place.secret)).ljust(_MIB, b"\0"))
    for words in (
        ("resize", "disk", "2M"),
        ("resize", "--preallocation=full", "disk", "2M"),
        ("resize", "--shrink", "disk", "512"),
        ("resize", "--gate=directory", "disk", "2M"),
        ("bench", "-w", "-c", "1", "disk"),
        ("commit", "disk"),
    ):
        told = place.refused(*words, opens=("disk",))
        assert "data file" in told, words
    place.run("resize", "-f", "raw", "disk", "2M", opens=("disk",))
    assert disk.stat().st_size == 2 * _MIB


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
    import zlib

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
        limited = (command[0], "--time-limit=0.2", *_look(command, "evil")[1:])
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


# -- other names: extents and data files


@pytest.mark.parametrize("comment", [True, False], ids=["as qemu-img writes it", "bare"])
def test_cve_2022_47951_a_vmdk_descriptor_is_text(
    place: Place, qemu_img: Tool, oracle: str, comment: bool
) -> None:
    evil = place.folder / "evil"
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", evil, "64k")
    text = re.sub(rb'FLAT "[^"]*"', b'FLAT "%s"' % os.fsencode(place.secret), evil.read_bytes())
    if not comment:
        text = text.removeprefix(b"# Disk DescriptorFile\n")
    for path in place.folder.iterdir():
        path.unlink()
    evil.write_bytes(text)
    assert place.leaks(oracle, "convert", "-O", "raw", "evil")
    assert underlay.inspect(evil).verdict == "unknown"
    done = place.run("convert", "evil", "out", opens=("evil", "out"))
    assert "bears the signature of vmdk" in done.err
    assert (place.folder / "out").read_bytes() == text
    assert place.run("inspect", "evil", opens=("evil",)).status == 1
    with pytest.raises(underlay.PluginError, match="vmdk"):
        underlay.open_any(evil, writable=True)


@pytest.mark.parametrize("command", _LOOKS, ids=" ".join)
def test_cve_2024_32498_a_data_file_is_asked_for_by_itself(
    place: Place, qemu_img: Tool, oracle: str, command: tuple[str, ...]
) -> None:
    evil = place.folder / "evil"
    options = f"data_file={place.root / 'own'},data_file_raw=on"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, evil, "64k")
    image = Image.load(evil)
    image.extensions((_DATA_FILE_NAME, os.fsencode(place.secret)))
    evil.write_bytes(image.data)
    assert place.leaks(oracle, "convert", "-O", "raw", "evil")

    with pytest.raises(underlay.ImplicitOpenDeniedError, match="data file"):
        underlay.open_any(evil, gate=_AllBut(ReferenceKind.DATA_FILE))
    told = place.refused(*_look(command, "evil"), opens=("evil",))
    assert f"names the data file '{place.secret}'" in told
    image.set_bit(72, 5)  # and a feature that nobody knows
    evil.write_bytes(image.data)
    with pytest.raises(underlay.UnsupportedFeatureError):
        underlay.open_any(evil, gate=underlay.PermissiveImplicitOpenGate())


@pytest.mark.parametrize(
    "name",
    [
        '{{"driver":"file","filename":"{secret}"}}',
        'json:{{"driver":"file","filename":"{secret}"}}',
        'json:{{"driver":"quorum","vote-threshold":1,"children":[{{"driver":"nbd"}}]}}',
        "nbd://localhost:10809/x",
        "nbd:unix:/run/socket",
        "http://localhost/x",
        "/dev/zero",
        "fat:rw:/etc",
        "{secret}",
    ],
)
@pytest.mark.parametrize("kind", ["data file", "backing file"])
def test_cve_2024_4467_asking_for_information_opens_nothing(
    place: Place, qemu_img: Tool, kind: str, name: str
) -> None:
    name = name.format(secret=place.secret)
    evil = place.folder / "evil"
    if kind == "data file":
        options = f"data_file={place.root / 'own'},data_file_raw=on"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, evil, "64k")
        evil.write_bytes(Image.load(evil).extensions((_DATA_FILE_NAME, name.encode())).data)
    else:
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "x", "-F", "raw", evil, "64k")
        evil.write_bytes(Image.load(evil).name_backing(name.encode()).data)
    assert _names(evil) == {kind: name}
    info = place.run("info", "--output=json", "evil", opens=("evil",))
    assert (info.status, info.err) == (0, "")
    assert json.dumps(name) in info.out
    for words in (("info",), ("inspect",), ("probe",), ("check",), ("snapshot", "-l")):
        place.run(*words, "evil", opens=("evil",))
    for gate in ("deny", "directory"):
        place.refused("map", f"--gate={gate}", "evil", opens=("evil",))


class _Extents(Raw):
    """A format of a stranger's, whose disk lies in further files."""

    format_name: ClassVar[str] = "extents"

    @classmethod
    def probe(cls, view: ProbeView) -> ProbeVerdict:
        return Match("magic") if view.head.startswith(b"EXTENTS") else NoMatch()

    def references(self) -> Sequence[Reference]:
        return [Reference(kind=kind, name="../host/secret", format="raw") for kind in ReferenceKind]

    def attach(self, reference: Reference, opened: object) -> None:
        """Takes whatever it is given."""


@attrs.frozen
class _AllBut(ImplicitOpenGate):
    denied: ReferenceKind

    def decide(self, request: ImplicitOpenRequest) -> GateDecision:
        if request.reference.kind is self.denied:
            return Deny("not that")
        return Substitute(MemoryStorage(b"x"))


def test_lima_5441_one_gate_is_asked_for_each_name_of_every_format(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = plugins.registry()
    record = plugins.PluginRecord(name="extents", value="x", distribution="a", version="1")
    formats = {**real._formats, "extents": [plugins._Claim(_Extents, record)]}
    registry = plugins.Registry(records=real.records, formats=formats, schemes=real._schemes)
    monkeypatch.setattr(plugins, "_registry", registry)
    evil = place.folder / "evil"
    evil.write_bytes(b"EXTENTS".ljust(4096))
    assert set(_names(evil)) == {kind.value for kind in ReferenceKind}
    assert underlay.inspect(evil).verdict == "unsafe"
    for kind in ReferenceKind:
        with pytest.raises(underlay.ImplicitOpenDeniedError, match=f"{kind.value} .*not that"):
            underlay.open_any(evil, gate=_AllBut(kind))
    for gate in (None, underlay.DirectoryGate()):
        with pytest.raises(underlay.ImplicitOpenDeniedError):
            underlay.open_any(evil, gate=gate)


# -- before anything else is done, and from outside


def test_cve_2024_44082_an_upload_is_judged_before_any_tool_has_it(
    place: Place, qemu_img: Tool
) -> None:
    verdicts: dict[str, str] = {}

    def create(name: str, format_name: str, *options: str) -> None:
        qemu_img("create", "-q", "-u", "-f", format_name, *options, place.folder / name, "1M")
        verdicts[name] = "unknown"

    for name in ("vmdk", "vdi", "vhdx", "vpc", "qed", "parallels", "qcow"):
        create(name, name)
    create("plain", "qcow2")
    create("old", "qcow2", "-o", "compat=0.10")
    (place.folder / "raw").write_bytes(bytes(_MIB))
    verdicts |= dict.fromkeys(("plain", "old", "raw"), "safe")
    create("backed", "qcow2", "-b", "plain", "-F", "qcow2")
    create("elsewhere", "qcow2", "-o", "data_file=plain")
    create("future", "qcow2")
    image = Image.load(place.folder / "future").set_bit(72, 40)
    (place.folder / "future").write_bytes(image.data)
    create("cut", "qcow2")
    os.truncate(place.folder / "cut", 70_000)
    verdicts |= dict.fromkeys(("backed", "elsewhere", "future", "cut"), "unsafe")
    statuses = {"safe": 0, "unknown": 1, "unsafe": 2}
    for name, verdict in verdicts.items():
        done = place.run("inspect", "--output=json", name, opens=(name,))
        assert (json.loads(done.out)["verdict"], done.status) == (verdict, statuses[verdict]), name

        class Arriving(WrappedStorage):
            """An object that is nowhere a file yet."""

            def descriptor(self) -> int | None:
                return None

            def name(self) -> str:
                return "upload"

        upload = Arriving(MemoryStorage((place.folder / name).read_bytes()))
        assert underlay.inspect(upload).verdict == verdict


def test_cve_2024_7409_nothing_is_served_and_no_name_makes_a_connection(
    place: Place, qemu_img: Tool
) -> None:
    """There is no server to crash, and no client: a storage that makes one is a plug-in's."""
    registry = plugins.registry()
    assert not any(map(registry.has_scheme, ("nbd", "nbd+unix", "http", "https", "ssh", "ftp")))
    evil = place.folder / "evil"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        name = f"nbd://127.0.0.1:{server.getsockname()[1]}/x"
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", evil, "64k")
        for gate in ("deny", "directory", "permissive"):
            place.refused("map", f"--gate={gate}", "evil", opens=("evil",))
        place.refused("map", name)
        with pytest.raises(BlockingIOError):
            server.accept()


# -- the list


def test_docs_security_lists_each_attack_with_its_test() -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:CVE|lima).*?) \|.*\| `(\w+)` \|$", page, re.MULTILINE)
    told = {test: set(re.findall(r"\d{4}-\d{4,5}|#5441", ids)) for ids, test in rows}
    played = {
        name: {f"{year}-{number}" for year, number in re.findall(r"(\d{4})_(\d{4,5})", name)}
        for name in globals()
        if name.startswith("test_cve_")
    }
    assert told == played | {
        "test_lima_5441_one_gate_is_asked_for_each_name_of_every_format": {"#5441"}
    }
