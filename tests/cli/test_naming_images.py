"""Images described in full: the user's word on the command line, and never an image's own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from underlay_storage.file import FileStorage

if TYPE_CHECKING:
    from tests.cli.conftest import Run
    from tests.conftest import Tool

    from underlay.storage import StorageOpenOptions


def _json(**options: object) -> str:
    return "json:" + json.dumps(options)


def test_a_name_that_an_image_stores_is_never_read_as_a_description(
    here: Path, names_backing: Callable[[str], Path], run: Run
) -> None:
    (here / "secret.raw").write_bytes(b"secret" * 1000)
    described = _json(driver="raw", file={"driver": "file", "filename": "secret.raw"})
    names_backing(described)
    done = run("convert", "--gate", "permissive", "names.qcow2", "out.raw")
    assert done.status == 1
    assert not (here / "out.raw").exists()
    # The same words from the user open it.
    assert run("convert", described, "out.raw").status == 0
    assert (here / "out.raw").read_bytes().startswith(b"secret")


def test_what_the_user_puts_below_an_image_passes_no_gate_and_the_rest_does(
    chain: Path, run: Run
) -> None:
    (chain / "own.raw").write_bytes(b"o" * (4 << 20))
    described = _json(
        driver="qcow2",
        file={"driver": "file", "filename": "top.qcow2"},
        backing={"driver": "raw", "file": {"driver": "file", "filename": "own.raw"}},
    )
    assert run("convert", described, "out.raw").status == 0
    assert (chain / "out.raw").read_bytes()[64 << 10 :] == b"o" * ((4 << 20) - (64 << 10))
    alone = _json(driver="qcow2", file={"driver": "file", "filename": "top.qcow2"})
    denied = run("convert", alone, "other.raw")
    assert denied.status == 1
    assert "--gate" in denied.err


def test_a_part_of_a_file_is_a_disk(here: Path, run: Run) -> None:
    (here / "whole.raw").write_bytes(bytes(1 << 20) + b"p" * 4096 + bytes(4096))
    words = "driver=raw,offset=1M,size=4k,file.filename=whole.raw"
    assert run("convert", "--image-opts", words, "part.raw").status == 0
    assert (here / "part.raw").read_bytes() == b"p" * 4096


def test_locking_can_be_left_out(plain: Path, run: Run) -> None:
    from underlay import open_image

    with open_image(plain, format="qcow2", writable=True):
        assert run("check", "plain.qcow2").status == 1
        words = "driver=qcow2,file.locking=off,file.filename=plain.qcow2"
        assert run("map", "--image-opts", words).status == 0


@pytest.mark.parametrize("quote", ['"', "'"])
def test_json_may_have_either_quotes(plain: Path, run: Run, quote: str) -> None:
    text = _json(driver="qcow2", file={"filename": "plain.qcow2"}).replace('"', quote)
    assert run("map", text) == run("map", "plain.qcow2")


@pytest.mark.parametrize(
    "text",
    [
        "json:" + "[" * 5000,
        "json:{" + '"a":{' * 5000,
        "json:\0",
        'json:{"driver": ["qcow2"], "file": {"filename": "x"}}',
        'json:{"driver": "qcow2", "file": []}',
        'json:{"driver": "qcow2", "file": {"driver": 1, "filename": "x"}}',
        'json:{"driver": "qcow2", "file": {"driver": "raw", "filename": "x"}}',
        'json:{"file.driver": "qcow2"}',
        'json:{"driver": null}',
        "json:{'driver': 'raw', 'offset': -1, 'file': {'filename': 'plain.qcow2'}}",
        "json:{'driver': 'raw', 'offset': [], 'file': {'filename': 'plain.qcow2'}}",
        "json:{'driver': 'qcow2', 'cache-size': {}, 'file': {'filename': 'gone'}}",
        "json:{'driver': 'qcow2', 'data-file': {}, 'file': {'filename': 'gone'}}",
        "json:{'driver': 'qcow2', 'data-file': {'driver': 1}, 'file': {'filename': 'gone'}}",
    ],
    ids=range(14),
)
@pytest.mark.parametrize("command", ["info", "map", "check"])
def test_a_description_that_makes_no_sense_is_told_in_words(
    plain: Path, run: Run, command: str, text: str
) -> None:
    done = run(command, text)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("underlay: Could not open 'json:")
    assert "internal error" not in done.err


def test_a_description_can_name_any_storage_that_is_installed(here: Path, run: Run) -> None:
    done = run("info", "--image-opts", "driver=raw,file.driver=null,file.filename=null:4096")
    assert (done.status, done.err) == (0, "")
    assert "virtual size: 4 KiB (4096 bytes)" in done.out


def test_options_of_ours_cannot_be_shortened(plain: Path, run: Run) -> None:
    done = run("info", "--gat", "deny", "plain.qcow2")
    assert done.status == 1
    assert "unrecognized option '--gat'" in done.err


def test_every_command_says_something_in_json(
    plain: Path, qemu_img: Tool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu_img("create", "-q", "-f", "raw", "other.raw", "4M")
    for words in (
        ("amend", "-o", "lazy_refcounts=on", "plain.qcow2"),
        ("bench", "-c", "10", "plain.qcow2"),
        ("compare", "plain.qcow2", "other.raw"),
        ("convert", "plain.qcow2", "copy.raw"),
        ("create", "-f", "qcow2", "new.qcow2", "1M"),
        ("dd", "if=plain.qcow2", "of=part.raw", "bs=1M", "count=1"),
        ("resize", "plain.qcow2", "8M"),
        ("snapshot", "-l", "plain.qcow2"),
    ):
        done = run(words[0], "--output=json", *words[1:])
        assert done.err == ""
        assert json.loads(done.out)["version"] == 1, words


def test_an_image_of_a_format_that_nobody_knows_is_raw_with_a_warning(
    here: Path, qemu_img: Tool, run: Run
) -> None:
    qemu_img("create", "-q", "-f", "vdi", "strange.img", "1M")
    status, _, err = run("convert", "strange.img", "copy.raw")
    assert status == 0
    assert err.startswith("underlay: warning: 'strange.img' bears the signature of vdi, ")
    assert err.count("\n") == 1
    assert Path("copy.raw").read_bytes() == Path("strange.img").read_bytes()
    assert run("convert", "-f", "raw", "strange.img", "copy.raw") == (0, "", "")
    for line in ("info", "map", "measure", "snapshot -l", "check", "bitmap --list"):
        assert run(*line.split(), "strange.img").err.startswith(err), line
        assert err not in run(*line.split(), "-f", "raw", "strange.img").err
    refused = run("check", "-r", "all", "strange.img")
    assert (refused.status, refused.out) == (1, "")
    assert "bears the signature of vdi" in refused.err
    assert "with -f raw" in refused.err


@pytest.mark.parametrize(
    "line",
    [
        "amend -o lazy_refcounts=on",
        "bitmap --add --disable",
        "check",
        "commit -b low/base.raw",
        "info",
        "rebase -u -b low/base.raw -F raw",
        "snapshot -c new",
    ],
)
def test_an_image_is_opened_once(
    chain: Path, run: Run, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """To find out its format too: on object storage each time costs requests."""
    opened: list[str] = []
    real = FileStorage.open

    def counted(options: StorageOpenOptions) -> FileStorage:
        opened.append(os.path.basename(options.name))
        return real(options)

    monkeypatch.setattr(FileStorage, "open", staticmethod(counted))
    command, *words = line.split()
    last = ["b"] if command == "bitmap" else []
    done = run(command, "--gate=permissive", *words, "top.qcow2", *last)
    assert done.status == 0, done.err
    assert opened.count("top.qcow2") == 1
    assert len(opened) == len(set(opened))


def test_a_described_backing_image_is_opened_by_those_who_need_it_alone(
    chain: Path, run: Run
) -> None:
    (chain / "own.raw").write_bytes(b"o" * (4 << 20))
    for own, status in (("own.raw", 0), ("gone.raw", 1)):
        below = f"backing.driver=raw,backing.file.filename={own}"
        words = ("--image-opts", f"driver=qcow2,file.filename=top.qcow2,{below}")
        assert run("check", *words).status == 0
        assert run("snapshot", "-l", *words).status == 0
        assert run("amend", "-o", "lazy_refcounts=on", *words).status == 0
        assert run("commit", "-d", *words).status == status
    assert (chain / "own.raw").read_bytes()[: 64 << 10] == b"\3" * (64 << 10)
