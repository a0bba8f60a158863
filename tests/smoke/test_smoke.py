"""One test a capability, without any oracle: what the further Pythons run, in seconds."""

from __future__ import annotations

import asyncio
import io
import pickle
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import underlay
import underlay.cli
from underlay import jobs

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BASE = EXAMPLES / "images" / "base.qcow2"
OVERLAY = EXAMPLES / "images" / "overlay.qcow2"


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run ``underlay`` in this process; its exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["underlay", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            underlay.cli.main()
        out, err = capsys.readouterr()
        return int(leaving.value.code or 0), out, err

    return run


def test_a_chain_reads_on_the_blocking_face() -> None:
    with underlay.open_any(OVERLAY, gate=underlay.DirectoryGate()) as disk:
        assert (disk.format_name, disk.size) == ("qcow2", 64 << 20)
        assert disk.read_bytes(0, 22) == b"This is the base image"
        assert disk.read_bytes(16 << 10, 19) == b"This is the overlay"
        assert disk.read_bytes(1 << 20, 4) == b"AAAA"  # compressed
        assert disk.read_bytes(1072 << 10, 4) == bytes(4)  # zero over compressed
        assert disk.read_bytes((64 << 20) - 2, 4) == bytes(4)  # past the end


def test_a_chain_reads_on_the_asynchronous_face() -> None:
    async def main() -> bytes:
        gate = underlay.DirectoryGate()
        async with await underlay.aio.open_any(OVERLAY, gate=gate) as disk:
            disk.set_async_read_parallelization(4)
            return bytes(await disk.read_bytes(1 << 20, 128 << 10))

    read = asyncio.run(main())
    assert [chr(read[at]) for at in range(0, 128 << 10, 16 << 10)] == list("ABC\0\0FGH")


def test_the_default_gate_refuses_the_backing_file() -> None:
    with pytest.raises(underlay.ImplicitOpenDeniedError) as refusal:
        underlay.open_any(OVERLAY)
    assert refusal.value.request.reference.name == "base.qcow2"
    assert str(pickle.loads(pickle.dumps(refusal.value))) == str(refusal.value)  # noqa: S301 - ours


def test_a_disk_serves_as_a_file() -> None:
    with underlay.open_any(BASE) as disk, disk.as_file() as file:
        assert file.seek(-4, io.SEEK_END) == (64 << 20) - 4
        assert file.read(100) == bytes(4)
        file.seek(12)
        assert file.read(4) == b"base"


def test_raw_is_created_written_and_read_back(tmp_path: Path) -> None:
    with underlay.create(tmp_path / "disk.raw", format="raw", size="1M") as disk:
        disk.write(b"written", 12345)
        disk.write_zeroes(12345, 2)
        disk.resize(2 << 20)
    with underlay.open_image(tmp_path / "disk.raw", format="raw") as disk:
        assert disk.read_bytes(12344, 9) == b"\0\0\0itten\0"
        assert disk.size == 2 << 20


def test_convert_and_compare(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    with underlay.open_any(OVERLAY, gate=underlay.DirectoryGate()) as disk:
        jobs.convert(disk, raw)
        with underlay.open_image(raw, format="raw") as copy:
            assert jobs.compare(disk, copy).identical
    assert raw.stat().st_size == 64 << 20


def test_inspect_judges_without_opening_more() -> None:
    report = underlay.inspect(OVERLAY)
    assert [reference.name for reference in report.references] == ["base.qcow2"]
    assert report.damage == ()


def test_the_command_informs(command: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = command("info", BASE)
    assert status == 0
    assert "file format: qcow2" in out


def test_the_command_converts_and_compares(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    raw = tmp_path / "disk.raw"
    assert command("convert", "-O", "raw", BASE, raw)[0] == 0
    status, out, _ = command("compare", BASE, raw)
    assert (status, out) == (0, "Images are identical.\n")


def test_the_command_says_what_would_allow_what_it_refuses(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, out, err = command("convert", "-O", "raw", OVERLAY, tmp_path / "disk.raw")
    assert (status, out) == (1, "")
    assert "base.qcow2" in err
    assert "--gate directory" in err
    assert not (tmp_path / "disk.raw").exists()


def test_the_tour_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    assert "Identical" in capsys.readouterr().out
