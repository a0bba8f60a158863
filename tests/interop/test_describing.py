"""What an image says of itself: ``info`` and ``map`` as qemu-img has them, and the verdicts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

import underlay
from underlay import DirectoryGate, ImplicitOpenDeniedError

from .building import BuiltImage, Done
from .matrix import over

Both = Callable[..., tuple[Done, Done]]


#: Where QEMU, which counts in sectors, and we see a disk of the same size.
comparable = over(lambda recipe: not recipe.has_odd_size)


@comparable
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


@over(lambda recipe: recipe.backing is not None and not recipe.has_odd_size)
def test_info_of_the_chain_tells_what_qemu_img_tells(image: BuiltImage, both: Both) -> None:
    theirs, ours = both("info", "--backing-chain", "--output=json", image.path.name)
    assert ours.status == theirs.status == 0
    told = json.loads(ours.stdout)
    for layer in told:
        if layer["format"] == "raw":
            layer["virtual-size"] += -layer["virtual-size"] % 512
    assert told == json.loads(theirs.stdout)
    if image.recipe.has_odd_raw_file:
        return
    theirs, ours = both("info", "--backing-chain", image.path.name)
    assert ours == theirs


# QEMU lets an odd raw file end with its last sector, we with its last byte.
@over(lambda recipe: not (recipe.has_odd_size or recipe.has_odd_raw_file))
def test_map_shows_what_qemu_img_shows(image: BuiltImage, both: Both) -> None:
    theirs, ours = both("map", "--output=json", image.path.name)
    assert ours.status == theirs.status
    assert json.loads(ours.stdout) == json.loads(theirs.stdout)
    assert ours == theirs
    theirs, ours = both("map", image.path.name)
    assert ours == theirs


@over(
    lambda recipe: (
        (sum(recipe.name.encode()) % 5 == 0 or recipe.name.startswith(("large", "many", "state")))
        and not (recipe.has_odd_size or recipe.has_odd_raw_file)
    )
)
def test_map_of_a_part_shows_what_qemu_img_shows(image: BuiltImage, both: Both) -> None:
    chance = random.Random(image.recipe.name)
    size = image.exact_size
    # Inside a cluster that was written, and not so far on that little is left.
    written = chance.choice([op.offset for op in image.recipe.ops()[:9]] or [0])
    start = (min(size, written) // 512 + chance.randint(0, 3)) * 512
    for part in ((), ("--max-length", chance.randint(0, size // 512) * 512)):
        theirs, ours = both("map", "--output=json", "-s", start, *part, image.path.name)
        assert ours == theirs


def _names(image: BuiltImage) -> set[str]:
    """What else the image names, as QEMU reads it."""
    told = image.told
    data_file = told["format-specific"]["data"].get("data-file")
    return {name for name in (told.get("backing-filename"), data_file) if name}


def test_probe_and_inspect_judge_from_the_image_alone(image: BuiltImage) -> None:
    probed = underlay.probe(image.path)
    assert (probed.format, probed.guessed, probed.failures) == ("qcow2", False, ())
    report = underlay.inspect(image.path)
    assert (report.format, report.virtual_size) == ("qcow2", image.exact_size)
    named = _names(image)
    assert {reference.name for reference in report.references} == named
    told = image.told
    damaged = told["dirty-flag"] or told["format-specific"]["data"].get("corrupt", False)
    assert bool(report.damage) == damaged
    assert report.verdict == ("unsafe" if named or damaged else "safe"), report.reasons


def test_what_an_image_names_is_opened_by_the_gates_word_alone(image: BuiltImage) -> None:
    if _names(image):
        with pytest.raises(ImplicitOpenDeniedError):
            underlay.open_any(image.path)
    else:
        underlay.open_any(image.path).close()


def test_bitmaps_are_listed_as_qemu_lists_them(image: BuiltImage) -> None:
    with underlay.open_any(image.path, gate=DirectoryGate()) as disk:
        bitmaps = disk.info().description.bitmaps
    assert [
        {
            "name": bitmap.name,
            "granularity": bitmap.granularity,
            "flags": [
                flag
                for flag, is_set in (("in-use", bitmap.in_use), ("auto", bitmap.auto))
                if is_set
            ],
        }
        for bitmap in bitmaps
    ] == image.told["format-specific"]["data"].get("bitmaps", [])
