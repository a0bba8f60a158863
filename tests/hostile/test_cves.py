"""The attacks of docs/security.md, each played against the library and the command.

Where the real qemu-img still falls for one, it is shown to: what we withstand is an attack.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import attrs
import pytest

import underlay
from underlay import plugins
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

from .attacks import LOOKS, Place, look
from .editing import Image

if TYPE_CHECKING:
    from tests.conftest import Tool


_DATA_FILE_NAME = 0x44415441
_MIB = 1 << 20


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


@pytest.mark.parametrize("command", LOOKS, ids=" ".join)
def test_cve_2015_5163_no_command_follows_what_an_upload_names(
    place: Place, qemu_img: Tool, command: tuple[str, ...]
) -> None:
    evil = place.folder / "evil"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", place.secret, "-F", "raw", evil, "64k")
    told = place.refused(*look(command, "evil"), opens=("evil",))
    assert f"names the backing file '{place.secret}', which was not opened" in told


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


@pytest.mark.parametrize("command", LOOKS, ids=" ".join)
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
    told = place.refused(*look(command, "evil"), opens=("evil",))
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
    create("elsewhere", "qcow2", "-o", f"data_file={place.folder / 'data'}")
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
    """There is no server to crash, and storages of the network open what a caller allows."""
    registry = plugins.registry()
    assert not any(map(registry.has_scheme, ("nbd", "nbd+unix", "ssh", "ftp")))
    evil = place.folder / "evil"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        where = f"://127.0.0.1:{server.getsockname()[1]}/x"
        for scheme, gates in (
            ("nbd", ("deny", "directory", "permissive")),
            ("http", ("deny", "directory")),
            ("s3", ("deny", "directory")),
        ):
            name = scheme + where
            qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", evil, "64k")
            for gate in gates:
                place.refused("map", f"--gate={gate}", "evil", opens=("evil",))
        place.refused("map", f"nbd{where}")
        with pytest.raises(BlockingIOError):
            server.accept()


# -- the list


def test_docs_security_lists_each_attack_with_its_test() -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:CVE|lima).*?) \|.*\| `(\w+)` \|$", page, re.MULTILINE)
    told = {test: set(re.findall(r"\d{4}-\d{4,5}|#5441", ids)) for ids, test in rows}
    played: dict[str, set[str]] = {}
    for module in Path(__file__).parent.glob("test_cves*.py"):
        tests = re.findall(r"^def (test_(?:cve|lima)_\w+)", module.read_text("utf-8"), re.MULTILINE)
        for name in tests:
            numbers = re.findall(r"(\d{4})_(\d{4,5})", name)
            played[name] = {f"{year}-{number}" for year, number in numbers} or {"#5441"}
    assert told == played
