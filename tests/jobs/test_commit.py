"""Committing: the image shows the same at any time, and so does the one that was written."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay
from underlay.jobs import Progress, commit
from underlay_drivers.qcow2 import writeback

from .chains import Chains
from .conftest import Make

Tool = Callable[..., str]

GATE = underlay.PermissiveImplicitOpenGate()


@pytest.fixture
def chains(tmp_path: Path, qemu_img: Tool, qemu_io: Tool) -> Callable[[int], Chains]:
    return lambda seed: Chains(tmp_path, random.Random(seed), qemu_img, qemu_io)


@pytest.mark.parametrize("seed", range(100, 110))
def test_the_base_gets_what_the_image_shows(seed: int, chains: Callable[[int], Chains]) -> None:
    made = chains(seed)
    images = made.chain(seed % 4)
    top = made.image("top.qcow2", images[0])
    base = made.chance.choice((None, None, *images))
    content = made.content(top)
    keep = made.chance.random() < 1 / 3
    done = commit(
        top,
        base=None if base is None else base.name,
        keep=keep,
        parallel=made.chance.choice((1, 4)),
        gate=GATE,
    )
    written = made.content(images[0] if base is None else base)
    assert written[: len(content)] == content
    assert len(written) == done.size >= len(content)
    assert made.content(top) == content
    assert made.is_sound(top)
    assert made.is_sound(images[0] if base is None else base)
    assert done.emptied == (base is None and not keep)
    if done.emptied:
        with underlay.open_image(top, format="qcow2", backing=None) as disk:
            assert all(extent.is_zero for extent in disk.extents())


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
        "compat=0.10",
        "compat=0.10,cluster_size=512",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=512",
        "lazy_refcounts=on",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "data_file={}/data",
        "data_file={}/data,extended_l2=on,refcount_bits=8",
        "snapshot",
        "snapshot,compat=0.10",
        "bitmap",
    ],
)
def test_an_emptied_image_is_as_short_as_qemus(
    options: str, make: Make, chains: Callable[[int], Chains], qemu_img: Tool, tmp_path: Path
) -> None:
    base = make("base.raw", "raw", "9M", "write -P 1 0 1M")
    given = [word.format(tmp_path) for word in options.split(",")]
    kept = [word for word in given if "=" not in word]
    top = make(
        "top.qcow2",
        "qcow2",
        "9M",
        options=",".join(word for word in given if "=" in word),
        backing=base,
    )
    if "snapshot" in kept:
        qemu_img("snapshot", "-c", "old", top)
    if "bitmap" in kept:
        qemu_img("bitmap", "--add", top, "dirty")
    qemu_io = chains(0).qemu_io
    commands = ("write -P 2 100k 700k", "write -z 1M 200k", "discard 8M 100k")
    qemu_io(*(word for command in commands for word in ("-c", command)), top)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    content = chains(0).content(top)
    lengths: list[int] = []
    blocks: list[int] = []
    for empty in (lambda: qemu_img("commit", "-q", top), lambda: commit(top, gate=GATE)):
        for path, data in before.items():
            path.write_bytes(data)
        empty()
        lengths.append(top.stat().st_size)
        blocks.append(top.stat().st_blocks)

    assert chains(0).content(top) == chains(0).content(base) == content
    assert chains(0).is_sound(top)
    assert lengths[1] <= lengths[0]
    # What the bitmap got to tell lies in a cluster of its own.
    assert blocks[1] <= blocks[0] + (136 if "bitmap" in kept else 8)
    if "data" in options:
        assert not (tmp_path / "data").stat().st_blocks
    qemu_io("-c", "write -P 7 5M 2M", top)
    assert chains(0).is_sound(top)


def test_an_image_whose_mappings_are_in_use_is_emptied_all_the_same(
    make: Make, chains: Callable[[int], Chains], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writeback, "_LONGEST_LEASE", 0.01)
    base = make("base.qcow2", "qcow2", "1M")
    top = make("top.qcow2", "qcow2", "1M", "write -P 1 0 512k", backing=base)
    with (
        underlay.open_any(base, writable=True) as below,
        underlay.open_image(top, format="qcow2", backing=below, writable=True) as disk,
    ):
        with disk.lease():
            mapping = disk.get_mapping(0)
            assert isinstance(mapping, underlay.Data)
            assert commit(disk).emptied
            assert top.read_bytes()[mapping.offset :][:9] == b"\1" * 9
        assert disk.read_bytes(0, 9) == b"\1" * 9
    assert top.stat().st_size <= 5 << 16
    assert chains(0).is_sound(top)


def test_what_lies_behind_the_image_in_a_longer_base_stays(make: Make, qemu_io: Tool) -> None:
    base = make("base.qcow2", "qcow2", "2M", "write -P 1 0 2M")
    top = make("top.qcow2", "qcow2", "1M", "write -P 2 512k 512k", backing=base)
    done = commit(top, gate=GATE)
    assert (done.size_before, done.size) == (2 << 20, 2 << 20)
    qemu_io("-r", "-c", "read -P 1 0 512k", "-c", "read -P 2 512k 512k", base)
    qemu_io("-r", "-c", "read -P 1 1M 1M", base)


def test_zeroes_past_a_short_image_between_reach_a_longer_base(
    make: Make, chains: Callable[[int], Chains]
) -> None:
    base = make("base.raw", "raw", "4M", "write -P 1 0 4M")
    middle = make("middle.qcow2", "qcow2", "1M", backing=base)
    top = make("top.qcow2", "qcow2", "3M", backing=middle)
    commit(top, base="base.raw", gate=GATE)
    content = chains(0).content(base)
    assert content == b"\1" * (1 << 20) + bytes(2 << 20) + b"\1" * (1 << 20)


@pytest.mark.parametrize("name", ["base.raw", "./base.raw", "{}/base.raw", "{}/sub/../base.raw"])
def test_a_base_is_called_by_any_of_its_names(name: str, make: Make, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    base = make("base.raw", "raw", "1M")
    middle = make("middle.qcow2", "qcow2", "1M", "write -P 3 0 64k", backing=base)
    top = make("top.qcow2", "qcow2", "1M", backing=middle)
    assert commit(top, base=name.format(tmp_path), gate=GATE).data == 64 << 10
    assert base.read_bytes()[:9] == b"\3" * 9


@pytest.mark.parametrize("name", ["", "top.qcow2", "gone.raw"])
def test_a_name_that_nobody_in_the_chain_has_is_an_error(name: str, make: Make) -> None:
    top = make("top.qcow2", "qcow2", "1M", backing=make("base.raw", "raw", "1M"))
    with pytest.raises(underlay.OptionError, match="Did not find"):
        commit(top, base=name, gate=GATE)


def test_an_image_upon_nothing_has_nowhere_to_go(make: Make) -> None:
    with pytest.raises(underlay.UnsupportedOperationError, match="backing"):
        commit(make("top.qcow2", "qcow2", "1M"), gate=GATE)


def test_the_gate_is_told_which_image_is_to_be_written(make: Make) -> None:
    asked: list[tuple[str, bool]] = []

    class Asking(underlay.ImplicitOpenGate):
        def decide(self, request: underlay.ImplicitOpenRequest) -> underlay.Allow:
            asked.append((request.reference.name, request.reference.writable))
            return underlay.Allow()

    base = make("base.raw", "raw", "1M")
    middle = make("middle.qcow2", "qcow2", "1M", backing=base)
    top = make("top.qcow2", "qcow2", "1M", backing=middle)
    commit(top, gate=Asking())
    assert asked == [("middle.qcow2", True), ("base.raw", False)]
    asked.clear()
    commit(top, base="base.raw", gate=Asking())
    assert asked == [("middle.qcow2", False), ("base.raw", True)]
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        commit(top)


def test_a_base_that_somebody_reads_cannot_be_written(make: Make) -> None:
    base = make("base.qcow2", "qcow2", "1M")
    top = make("top.qcow2", "qcow2", "1M", "write -P 1 0 64k", backing=base)
    before = base.read_bytes(), top.read_bytes()
    with underlay.open_any(base), pytest.raises(underlay.ImageInUseError):
        commit(top, gate=GATE)
    assert (base.read_bytes(), top.read_bytes()) == before


def test_a_base_whose_format_was_guessed_is_not_written(make: Make) -> None:
    make("base.raw", "raw", "1M")
    top = make("top.qcow2", "qcow2", "1M", options="compat=0.10")
    name = b"base.raw"
    with top.open("r+b") as file:
        file.seek(200)
        file.write(name)
        file.seek(8)
        file.write((200).to_bytes(8, "big") + len(name).to_bytes(4, "big"))
    gate = underlay.PermissiveImplicitOpenGate(probe=True)
    with underlay.open_any(top, gate=gate) as disk:
        assert disk.backing is not None
    with pytest.raises(underlay.InvalidImageError, match="records no format"):
        commit(top, gate=gate)


def test_open_disks_are_taken_as_they_are(make: Make, chains: Callable[[int], Chains]) -> None:
    base = make("base.qcow2", "qcow2", "1M")
    top = make("top.qcow2", "qcow2", "1M", "write -P 1 0 64k", backing=base)
    content = chains(0).content(top)
    with (
        underlay.open_any(base) as below,
        underlay.open_image(top, format="qcow2", backing=below, writable=True) as disk,
        pytest.raises(underlay.ReadOnlyError, match="commit to"),
    ):
        commit(disk)
    with (
        underlay.open_any(base, writable=True) as below,
        underlay.open_image(top, format="qcow2", backing=below, writable=True) as disk,
    ):
        assert commit(disk).data == 64 << 10
        assert disk.read_bytes(0, 1 << 20) == content
    assert chains(0).content(base) == content


def test_one_that_is_cancelled_leaves_the_image_as_it_was(
    make: Make, chains: Callable[[int], Chains]
) -> None:
    base = make("base.qcow2", "qcow2", "16M", "write -P 1 0 16M")
    top = make("top.qcow2", "qcow2", "32M", "write -P 2 0 32M", backing=base)
    before = top.read_bytes()

    def cancel(progress: Progress) -> None:
        if progress.done > progress.total // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit(top, gate=GATE, progress=cancel)
    assert top.read_bytes() == before
    assert chains(0).is_sound(top)
    assert chains(0).is_sound(base)
    assert len(chains(0).content(base)) == 32 << 20


def test_progress_ends_with_all_and_a_rate_is_kept_to(make: Make) -> None:
    base = make("base.raw", "raw", "4M")
    top = make("top.qcow2", "qcow2", "4M", "write -P 2 0 2M", backing=base)
    told: list[Progress] = []
    commit(top, gate=GATE, progress=told.append, rate=100 << 20, keep=True)
    assert told[0].done == 0
    assert told[-1].done == told[-1].total == 4 << 20
