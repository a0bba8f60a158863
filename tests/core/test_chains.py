"""Backing chains: long ones, looping ones, ones with holes, and ones whose parts others hold."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

import underlay
from underlay.gate import DirectoryGate, PermissiveImplicitOpenGate
from underlay_storage.memory import MemoryStorage

from .toy_format import CLUSTER, pack

pytestmark = pytest.mark.usefixtures("toy")


def _chain(folder: Path, count: int) -> Path:
    """``count`` images, each with one cluster of its own; image 0 is the base."""
    content = b""
    for number in range(count):
        content = bytes(number % 300 * CLUSTER) + f"image {number}".encode().ljust(CLUSTER, b".")
        backing = f"{number - 1}.toy" if number else None
        (folder / f"{number}.toy").write_bytes(pack(content, backing=backing, size=300 * CLUSTER))
    return folder / f"{count - 1}.toy"


def test_a_chain_longer_than_the_limit_is_refused_and_closed(tmp_path: Path) -> None:
    top = _chain(tmp_path, 300)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(underlay.LimitExceededError) as caught:
        underlay.open_any(top, gate=DirectoryGate())
    assert (caught.value.limit, caught.value.allowed) == ("chain_depth", 200)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_chain_of_300_opens_and_reads_without_recursion(tmp_path: Path) -> None:
    top = _chain(tmp_path, 300)
    frames, frame = 0, sys._getframe()
    while frame.f_back is not None:
        frames, frame = frames + 1, frame.f_back
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(frames + 80)
    try:
        limits = underlay.Limits(chain_depth=400)
        with underlay.open_any(top, gate=DirectoryGate(), limits=limits) as disk:
            whole = disk.read_bytes(0, disk.size)
            for number in range(300):
                assert whole[number * CLUSTER :].startswith(f"image {number}.".encode())
            assert len(disk.chain()) == 300
            extents = list(disk.extents())
            assert [extent.depth for extent in extents] == list(range(299, -1, -1))
            assert len(disk.stats()) == 300
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(("depth", "fits"), [(2, False), (3, True), (4, True)])
def test_the_limit_counts_the_opened_image_too(tmp_path: Path, depth: int, fits: bool) -> None:
    top = _chain(tmp_path, 3)
    limits = underlay.Limits(chain_depth=depth)
    if fits:
        underlay.open_any(top, gate=DirectoryGate(), limits=limits).close()
    else:
        with pytest.raises(underlay.LimitExceededError, match="chain_depth"):
            underlay.open_any(top, gate=DirectoryGate(), limits=limits)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("disguise", ["{name}", "{folder}/{name}", "././{name}"])
def test_a_loop_is_an_error(tmp_path: Path, length: int, disguise: str) -> None:
    for number in range(length):
        name = f"{(number + 1) % length}.toy"
        stored = disguise.format(name=name, folder=tmp_path)
        (tmp_path / f"{number}.toy").write_bytes(pack(b"x", backing=stored))
    for gate in (DirectoryGate(), PermissiveImplicitOpenGate(probe=True)):
        with pytest.raises(underlay.InvalidImageError, match="loops"):
            underlay.open_any(tmp_path / "0.toy", gate=gate)


def test_a_loop_through_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "image.toy").write_bytes(pack(b"x", backing="hard.toy"))
    os.link(tmp_path / "image.toy", tmp_path / "hard.toy")
    with pytest.raises(underlay.InvalidImageError, match="loops"):
        underlay.open_any(tmp_path / "image.toy", gate=DirectoryGate())


def test_an_image_cannot_be_its_own_data_file(tmp_path: Path) -> None:
    (tmp_path / "image.toy").write_bytes(pack(b"x", data_file="image.toy"))
    with pytest.raises(underlay.InvalidImageError, match="names itself"):
        underlay.open_any(tmp_path / "image.toy", gate=DirectoryGate())


@pytest.mark.parametrize("below", [1, CLUSTER, 2 * CLUSTER + 77, 5 * CLUSTER])
def test_a_backing_image_may_be_shorter_or_longer(tmp_path: Path, below: int) -> None:
    size = 3 * CLUSTER + 123
    content = b"b" * below
    (tmp_path / "base.toy").write_bytes(pack(content))
    (tmp_path / "top.toy").write_bytes(pack(b"", size=size, backing="base.toy"))
    with underlay.open_any(tmp_path / "top.toy", gate=DirectoryGate()) as disk:
        assert disk.read_bytes(0, size + 50) == content[:size].ljust(size + 50, b"\0")
        for extent in disk.extents():
            found = disk.read_bytes(extent.start, extent.length)
            assert extent.is_zero == (not any(found))
            assert extent.past_backing == (extent.start >= below)
            mapping = disk.get_mapping(extent.start)
            assert not isinstance(mapping, underlay.Eof)
            assert isinstance(mapping, underlay.Zero) == extent.is_zero
        assert disk.backing is not None
        assert disk.backing.size == below


def test_the_virtual_size_of_every_image_is_limited(tmp_path: Path) -> None:
    (tmp_path / "base.toy").write_bytes(pack(b"b" * 9 * CLUSTER))
    (tmp_path / "top.toy").write_bytes(pack(b"t" * CLUSTER, backing="base.toy"))
    limits = underlay.Limits(virtual_size=8 * CLUSTER)
    with pytest.raises(underlay.LimitExceededError, match="virtual size"):
        underlay.open_any(tmp_path / "top.toy", gate=DirectoryGate(), limits=limits)


def test_what_cannot_be_opened_says_who_names_it(tmp_path: Path) -> None:
    (tmp_path / "top.toy").write_bytes(pack(b"t", backing="gone.toy"))
    with pytest.raises(underlay.StorageNotFoundError) as caught:
        underlay.open_any(tmp_path / "top.toy", gate=DirectoryGate())
    for part in ("gone.toy", "top.toy", "backing file"):
        assert part in str(caught.value)


# -- disks that others opened


def test_one_backing_disk_serves_many_overlays() -> None:
    base = underlay.open_image(MemoryStorage(pack(b"shared" * 1000)), format="toy")
    overlays = [
        underlay.open_image(
            MemoryStorage(pack(b"", size=6000, backing="x")),
            format="toy",
            backing=base,
            writable=True,
        )
        for _ in range(3)
    ]
    for number, overlay in enumerate(overlays):
        overlay.write(str(number).encode() * 6, 0)
    assert [overlay.read_bytes(0, 12) for overlay in overlays] == [
        b"000000shared",
        b"111111shared",
        b"222222shared",
    ]
    for overlay in overlays:
        overlay.close()
    assert base.read_bytes(0, 6) == b"shared", "it stays the caller's to close"
    base.close()


@pytest.mark.parametrize("gated", [False, True])
def test_an_overlay_cannot_be_used_when_its_backing_disk_was_closed(gated: bool) -> None:
    base = underlay.open_image(MemoryStorage(pack(b"b" * 5000)), format="toy")
    top = MemoryStorage(pack(b"", size=5000, backing="x"))
    overlay = underlay.open_image(top, format="toy", backing=base, writable=True)
    user = underlay.open_image(
        MemoryStorage(pack(b"", size=5000, backing="x")), format="toy", backing=overlay
    )
    overlay.write(b"mine", 0)
    base.close()
    for disk in (overlay, user):
        with pytest.raises(underlay.ClosedError, match="backing image"):
            disk.read(bytearray(10), 0)
        with pytest.raises(underlay.ClosedError):
            disk.write(b"x", 0)
        disk.close()
    with underlay.open_image(top, format="toy", backing=None) as again:
        assert again.read_bytes(0, 4) == b"mine", "closing it still flushed what was written"


def test_a_closed_disk_cannot_become_a_backing_image() -> None:
    base = underlay.open_image(MemoryStorage(pack(b"b")), format="toy")
    base.close()
    with pytest.raises(underlay.ClosedError):
        underlay.open_image(MemoryStorage(pack(b"")), format="toy", backing=base)


@pytest.mark.parametrize("backing", ["base.toy", 5, b"x", MemoryStorage(5)])
def test_a_backing_image_is_given_as_a_disk(backing: object) -> None:
    with pytest.raises(TypeError, match="open disk"):
        underlay.open_image(
            MemoryStorage(pack(b"")),
            format="toy",
            backing=backing,  # type: ignore[arg-type]
        )


def test_a_given_data_file_is_opened_without_a_gate(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"d" * 100)
    image = MemoryStorage(pack(b"x" * 100, data_file="/etc/passwd"))
    with underlay.open_image(image, format="toy", data_file=tmp_path / "data") as disk:
        names = [storage.name() for storage in disk.collect_storage_dependencies()]
        assert names == ["<memory>", str(tmp_path / "data")]
    with underlay.open_image(image, format="toy", data_file=None) as disk:
        assert len(disk.collect_storage_dependencies()) == 1


def test_chains_open_on_the_asynchronous_face(tmp_path: Path) -> None:
    async def check() -> None:
        top = _chain(tmp_path, 20)
        async with await underlay.aio.open_any(top, gate=DirectoryGate()) as disk:
            whole = await disk.read_bytes(0, 20 * CLUSTER)
            assert whole[7 * CLUSTER :].startswith(b"image 7.")
            assert [extent.depth async for extent in disk.extents()][:3] == [19, 18, 17]

    asyncio.run(check())
