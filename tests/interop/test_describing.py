"""What an image says of itself: ``info`` and ``map`` as qemu-img has them, and the verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

import underlay
from underlay import DirectoryGate, ImplicitOpenDeniedError

from .building import BuiltImage, Done

Both = Callable[..., tuple[Done, Done]]


@pytest.fixture
def whole_sectors(image: BuiltImage) -> None:
    """QEMU shows only whole sectors of a disk; where there is more, it cannot be compared with."""
    if image.has_odd_size:
        pytest.skip("QEMU cuts this disk at its last whole sector")


@pytest.mark.usefixtures("whole_sectors")
def test_info_tells_what_qemu_img_tells(image: BuiltImage, both: Both) -> None:
    theirs, ours = both("info", "--output=json", image.path.name)
    assert ours.status == theirs.status == 0
    assert json.loads(ours.stdout) == json.loads(theirs.stdout)
    if "foreign-names" in image.recipe.name:
        return  # our text escapes what could steer a terminal, and counts its columns in characters
    theirs, ours = both("info", image.path.name)
    assert (ours.status, ours.stdout) == (theirs.status, theirs.stdout)
    # Where qemu-img says nothing, we warn.
    suspicious = "dirty" in image.recipe.name or "corrupt" in image.recipe.name
    assert theirs.stderr == ""
    assert all(line.startswith("warning: ") for line in ours.stderr.splitlines())
    assert bool(ours.stderr) == suspicious


@pytest.mark.usefixtures("whole_sectors")
def test_info_of_the_chain_tells_what_qemu_img_tells(image: BuiltImage, both: Both) -> None:
    if image.recipe.backing is None:
        pytest.skip("no chain")
    theirs, ours = both("info", "--backing-chain", "--output=json", image.path.name)
    assert ours.status == theirs.status == 0
    told = json.loads(ours.stdout)
    for layer in told:
        if layer["format"] == "raw":
            layer["virtual-size"] += -layer["virtual-size"] % 512
    assert told == json.loads(theirs.stdout)
    if image.has_odd_raw_file:
        return
    theirs, ours = both("info", "--backing-chain", image.path.name)
    assert ours == theirs


@pytest.mark.usefixtures("whole_sectors")
def test_map_shows_what_qemu_img_shows(image: BuiltImage, both: Both) -> None:
    if image.has_odd_raw_file:
        pytest.skip("QEMU lets this raw file end with its last sector, we with its last byte")
    theirs, ours = both("map", "--output=json", image.path.name)
    assert ours.status == theirs.status
    assert json.loads(ours.stdout) == json.loads(theirs.stdout)
    assert ours == theirs
    theirs, ours = both("map", image.path.name)
    assert ours == theirs


def test_probe_and_inspect_judge_from_the_image_alone(image: BuiltImage) -> None:
    probed = underlay.probe(image.path)
    assert probed.format == "qcow2"
    assert not probed.guessed
    assert not probed.failures
    report = underlay.inspect(image.path)
    assert report.format == "qcow2"
    assert report.virtual_size == image.exact_size
    named = {reference.name for reference in report.references}
    told = json.loads(
        image.tell("info", "--output=json", image.path.name)  # what QEMU reads of it
    )
    data_file = told["format-specific"]["data"].get("data-file")
    assert named == {name for name in (told.get("backing-filename"), data_file) if name}
    damaged = told["dirty-flag"] or told["format-specific"]["data"].get("corrupt")
    assert bool(report.damage) == bool(damaged)
    assert report.verdict == ("unsafe" if named or damaged else "safe"), report.reasons


def test_what_an_image_names_is_opened_by_the_gates_word_alone(image: BuiltImage) -> None:
    names_others = image.recipe.has_data_file or image.recipe.backing is not None
    if not names_others:
        underlay.open_any(image.path).close()
        return
    told = json.loads(image.tell("info", "--output=json", image.path.name))
    if "backing-filename" not in told and not image.recipe.has_data_file:
        pytest.skip("rebased onto nothing")
    with pytest.raises(ImplicitOpenDeniedError):
        underlay.open_any(image.path)
    underlay.open_any(image.path, gate=DirectoryGate()).close()
