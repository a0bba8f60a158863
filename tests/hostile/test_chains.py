"""Chains that lie: loops, depth, and names that lead elsewhere, under every gate."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import underlay
from underlay import (
    ImplicitOpenDeniedError,
    InvalidImageError,
    LimitExceededError,
    Limits,
    PermissiveImplicitOpenGate,
    UnderlayError,
)

from .bases import IMAGE, Bases
from .child import Outcome, Warm
from .recipes_names import NAMES

#: What only QEMU takes for more than a name. ("http" is a URL to whoever allows everything.)
_ADDRESSES = ("json", "nbd", "nbd-unix", "fat")


def trust(path: str, depth: int | None = None) -> bytes:
    """Open an image and whatever it names, and read it."""
    limits = Limits() if depth is None else Limits(chain_depth=depth)
    with underlay.open_image(
        path, format="qcow2", gate=PermissiveImplicitOpenGate(probe=True), limits=limits
    ) as disk:
        return disk.read_bytes(0, 4096)


def distrust(path: str) -> None:
    """Open it without a gate."""
    with underlay.open_any(path) as disk:
        disk.read_bytes(0, 4096)


def _over(bases: Bases, path: Path, below: str) -> None:
    """An overlay of nothing but holes on another qcow2 image."""
    image = bases["tiny-overlay"].image()
    path.write_bytes(image.name_backing(os.fsencode(below), b"qcow2").data)


def _refused(outcome: Outcome, *kinds: type[UnderlayError]) -> None:
    assert isinstance(outcome.error, kinds), outcome
    assert outcome.error.__str__().isprintable()


@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_a_loop_is_told(bases: Bases, warm: Warm, tmp_path: Path, length: int) -> None:
    names = [IMAGE, *(f"{number}.qcow2" for number in range(1, length))]
    for name, below in zip(names, [*names[1:], IMAGE], strict=True):
        _over(bases, tmp_path / name, below)
    outcome = warm.run(trust, str(tmp_path / IMAGE))
    assert outcome.broken([tmp_path]) == []
    _refused(outcome, InvalidImageError)
    assert "loops" in str(outcome.error)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_loop_through_a_link_is_told(
    bases: Bases, warm: Warm, tmp_path: Path, link: object
) -> None:
    assert callable(link)
    _over(bases, tmp_path / IMAGE, "other.qcow2")
    link(tmp_path / IMAGE, tmp_path / "other.qcow2")
    outcome = warm.run(trust, str(tmp_path / IMAGE))
    assert outcome.broken([tmp_path]) == []
    _refused(outcome, InvalidImageError)


def test_a_chain_of_a_thousand_ends_at_the_limit(bases: Bases, warm: Warm, tmp_path: Path) -> None:
    for number in range(1000):
        _over(bases, tmp_path / f"{number}.qcow2", f"{number + 1}.qcow2")
    bases["tiny-overlay"].put(tmp_path)
    (tmp_path / IMAGE).rename(tmp_path / "1000.qcow2")
    top = str(tmp_path / "0.qcow2")

    outcome = warm.run(trust, top)
    assert outcome.broken([tmp_path]) == []
    _refused(outcome, LimitExceededError)
    assert len(outcome.reached) <= 2 * Limits().chain_depth

    # Whoever allows more has it read, or is told why not: no stack ends before.
    outcome = warm.run(trust, top, 5000)
    assert outcome.broken([tmp_path]) == []
    if outcome.error is None:
        assert outcome.value == bases["tiny-overlay"].content[:4096]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_is_followed_unasked(bases: Bases, warm: Warm, tmp_path: Path, name: str) -> None:
    path = tmp_path / IMAGE
    image = bases["backing"].image().name_backing(NAMES[name][1])
    bases["backing"].put(tmp_path, image.data)
    outcome = warm.run(distrust, str(path))
    assert outcome.broken([path]) == []
    _refused(outcome, ImplicitOpenDeniedError, InvalidImageError)


@pytest.mark.parametrize("name", _ADDRESSES)
def test_an_address_is_a_plain_name_even_to_who_allows_everything(
    bases: Bases, warm: Warm, tmp_path: Path, name: str
) -> None:
    image = bases["backing"].image().name_backing(NAMES[name][1])
    path = bases["backing"].put(tmp_path, image.data)
    outcome = warm.run(trust, str(path))
    # A file of just that name, below the image's folder.
    assert not [event for event, _ in outcome.reached if event != "open"]
    assert all(target.startswith(f"{tmp_path}/") for _, target in outcome.reached)
    _refused(outcome, UnderlayError)
