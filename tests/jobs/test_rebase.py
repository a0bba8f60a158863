"""Rebasing: whatever lies below, before and after, the guest's bytes are the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay
from underlay.jobs import Progress, rebase

from .chains import Chains, format_of
from .conftest import Make

Tool = Callable[..., str]

GATE = underlay.PermissiveImplicitOpenGate()


@pytest.fixture
def chains(tmp_path: Path, qemu_img: Tool, qemu_io: Tool) -> Callable[[int], Chains]:
    return lambda seed: Chains(tmp_path, random.Random(seed), qemu_img, qemu_io)


def facts(qemu_img: Tool, path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(qemu_img("info", "--output=json", path))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_the_guest_sees_no_difference(
    seed: int, chains: Callable[[int], Chains], qemu_img: Tool
) -> None:
    made = chains(seed)
    images = made.chain(seed % 4)
    top = made.image("top.qcow2", None if seed % 5 == 4 else images[0])
    others = [
        made.image("new.raw"),
        made.image("new.qcow2", made.chance.choice((None, images[-1]))),
    ]
    new = made.chance.choice((None, *others, *others, *images))
    content = made.content(top)
    done = rebase(
        top,
        None if new is None else new.name,
        backing_format=None if new is None else format_of(new),
        parallel=made.chance.choice((1, 4)),
        gate=GATE,
    )
    assert done.size == len(content)
    assert made.content(top) == content
    assert made.is_sound(top)
    info = facts(qemu_img, top)
    assert info.get("backing-filename") == (None if new is None else new.name)
    assert info.get("backing-filename-format") == (None if new is None else format_of(new))


def test_nothing_is_copied_that_both_have_in_one_place(make: Make, qemu_img: Tool) -> None:
    base = make("base.qcow2", "qcow2", "4M", "write -P 1 0 2M")
    middle = make("middle.qcow2", "qcow2", "4M", "write -P 2 1M 64k", backing=base)
    top = make("top.qcow2", "qcow2", "4M", backing=middle)
    assert rebase(top, "base.qcow2", backing_format="qcow2", gate=GATE).data == 64 << 10


def test_data_that_is_equal_is_not_copied(make: Make) -> None:
    make("new.raw", "raw", "1M", "write -P 1 0 512k")
    base = make("base.qcow2", "qcow2", "1M", "write -P 1 0 512k")
    top = make("top.qcow2", "qcow2", "1M", backing=base)
    done = rebase(top, "new.raw", backing_format="raw", gate=GATE)
    assert (done.data, done.zeroed) == (0, 0)


@pytest.mark.parametrize("below", [False, True], ids=["upon nothing", "upon zeroes"])
def test_zeroes_over_data_take_no_room(
    below: bool, make: Make, chains: Callable[[int], Chains]
) -> None:
    make("new.raw", "raw", "4M", "write -P 7 3k 3M")
    base = make("base.qcow2", "qcow2", "1M") if below else None
    top = make("top.qcow2", "qcow2", "4M", backing=base)
    size = top.stat().st_size
    done = rebase(top, "new.raw", backing_format="raw", gate=GATE)
    assert done.zeroed >= 3 << 20
    assert done.data == 0
    assert chains(0).content(top) == bytes(4 << 20)
    assert top.stat().st_size <= size + (128 << 10)


@pytest.mark.parametrize("end", [512, 70 << 10, 127 << 10])
def test_zeroes_over_a_new_image_that_ends_within_a_cluster(
    end: int, make: Make, chains: Callable[[int], Chains]
) -> None:
    new = make("new.raw", "raw", "1M")
    with new.open("r+b") as file:
        file.truncate(end)
        file.write(b"\7" * end)
    top = make("top.qcow2", "qcow2", "1M", backing=make("base.qcow2", "qcow2", "1M"))
    rebase(top, "new.raw", backing_format="raw", gate=GATE)
    assert chains(0).content(top) == bytes(1 << 20)


def test_version_2_stores_the_zeroes_that_it_cannot_mark(
    make: Make, chains: Callable[[int], Chains]
) -> None:
    make("new.raw", "raw", "1M", "write -P 7 100k 200k")
    top = make("top.qcow2", "qcow2", "1M", "write -P 3 0 1k", options="compat=0.10")
    content = chains(0).content(top)
    rebase(top, "new.raw", backing_format="raw")
    assert chains(0).content(top) == content


def test_unsafe_changes_the_name_and_opens_nothing(make: Make, qemu_img: Tool) -> None:
    base = make("base.raw", "raw", "1M")
    top = make("top.qcow2", "qcow2", "1M", "write -P 1 0 64k", backing=base)
    before = top.read_bytes()
    base.unlink()
    assert rebase(top, "gone.raw", backing_format="raw", unsafe=True).data == 0
    assert facts(qemu_img, top)["backing-filename"] == "gone.raw"
    assert top.read_bytes()[64 << 10 :] == before[64 << 10 :]
    rebase(top, None, unsafe=True)
    assert "backing-filename" not in facts(qemu_img, top)


def test_what_the_image_names_asks_the_gate_and_what_the_caller_names_does_not(
    make: Make, tmp_path: Path
) -> None:
    base = make("base.raw", "raw", "1M")
    make("new.raw", "raw", "1M", "write -P 1 0 64k")
    top = make("top.qcow2", "qcow2", "1M", backing=base)
    alone = make("alone.qcow2", "qcow2", "1M")
    before = top.read_bytes()
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        rebase(top, "new.raw", backing_format="raw")
    assert top.read_bytes() == before
    rebase(alone, "new.raw", backing_format="raw")
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        rebase(make("other.qcow2", "qcow2", "1M"), "alone.qcow2", backing_format="qcow2")


@pytest.mark.parametrize(
    ("new", "format_name", "error", "step"),
    [
        ("gone.raw", "raw", underlay.StorageNotFoundError, "backing"),
        ("new.raw", None, underlay.OptionError, "reference"),
        ("new.raw", "nonsense", underlay.PluginError, "format"),
        ("new.raw", "qcow2", underlay.InvalidImageError, "backing"),
        ("top.qcow2", "qcow2", underlay.ImageInUseError, "backing"),
        ("over.qcow2", "qcow2", underlay.ImageInUseError, "backing"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(
    new: str,
    format_name: str | None,
    error: type[Exception],
    step: str,
    make: Make,
) -> None:
    make("new.raw", "raw", "1M", "write -P 1 0 64k")
    top = make("top.qcow2", "qcow2", "1M")
    make("over.qcow2", "qcow2", "1M", backing=top)
    before = top.read_bytes()
    with pytest.raises(error) as caught:
        rebase(top, new, backing_format=format_name, gate=GATE)
    assert getattr(caught.value, "step", None) == step
    assert top.read_bytes() == before


def test_an_image_cannot_lie_upon_itself_without_locks_either(make: Make) -> None:
    top = make("top.qcow2", "qcow2", "1M")
    make("over.qcow2", "qcow2", "1M", backing=top)
    for name in ("top.qcow2", "over.qcow2"):
        with pytest.raises(underlay.ConflictError, match="upon itself"):
            rebase(top, name, backing_format="qcow2", gate=GATE, lock=False, lock_backing=False)


def test_a_format_without_a_backing_image_is_refused(make: Make) -> None:
    plain = make("plain.raw", "raw", "1M")
    with pytest.raises(underlay.UnsupportedOperationError):
        rebase(plain, "new.raw", backing_format="raw", format="raw", unsafe=True)


def test_one_that_is_cancelled_leaves_the_old_backing_image_and_all_bytes(
    make: Make, chains: Callable[[int], Chains], qemu_img: Tool
) -> None:
    make("new.raw", "raw", "32M", "write -P 9 0 32M")
    base = make("base.qcow2", "qcow2", "32M", "write -P 1 0 32M")
    top = make("top.qcow2", "qcow2", "32M", backing=base)

    def cancel(progress: Progress) -> None:
        if progress.done > progress.total // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rebase(top, "new.raw", backing_format="raw", gate=GATE, progress=cancel)
    assert facts(qemu_img, top)["backing-filename"] == "base.qcow2"
    assert chains(0).content(top) == b"\1" * (32 << 20)
    assert chains(0).is_sound(top)


def test_progress_ends_with_all_and_never_falls(make: Make) -> None:
    make("new.raw", "raw", "8M", "write -P 9 0 3M")
    top = make("top.qcow2", "qcow2", "8M", "write -P 1 1M 1M")
    for unsafe in (False, True):
        told: list[Progress] = []
        rebase(top, "new.raw", backing_format="raw", unsafe=unsafe, gate=GATE, progress=told.append)
        assert told[0].done == 0
        assert [one.done for one in told] == sorted(one.done for one in told)
        assert told[-1].done == told[-1].total == 8 << 20
