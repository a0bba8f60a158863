"""``inspect``: one object is read, nothing else is opened, and the verdict has reasons."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

import underlay
from underlay.errors import StorageError
from underlay.storage import ReadBuffers
from underlay.testing import WrappedStorage
from underlay_storage.memory import MemoryStorage

from .toy_format import CLUSTER, pack

pytestmark = pytest.mark.usefixtures("toy")


def test_an_image_that_stands_alone_is_safe() -> None:
    report = underlay.inspect(MemoryStorage(pack(b"x" * 5000)))
    assert (report.verdict, report.reasons, report.format) == ("safe", (), "toy")
    assert report.virtual_size == 5000
    assert not report.guessed
    assert asyncio.run(underlay.aio.inspect(MemoryStorage(pack(b"x" * 5000)))) == report


def test_raw_bytes_are_safe_though_only_guessed() -> None:
    report = underlay.inspect(MemoryStorage(b"just data".ljust(5000)))
    assert (report.verdict, report.format, report.guessed) == ("safe", "raw", True)


def test_an_image_that_names_others_is_unsafe_and_they_stay_closed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    image = tmp_path / "image"
    image.write_bytes(pack(b"x", backing="fifo", data_file="/etc/shadow\n\x1b[2J"))
    report = underlay.inspect(image)
    assert report.verdict == "unsafe"
    assert [reference.name for reference in report.references] == ["fifo", "/etc/shadow\n\x1b[2J"]
    assert len(report.reasons) == 2
    assert all(reason.isprintable() for reason in report.reasons)


def test_a_damaged_image_is_unsafe() -> None:
    damaged = bytearray(pack(b"x" * 5000))
    damaged[CLUSTER : CLUSTER + 8] = b"\x00\x00\x7f\xff\xff\xff\xff\xf0"
    report = underlay.inspect(MemoryStorage(bytes(damaged)))
    assert report.verdict == "unsafe"
    assert "does not open" in report.reasons[0]


def test_an_image_that_is_too_large_is_unsafe() -> None:
    image = MemoryStorage(pack(b"", size=1 << 20))
    assert underlay.inspect(image).verdict == "safe"
    report = underlay.inspect(image, limits=underlay.Limits(virtual_size=(1 << 20) - 1))
    assert report.verdict == "unsafe"


def test_two_formats_at_once_are_unsafe(monkeypatch: pytest.MonkeyPatch) -> None:
    from underlay.probing import Match
    from underlay_drivers.raw import Raw

    def claim(view: object) -> object:
        return Match("anything goes")

    monkeypatch.setattr(Raw, "probe", claim)
    report = underlay.inspect(MemoryStorage(pack(b"x")))
    assert (report.verdict, report.format) == ("unsafe", None)
    assert set(report.matches) == {"raw", "toy"}


def test_what_cannot_be_told_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from underlay_drivers.raw import Raw

    assert underlay.inspect(MemoryStorage()).verdict == "unknown"

    def fail(view: object) -> object:
        raise LookupError("hm")

    monkeypatch.setattr(Raw, "probe", fail)
    report = underlay.inspect(MemoryStorage(bytes(512)))
    assert report.verdict == "unknown"
    assert "hm" in report.reasons[0]


def test_an_object_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    class Broken(WrappedStorage):
        reads = 0

        def readv(self, buffers: ReadBuffers, offset: int) -> None:
            self.reads += 1
            if self.reads > 1:
                raise StorageError("bad sector", errno=5)
            super().readv(buffers, offset)

    with pytest.raises(underlay.StorageNotFoundError):
        underlay.inspect(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="bad sector"):
        underlay.inspect(Broken(MemoryStorage(pack(b"x" * 5000))))


def test_the_report_is_json_with_a_version(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(pack(b"x", backing="\udcff"))
    found = json.loads(json.dumps(underlay.inspect(image).as_json()))
    assert found["version"] == 1
    assert found["verdict"] == "unsafe"
    assert found["filename"] == str(image)
    assert found["references"][0]["kind"] == "backing file"
    assert set(found) == {
        "version",
        "filename",
        "verdict",
        "reasons",
        "format",
        "guessed",
        "matches",
        "failures",
        "file-size",
        "virtual-size",
        "encrypted",
        "features",
        "references",
        "damage",
    }


def test_inspecting_takes_no_lock_and_changes_nothing(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(pack(b"x" * 5000))
    before = image.read_bytes()
    with underlay.open_image(image, format="toy", writable=True):
        assert underlay.inspect(image).verdict == "safe"
    assert image.read_bytes() == before
