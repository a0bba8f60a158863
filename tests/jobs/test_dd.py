"""dd copies what qemu-img dd copies, in its odd cases too."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay
from underlay.jobs import dd

from .files import same, write_mixed

Tool = Callable[..., str]


@pytest.mark.parametrize(
    "numbers",
    [  # the size of a block, count, skip
        (512, None, 0),
        (512, None, 1),
        (1024, 3, 0),
        (1024, None, 2),
        (1024, 3, 2),  # count is counted from the start
        (1024, 3, 3),
        (1024, 2, 3),  # past the end
        (1000, None, 1),
        (3000, 2, 1),
        (100 << 10, None, 0),
        (1 << 20, 1, 0),
        (1024, None, 100_000),
        (512, 0, 0),
        (512, 1 << 30, 0),
        (65536, 5, 2),
        (1, 700, 13),
        ((1 << 31) - 1, None, 0),
    ],
)
@pytest.mark.parametrize("format_name", ["raw", "qcow2"])
def test_blocks_are_counted_as_qemu_counts_them(
    numbers: tuple[int, int | None, int], format_name: str, tmp_path: Path, qemu_img: Tool
) -> None:
    block_size, count, skip = numbers
    source = write_mixed(tmp_path / "source.raw", size=1_000_000)
    if format_name == "qcow2":
        qemu_img("convert", "-f", "raw", "-O", "qcow2", source, tmp_path / "source.qcow2")
        source = tmp_path / "source.qcow2"
    operands = [f"bs={block_size}", f"skip={skip}", f"if={source}", f"of={tmp_path / 'qemu.raw'}"]
    if count is not None:
        operands.append(f"count={count}")
    said = subprocess.run(
        ["qemu-img", "dd", "-f", format_name, "-O", "raw", *operands],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    with underlay.open_image(source, format=format_name) as disk:
        result = dd(disk, tmp_path / "ours.raw", block_size=block_size, count=count, skip=skip)
    assert same(tmp_path / "ours.raw", tmp_path / "qemu.raw")
    assert result.past_end == ("cannot skip" in said)


@pytest.mark.parametrize(
    "wrong",
    [{"block_size": 0}, {"block_size": 1 << 31}, {"count": -1}, {"skip": -1}, {"skip": 1 << 63}],
)
def test_impossible_numbers_are_refused(wrong: dict[str, int], mixed: Path, tmp_path: Path) -> None:
    (name,) = wrong
    with pytest.raises(underlay.OptionError, match=name):
        dd(mixed, tmp_path / "out.raw", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "out.raw").exists()


def test_an_existing_target_is_overwritten_only_when_asked(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "out.raw").write_bytes(b"old" * 1000)
    with pytest.raises(underlay.StorageExistsError):
        dd(mixed, tmp_path / "out.raw")
    dd(mixed, tmp_path / "out.raw", block_size=1 << 20, count=1, overwrite=True)
    assert (tmp_path / "out.raw").read_bytes() == mixed.read_bytes()[: 1 << 20]


def test_a_source_is_never_its_own_target(mixed: Path) -> None:
    with pytest.raises(underlay.ConflictError):
        dd(mixed, mixed, overwrite=True, lock=False)
