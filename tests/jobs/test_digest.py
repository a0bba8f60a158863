"""The hash of a disk is that of its bytes, however they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay
from underlay.jobs import Progress, digest

from .conftest import Make
from .files import write_mixed

Tool = Callable[..., str]

_BLOCK = 64 << 10


def _by_the_book(content: bytes, algorithm: str = "sha256") -> str:
    """Version 1, as docs/cli.md says it."""
    blocks = [
        content[at : at + _BLOCK].ljust(_BLOCK, b"\0") for at in range(0, len(content), _BLOCK)
    ]
    leaves = [hashlib.new(algorithm, block).digest() for block in blocks]
    groups = [
        hashlib.new(algorithm, b"".join(leaves[at : at + 1024])).digest()
        for at in range(0, len(leaves), 1024)
    ]
    root = b"underlay-digest-1\0" + len(content).to_bytes(8, "big") + b"".join(groups)
    return hashlib.new(algorithm, root).hexdigest()


def _digest(path: Path, **options: str) -> str:
    with underlay.open_any(path, gate=underlay.DirectoryGate()) as disk:
        return digest(disk, **options).hex  # type: ignore[arg-type]


def test_it_is_what_the_book_says_however_the_bytes_are_stored(
    tmp_path: Path, qemu_img: Tool
) -> None:
    raw = write_mixed(tmp_path / "mixed.raw", size=(70 << 20) + 12_800)
    expected = _by_the_book(raw.read_bytes())
    assert _digest(raw) == expected
    for number, how in enumerate(
        ("", "-c", "-c -o compression_type=zstd", "-S 0", "-o cluster_size=4k", "-o extended_l2=on")
    ):
        image = tmp_path / f"{number}.qcow2"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", *how.split(), raw, image)
        assert _digest(image) == expected, how


@pytest.mark.parametrize("size", [0, 1, _BLOCK - 1, _BLOCK, _BLOCK + 1, 1_000_001])
@pytest.mark.parametrize("algorithm", ["sha256", "blake2b", "md5"])
def test_sizes_on_and_off_the_borders(size: int, algorithm: str, tmp_path: Path) -> None:
    content = (b"some %d" % size * size)[:size]
    (tmp_path / "a.raw").write_bytes(content)
    assert _digest(tmp_path / "a.raw", algorithm=algorithm) == _by_the_book(content, algorithm)


def test_a_longer_disk_of_zeroes_is_another(tmp_path: Path) -> None:
    found: set[str] = set()
    for size in (0, 1, 512, _BLOCK, 64 << 20, 65 << 20):
        with (tmp_path / "zero.raw").open("wb") as file:
            file.truncate(size)
        found.add(_digest(tmp_path / "zero.raw"))
        assert _digest(tmp_path / "zero.raw") == _by_the_book(bytes(size))
    assert len(found) == 6


def test_holes_cost_nothing(make: Make) -> None:
    image = make("huge.qcow2", "qcow2", "60T", "write -P 1 40T 64k")
    with underlay.open_any(image) as disk:
        result = digest(disk)
        read = sum(stats.read_bytes for stats in disk.stats().values())
    assert str(result) == f"underlay1-sha256:{result.hex}"
    assert result.size == 60 << 40
    assert read < 2 << 20


def test_through_a_chain(make: Make, tmp_path: Path, qemu_img: Tool) -> None:
    base = make("base.qcow2", "qcow2", "1M", "write -P 1 0 256k")
    top = make("top.qcow2", "qcow2", "3M", "write -P 2 64k 64k", backing=base)
    qemu_img("convert", "-O", "raw", top, tmp_path / "flat.raw")
    assert _digest(top) == _digest(tmp_path / "flat.raw")


def test_progress_and_cancelling(tmp_path: Path) -> None:
    raw = write_mixed(tmp_path / "mixed.raw", size=20 << 20)
    seen: list[Progress] = []
    with underlay.open_any(raw) as disk:
        digest(disk, progress=seen.append)
        assert seen[0].done == 0
        assert seen[-1].done == seen[-1].total == 20 << 20

        def cancel(progress: Progress) -> None:
            if progress.done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            digest(disk, progress=cancel)


@pytest.mark.parametrize("algorithm", ["none", "shake_128", ""])
def test_an_unknown_algorithm_is_refused(algorithm: str, mixed: Path) -> None:
    with (
        underlay.open_any(mixed) as disk,
        pytest.raises(underlay.OptionError, match="hash function"),
    ):
        digest(disk, algorithm=algorithm)
