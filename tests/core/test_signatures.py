"""What bears another program's signature is raw to us, and never called safe."""

from __future__ import annotations

from pathlib import Path

import pytest

import underlay

PADDING = bytes(4096)
FOREIGN = {
    "vmdk": b"KDMV" + PADDING,
    "vhdx": b"vhdxfile" + PADDING,
    "vhd": PADDING + b"conectix" + bytes(504),
    "luks": b"LUKS\xba\xbe" + PADDING,
    "qcow": b"QFI\xfb\0\0\0\1" + PADDING,
    "vdi": bytes(64) + b"\x7f\x10\xda\xbe" + PADDING,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_signature_leaves_the_verdict_open(tmp_path: Path, name: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(FOREIGN[name])
    report = underlay.inspect(image)
    assert report.verdict == "unknown"
    assert report.guessed
    assert any(f"signature of {name}," in reason for reason in report.reasons)


def test_plain_bytes_are_a_safe_raw_disk(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"nothing that anybody knows" + PADDING)
    report = underlay.inspect(image)
    assert (report.verdict, report.format, report.reasons) == ("safe", "raw", ())
