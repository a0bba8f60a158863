"""Amending images: QEMU agrees with every image that was, and what nobody knows survives."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import attrs
import pytest

import underlay
from underlay import jobs
from underlay.capabilities import Amendable, Describable, Snapshottable
from underlay.errors import LimitExceededError, OptionError, ReadOnlyError
from underlay_drivers.qcow2 import layout
from underlay_drivers.qcow2.header import Extension, Header
from underlay_drivers.qcow2.header_writing import plan_header

from .ends import Ends, pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

_KIB = 1 << 10
#: A header extension that nobody knows.
_STRANGE = Extension(0x5354524E, b"strange things")


def amend(ends: Ends, **options: object) -> None:
    """Amend an image that is open with all that it names."""
    with ends.open() as disk:
        disk.capability(Amendable).amend(options)


def fill(ends: Ends) -> None:
    """Data, zeroes with room and without, compressed data, and two snapshots that share it."""
    cluster = ends.header.cluster_size
    with ends.open() as disk:
        snapshots = disk.capability(Snapshottable)
        ends.write(disk, 0, pattern(6 * cluster))
        if ends.header.version == 3:
            disk.write_zeroes(cluster, cluster)  # keeps its room
            ends.put(cluster, bytes(cluster))
            disk.discard_to_zero(2 * cluster, cluster)
            ends.put(2 * cluster, bytes(cluster))
            disk.write_zeroes(8 * cluster, 2 * cluster)
            ends.put(8 * cluster, bytes(2 * cluster))
        snapshots.create_snapshot("one")
        snapshots.create_snapshot("two")
        ends.write(disk, 3 * cluster, pattern(cluster, 2))
        disk.flush()
    ends.they_write(10 * cluster, cluster, 9, "-c")


def contents(ends: Ends) -> dict[str, bytes]:
    """What QEMU reads in each snapshot."""
    return {name: ends.their_bytes("-l", name) for name in ("one", "two")}


@pytest.mark.parametrize("below", [b"", pattern(700 * _KIB, 3)], ids=["alone", "backing"])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_the_version_goes_down_and_up(ends: Ends, below: bytes, cluster_size: int) -> None:
    ends.create(1 << 20, below=below, cluster_size=cluster_size)
    fill(ends)
    before = contents(ends)
    for compat, told in (("v2", "0.10"), ("v3", "1.1"), ("0.10", "0.10"), ("1.1", "1.1")):
        amend(ends, compat=compat)
        assert ends.info()["format-specific"]["data"]["compat"] == told
        ends.agree()
        assert contents(ends) == before
        ends.they_write(11 * cluster_size + 5, 300, 7)
        ends.agree()


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_zero_clusters_become_what_version_2_can_say(ends: Ends, cluster_size: int) -> None:
    below = pattern(64 * cluster_size)
    ends.create(64 * cluster_size, below=below, cluster_size=cluster_size)
    with ends.open() as disk:
        disk.write_zeroes(cluster_size, 7 * cluster_size)
        ends.put(cluster_size, bytes(7 * cluster_size))
        disk.capability(Snapshottable).create_snapshot("one")
    amend(ends, compat="v2")
    ends.agree()
    entries = [ends.l2_entry(number * cluster_size)[1] for number in range(1, 8)]
    assert all(entry & layout.HOST_OFFSET and not entry & layout.ZERO for entry in entries)
    assert ends.their_bytes("-l", "one") == ends.model


def test_nothing_takes_room_where_nothing_lies_below(ends: Ends) -> None:
    ends.create(1 << 30)
    with ends.open() as disk:
        disk.discard_to_zero(0, 1 << 30)
        disk.write_zeroes(0, 1 << 30)
        disk.write(b"x", 0)
    amend(ends, compat="v2")
    assert ends.blocks < 1 << 20
    assert ends.l2_entry(1 << 20)[1] == 0


@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_reference_counts_become_wider_and_narrower(
    ends: Ends, bits: int, cluster_size: int
) -> None:
    ends.create(1 << 20, cluster_size=cluster_size, refcount_bits=16 if bits != 16 else 8)
    with ends.open() as disk:
        ends.write(disk, 0, pattern(300 * _KIB))
    amend(ends, refcount_bits=bits)
    assert ends.header.refcount_bits == bits
    ends.agree()
    ends.they_write(600 * _KIB, 70 * _KIB, 3)
    with ends.open() as disk:
        ends.write(disk, 900 * _KIB, pattern(30 * _KIB, 4))
        disk.capability(Amendable).amend({"refcount_bits": 64})
        ends.write(disk, 800 * _KIB, pattern(30 * _KIB, 5))
    ends.agree()


def test_counts_that_are_too_high_are_refused_before_anything_changes(ends: Ends) -> None:
    ends.create(1 << 20)
    fill(ends)
    for bits, options in ((1, {}), (1, {"lazy_refcounts": True, "size": 2 << 20})):
        before = ends.path.read_bytes()
        with pytest.raises(OptionError, match="Cannot decrease refcount entry width to 1 bits"):
            amend(ends, refcount_bits=bits, **options)
        assert ends.path.read_bytes() == before
    amend(ends, refcount_bits=2)
    ends.agree()


def test_what_the_old_counts_took_is_used_again(ends: Ends) -> None:
    ends.create(1 << 20, cluster_size=4096)
    with ends.open() as disk:
        ends.write(disk, 0, pattern(512 * _KIB))
    for bits in (64, 1, 32, 2, 16) * 3:
        amend(ends, refcount_bits=bits)
    with ends.open() as disk:
        ends.write(disk, 512 * _KIB, pattern(100 * _KIB))
    ends.agree()
    assert ends.path.stat().st_size < 750 * _KIB


def test_the_backing_reference_changes_and_goes(ends: Ends) -> None:
    below = pattern(1 << 20)
    ends.create(1 << 20, below=below)
    other = ends.folder / "a much longer name of the very same bytes.raw"
    other.write_bytes(below)
    amend(ends, backing_file=other.name, backing_fmt="raw")
    told = ends.info()
    assert (told["backing-filename"], told["backing-filename-format"]) == (other.name, "raw")
    ends.agree()
    amend(ends, backing_file="base.raw", backing_fmt="raw")
    ends.agree()
    amend(ends, backing_file="")
    assert "backing-filename" not in ends.info()
    ends.model[:] = bytes(1 << 20)
    ends.agree()


def test_a_disk_goes_on_with_the_backing_image_that_it_has(ends: Ends) -> None:
    below = pattern(1 << 20)
    ends.create(1 << 20, below=below)
    with ends.open() as disk:
        disk.capability(Amendable).amend({"backing_file": ""})
        assert disk.read_bytes(0, 1 << 20) == below
    with ends.open() as disk:
        assert disk.read_bytes(0, 1 << 20) == bytes(1 << 20)


@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 65536])
def test_names_must_fit_into_the_first_cluster(ends: Ends, cluster_size: int) -> None:
    ends.create(1 << 20, cluster_size=cluster_size)
    longest = 0
    for length in (100, 300, 390, 400, 1000, 1023):
        before = ends.path.read_bytes()
        try:
            amend(ends, backing_file="n" * length, backing_fmt="raw")
        except LimitExceededError:
            assert ends.path.read_bytes() == before
        else:
            longest = length
            with ends.open(backing=None) as disk:
                assert disk.capability(Describable).describe().backing_name == "n" * length
            amend_alone(ends, backing_file="")
    assert longest == (300 if cluster_size == 512 else 1023 if cluster_size > 1024 else longest)
    assert longest >= 300
    with pytest.raises(OptionError):
        amend(ends, backing_file="n" * 1024, backing_fmt="raw")
    ends.agree()


def amend_alone(ends: Ends, **options: object) -> None:
    """Amend an image of which nothing that it names is there."""
    jobs.amend(ends.path, options, format="qcow2")


@pytest.mark.parametrize("compat", ["v2", "v3"])
def test_what_nobody_knows_survives(ends: Ends, compat: str) -> None:
    """Header extensions, compatible bits, and the extra data of snapshots, byte for byte."""
    ends.create(1 << 20, compat=compat)
    (ends.folder / "base.raw").write_bytes(b"")
    fill(ends)
    header = ends.header
    if compat == "v3":
        header = attrs.evolve(header, compatible_features=1 << 40)
    header = attrs.evolve(header, extensions=(*header.extensions, _STRANGE))
    ends.poke(0, "512s", header.to_bytes()[:512])
    ends.poke(512, "512s", header.to_bytes()[512:])
    # The first snapshot's extra data grows over its name's padding: by bytes of the future.
    start = header.snapshots_offset
    data = ends.path.read_bytes()[start : start + 512]
    extra = int.from_bytes(data[36:40], "big")
    assert extra == 24
    table = data[:36] + (32).to_bytes(4, "big") + data[40:64] + b"futurely" + data[64:]
    ends.poke(start, "512s", table[:512])
    for options in (
        {"lazy_refcounts": True},
        {"refcount_bits": 64},
        {"backing_file": "base.raw", "backing_fmt": "raw"},
        {"backing_file": ""},
        {"size": 2 << 20},
    ):
        given = {"compat": "v3"} | options
        amend(ends, **given)
        if "size" in options:
            ends.model.extend(bytes(1 << 20))
        assert _STRANGE in ends.header.extensions
        assert ends.header.compatible_features >> 40 == (compat == "v3")
        assert b"futurely" in ends.path.read_bytes()[ends.header.snapshots_offset :][:100]
        with ends.open(writable=False, backing=None) as disk:
            assert len(disk.capability(Snapshottable).snapshots()) == 2
        ends.qemu_img("check", "-q", ends.path)
    ends.agree()


def test_bitmaps_survive_what_does_not_touch_the_guests_data(ends: Ends) -> None:
    ends.create(1 << 20)
    ends.qemu_img("bitmap", "--add", ends.path, "dirty")
    amend(ends, lazy_refcounts=True, refcount_bits=64)
    assert ends.info()["format-specific"]["data"]["bitmaps"][0]["flags"] == ["auto"]
    ends.agree()
    with pytest.raises(OptionError, match="bitmaps"):
        amend(ends, compat="v2", refcount_bits=16, lazy_refcounts=False)
    with ends.open() as disk:
        disk.capability(Amendable).amend({"lazy_refcounts": False})
        ends.write(disk, 0, b"x")
    assert ends.info()["format-specific"]["data"]["bitmaps"][0]["flags"] == ["auto"]


@pytest.mark.parametrize(
    ("made", "options", "why"),
    [
        ({}, {"compat": "v4"}, "Unknown compatibility level v4"),
        ({}, {"compat": 3}, "is no str"),
        ({}, {"refcount_bits": 3}, "Refcount width must be a power of two"),
        ({}, {"refcount_bits": True}, "is no int"),
        ({}, {"lazy_refcounts": "on"}, "is no bool"),
        ({}, {"cluster_size": 4096}, "known: backing_file"),
        ({}, {"size": -1}, "Image size cannot be negative"),
        ({"cluster_size": 512}, {"size": 1 << 42}, "too large"),
        ({}, {"data_file": "other"}, "data-file can only be set for images that use an external"),
        ({}, {"data_file_raw": True}, "data-file-raw cannot be set on existing images"),
        ({}, {"backing_file": "base"}, "Backing file specified without backing format"),
        ({}, {"backing_fmt": "raw"}, "Backing format cannot be used without backing file"),
        ({}, {"backing_file": "", "backing_fmt": "raw"}, "without backing file"),
        ({"data_file": "d"}, {"compat": "v2"}, "Cannot downgrade an image with a data file"),
        ({"extended_l2": True}, {"compat": "v2"}, "incompatible features 0x10 set"),
        ({"compression_type": "zstd"}, {"compat": "v2"}, "compression type zstd"),
        ({"refcount_bits": 8}, {"compat": "v2"}, "compat=0.10 requires refcount_bits=16"),
        ({}, {"compat": "v2", "lazy_refcounts": True}, "Lazy refcounts only supported"),
        ({"compat": "v2"}, {"lazy_refcounts": True}, "Lazy refcounts only supported"),
        ({"compat": "v2"}, {"refcount_bits": 8}, "Refcount widths other than 16 bits require"),
        (
            {"data_file": "d", "data_file_raw": True},
            {"backing_file": "b", "backing_fmt": "raw"},
            "at the same time",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_nothing_changes(
    ends: Ends, made: dict[str, Any], options: dict[str, object], why: str
) -> None:
    ends.create(1 << 20, **made)
    before = ends.path.read_bytes()
    with pytest.raises(OptionError, match=why):
        amend(ends, **options, **({} if "lazy_refcounts" in options else {"lazy_refcounts": False}))
    assert ends.path.read_bytes() == before


def test_snapshots_of_another_size_prevent_a_downgrade(ends: Ends) -> None:
    ends.create(1 << 20)
    ends.snapshot("-c", "one")
    with pytest.raises(OptionError, match="Internal snapshots prevent downgrade of image"):
        amend(ends, compat="v2", size=2 << 20)
    amend(ends, size=2 << 20)
    ends.model.extend(bytes(1 << 20))
    with pytest.raises(OptionError, match="Internal snapshots prevent downgrade of image"):
        amend(ends, compat="v2")
    ends.agree()


def test_unknown_features_prevent_a_downgrade(ends: Ends) -> None:
    ends.create(1 << 20)
    ends.poke(80, "Q", 1 << 40)
    with pytest.raises(OptionError, match="unknown compatible features 0x10000000000"):
        amend(ends, compat="v2")


def test_a_data_file_gets_another_name_and_stops_being_raw(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ends.folder)  # from where QEMU sees a data file
    ends.create(1 << 20, data_file="data", data_file_raw=True)
    with ends.open() as disk:
        ends.write(disk, 4000, pattern(100_000))
    (ends.folder / "data").rename(ends.folder / "moved")
    amend_alone(ends, data_file="moved", data_file_raw=False)
    told = ends.info()["format-specific"]["data"]
    assert (told["data-file"], told["data-file-raw"]) == ("moved", False)
    ends.agree()
    amend_alone(ends, data_file="")
    assert ends.header.data_file is None


def test_the_size_changes_with_the_rest(ends: Ends) -> None:
    ends.create(1 << 20, below=pattern(3 << 20))
    amend(ends, size=2 << 20, lazy_refcounts=True, refcount_bits=32)
    ends.model.extend(bytes(1 << 20))
    ends.agree()
    amend(ends, size=512 * _KIB, refcount_bits=16, compat="v2")
    del ends.model[512 * _KIB :]
    ends.agree()
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        jobs.amend(ends.path, {"size": "2M"})
    jobs.amend(ends.path, {"size": "2M"}, gate=underlay.DirectoryGate())
    ends.model.extend(bytes(1536 * _KIB))
    ends.agree()


def test_a_read_only_disk_is_not_amended(ends: Ends) -> None:
    ends.create(1 << 20)
    with ends.open(writable=False) as disk, pytest.raises(ReadOnlyError):
        disk.capability(Amendable).amend({"lazy_refcounts": True})


def test_the_job_takes_words_and_tells_how_far_it_is(ends: Ends) -> None:
    ends.create(1 << 20)
    steps: list[jobs.Progress] = []
    jobs.amend(ends.path, {"refcount_bits": "8", "lazy_refcounts": "on"}, progress=steps.append)
    assert steps
    assert steps[-1].done == steps[-1].total
    assert ends.header.refcount_bits == 8
    with pytest.raises(OptionError, match="known: backing_file"):
        jobs.amend(ends.path, {"nonsense": 1})
    raw = ends.folder / "disk.raw"
    raw.write_bytes(bytes(512))
    with pytest.raises(underlay.UnsupportedOperationError, match="does not support"):
        jobs.amend(raw, {"size": 1024}, format="raw")


# -- the steps from one header to another


def _states(before: bytes, steps: list[tuple[int, bytes]]) -> Iterator[bytes]:
    """What is on disk after any part of the steps, each sector of each on its own."""
    disk = bytearray(before)
    for offset, data in steps:
        sectors = range(offset // 512, -(-(offset + len(data)) // 512))
        for chosen in itertools.product((False, True), repeat=min(len(sectors), 6)):
            torn = bytearray(disk)
            for sector, written in zip(sectors, chosen, strict=False):
                if written:
                    start, end = (
                        max(sector * 512, offset),
                        min(sector * 512 + 512, offset + len(data)),
                    )
                    torn[start:end] = data[start - offset : end - offset]
            yield bytes(torn)
        disk[offset : offset + len(data)] = data
    yield bytes(disk)


def _names(data: bytes) -> tuple[object, ...]:
    header, problem = Header.unpack(data).with_extensions(data)
    assert problem is None
    header = header.with_backing_name(data)
    return header.version, header.backing_name, header.backing_format, header.data_file


@pytest.mark.parametrize("name_from", ["", "base.raw", "b" * 600])
@pytest.mark.parametrize("name_to", ["", "other", "c" * 700])
def test_a_header_is_the_old_one_or_the_new_one_at_any_time(
    ends: Ends, name_from: str, name_to: str
) -> None:
    ends.create(1 << 20, data_file="d")
    old = attrs.evolve(ends.header, extensions=(*ends.header.extensions, _STRANGE))
    old = _with_name(old, name_from)
    old = Header.unpack(old.to_bytes()).with_extensions(old.to_bytes())[0]
    old = old.with_backing_name(_with_name(old, name_from).to_bytes())
    before = old.to_bytes().ljust(8192, b"\0")
    new = _with_name(old, name_to)
    steps, placed = plan_header(old, new)
    seen = {_names(state) for state in _states(before, steps)}
    assert seen == {_names(before), _names(new.to_bytes().ljust(8192, b"\0"))}
    *_, last = _states(before, steps)
    assert last == new.to_bytes().ljust(8192, b"\0")
    assert placed.fixed_bytes() == last[: len(placed.fixed_bytes())]


def _with_name(header: Header, name: str) -> Header:
    others = [e for e in header.extensions if e.type != layout.EXTENSION_BACKING_FORMAT]
    if name:
        others.insert(0, Extension(layout.EXTENSION_BACKING_FORMAT, b"raw"))
    return attrs.evolve(header, backing_name=name.encode(), extensions=tuple(others))
