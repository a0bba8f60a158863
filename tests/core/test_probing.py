"""Finding out a format: by verdicts, never by name or order, and without believing a guess."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest

import underlay
from underlay import jobs
from underlay.probing import VIEW_BYTES, Match, NoMatch, ProbeVerdict, ProbeView
from underlay_storage.memory import MemoryStorage

from .formats import Formats, Verdict, starts


def _raise(error: BaseException) -> Verdict:
    def verdict(view: ProbeView) -> object:
        raise error

    return verdict


def _always(verdict: object) -> Verdict:
    def say(view: ProbeView) -> object:
        return verdict

    return say


def test_one_match_is_the_format(formats: Formats) -> None:
    formats.add("aaaa", starts(b"AAAA"))
    formats.add("bbbb", starts(b"BBBB"))
    result = underlay.probe(MemoryStorage(b"AAAA" + bytes(100)))
    assert (result.format, result.guessed, result.size) == ("aaaa", False, 104)
    assert result.matches == {"aaaa": "starts with b'AAAA'"}
    assert result.failures == ()
    with underlay.open_any(MemoryStorage(b"BBBB")) as disk:
        assert disk.format_name == "bbbb"


def test_two_matches_are_an_error_that_names_both(formats: Formats) -> None:
    formats.add("zzzz", starts(b"AAAA"))
    formats.add("aaaa", starts(b"AAAA"))
    image = MemoryStorage(b"AAAA")
    result = underlay.probe(image)
    assert result.format is None
    assert set(result.matches) == {"aaaa", "zzzz"}
    with pytest.raises(underlay.AmbiguousFormatError, match=r"aaaa.*zzzz") as caught:
        underlay.open_any(image)
    assert caught.value.formats == ("aaaa", "zzzz")
    with underlay.open_image(image, format="zzzz") as disk:
        assert disk.format_name == "zzzz"


def test_a_name_decides_nothing(tmp_path: Path, formats: Formats) -> None:
    formats.add("qcow3", starts(b"QCW3"))
    for name in ("disk.qcow3", "disk.qcow2", "disk.iso"):
        (tmp_path / name).write_bytes(b"nothing of the kind".ljust(512))
        with underlay.open_any(tmp_path / name) as disk:
            assert disk.format_name == "raw"


def test_a_driver_sees_both_ends_and_no_more(formats: Formats) -> None:
    seen: list[ProbeView] = []

    def verdict(view: ProbeView) -> ProbeVerdict:
        seen.append(view)
        return Match("it ends so") if view.tail.endswith(b"end!") else NoMatch()

    formats.add("tail", verdict)
    content = b"head" + bytes(3 * VIEW_BYTES) + b"end!"
    assert underlay.probe(MemoryStorage(content)).format == "tail"
    assert (len(seen[0].head), len(seen[0].tail)) == (VIEW_BYTES, VIEW_BYTES)
    assert seen[0].head.startswith(b"head")
    assert seen[0].size == len(content)
    for small in (b"", b"x", b"abcend!"):
        underlay.probe(MemoryStorage(small))
        assert (seen[-1].head, seen[-1].tail, seen[-1].size) == (small, small, len(small))


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (_raise(ValueError("oh no")), "ValueError: oh no"),
        (_raise(underlay.InvalidImageError("x")), "InvalidImageError: x"),
        (_raise(RecursionError()), "RecursionError"),
        (_always(None), "its verdict was None"),
        (_always("yes"), "its verdict was"),
    ],
)
def test_a_failing_probe_leaves_raw_read_only(
    formats: Formats, verdict: Verdict, reason: str
) -> None:
    formats.add("rotten", verdict)
    formats.add("aaaa", starts(b"AAAA"))
    image = MemoryStorage(b"no format at all".ljust(1024))
    result = underlay.probe(image)
    assert (result.format, result.guessed) == ("raw", True)
    ((failed, why),) = [(failure.format, failure.reason) for failure in result.failures]
    assert failed == "rotten"
    assert reason in why
    with underlay.open_any(image) as disk:
        assert disk.read_bytes(0, 2) == b"no"
    with pytest.raises(underlay.PluginError, match=r"rotten.*format='raw'"):
        underlay.open_any(image, writable=True)
    with underlay.open_image(image, format="raw", writable=True) as disk:
        disk.write(b"so", 0)
    with underlay.open_any(MemoryStorage(b"AAAA"), writable=True) as disk:
        assert disk.format_name == "aaaa", "a verdict is a verdict, whoever else failed"


def test_a_plug_in_that_failed_to_load_leaves_raw_read_only(formats: Formats) -> None:
    formats.fail("vhdx")
    image = MemoryStorage(bytes(1024))
    with underlay.open_any(image) as disk:
        assert disk.format_name == "raw"
    with pytest.raises(underlay.PluginError, match=r"vhdx.*nope"):
        underlay.open_any(image, writable=True)
    with pytest.raises(underlay.PluginError, match=r"vhdx.*broken 1.*nope"):
        underlay.open_image(image, format="vhdx")


def test_a_contested_format_is_an_error_for_its_images_alone(formats: Formats) -> None:
    formats.add("both", starts(b"BOTH"), distribution="one")
    formats.add("both", starts(b"BOTH"), distribution="two")
    with pytest.raises(underlay.PluginConflictError, match=r"one 1.*two 1"):
        underlay.open_any(MemoryStorage(b"BOTH"))
    with underlay.open_any(MemoryStorage(bytes(512))) as disk:
        assert disk.format_name == "raw"
    with pytest.raises(underlay.PluginError):
        underlay.open_any(MemoryStorage(bytes(512)), writable=True)


def test_an_unknown_format_lists_those_there_are() -> None:
    for call in (
        partial(underlay.open_image, MemoryStorage(), format="qcow17"),
        partial(underlay.create, MemoryStorage(), format="qcow17", size=1),
    ):
        with pytest.raises(underlay.PluginError, match=r"qcow17.*qcow2.*raw"):
            call()


def test_probing_opens_without_a_lock_and_changes_nothing(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(5000))
    with underlay.open_image(image, format="raw", writable=True):
        assert underlay.probe(image).format == "raw"
        assert asyncio.run(underlay.aio.probe(image)).size == 5000
        with pytest.raises(underlay.ImageInUseError):
            underlay.open_any(image)
    assert image.read_bytes() == bytes(5000)


# -- nothing remembers


def test_each_open_asks_anew(formats: Formats) -> None:
    formats.add("aaaa", starts(b"AAAA"))
    storage = MemoryStorage(bytes(1024))
    for content, found in ((b"....", "raw"), (b"AAAA", "aaaa"), (b"AAAB", "raw")):
        with underlay.open_image(storage, format="raw", writable=True) as disk:
            disk.write(content, 0)
        assert underlay.probe(storage).format == found
        assert underlay.inspect(storage).format == found
        with underlay.open_any(storage) as disk:
            assert disk.format_name == found


def test_what_was_found_out_is_never_recorded_in_an_image(tmp_path: Path) -> None:
    """A backing image's format is the caller's word or none: it may look like another tomorrow."""
    (tmp_path / "base").write_bytes(bytes(1 << 20))
    overlay = tmp_path / "overlay"
    with pytest.raises(underlay.OptionError, match="without backing format"):
        underlay.create(overlay, backing_file="base")
    assert not overlay.exists()
    underlay.create(overlay, size="1M").close()
    before = overlay.read_bytes()
    upon = {"backing_file": "base"}
    for unsafe in (False, True):
        with pytest.raises(underlay.OptionError, match="format must be specified"):
            jobs.rebase(overlay, "base", unsafe=unsafe)
    for options in (upon, upon | {"backing_fmt": ""}):
        with pytest.raises(underlay.UnderlayError, match="format"):
            jobs.amend(overlay, options)
    with pytest.raises(underlay.OptionError, match="without backing format"):
        jobs.convert(
            overlay, tmp_path / "x", output_format="qcow2", options={"backing_file": "base"}
        )
    assert overlay.read_bytes() == before
