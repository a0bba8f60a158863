"""``amend`` says what qemu-img says, and leaves an image that QEMU finds to be the same."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Done, Run
    from tests.conftest import Tool


def _ours(done: Done) -> Done:
    # "underlay" stands where "qemu-img" stands.
    return done._replace(
        err=done.err.replace("underlay:", "qemu-img:").replace("'underlay ", "'qemu-img ")
    )


#: What the image is created with, and how it is amended.
_DONE = """
1M | lazy_refcounts=on
1M | lazy_refcounts
1M | refcount_bits=0x8
1M | refcount_bits=64,lazy_refcounts=on
1M | compat=v2
1M | data_file_raw=off
1M | size=2M
1M | size=2M,compat=v2
-o compat=v2 1M | compat=v3
-o compat=v2,cluster_size=512 1M | compat=1.1,refcount_bits=2
-o refcount_bits=8 1M | compat=0.10,refcount_bits=16
-o data_file=d,data_file_raw=on 1M | data_file_raw=off
-o data_file=d,data_file_raw=on 1M | data_file_raw=on
-b base.raw -F raw | backing_fmt=raw,backing_file=base.raw
-b base.raw -F raw | lazy_refcounts=on
-b base.raw -F raw -o compat=v2 | compat=v3
""".strip().splitlines()

_REFUSED = """
1M | compat=v4
1M | compat
1M | cluster_size=4096
1M | foo=1
1M | refcount_bits=3
1M | refcount_bits=128
1M | refcount_bits=abc
1M | refcount_bits=-1
1M | data_file=y
1M | data_file_raw=on
1M | backing_file=base.raw
1M | backing_file=
1M | backing_fmt=raw
-b base.raw -F raw | backing_file=base.raw
1M | lazy_refcounts=maybe
1M | compat=v2,lazy_refcounts=on
1M | compat=v2,refcount_bits=8
-o compat=v2 1M | lazy_refcounts=on
-o compat=v2 1M | refcount_bits=8
-o refcount_bits=8 1M | compat=v2
-o data_file=d 1M | compat=v2
-o extended_l2=on 1M | compat=v2
1M | size=123
1M | size=abc
1M | lazy_refcounts=on,
""".strip().splitlines()

_WRONG = """
amend x
amend -o compat=v2
amend -o help
amend -f raw -o help
amend -o compat=v3 x y
amend -f raw -o size=2M base.raw
amend -o "" x
amend -t xx -o compat=v3 x
amend -x
""".strip().splitlines()


def _create(qemu_img: Tool, options: str) -> None:
    Path("base.raw").write_bytes(bytes(1 << 20))
    *before, last = shlex.split(options)
    size = [last] if last.endswith("M") else []
    if not size:
        before.append(last)
    qemu_img("create", "-q", "-f", "qcow2", *before, "x", *size)


@pytest.mark.parametrize("line", _DONE)
def test_it_does_what_qemu_img_does(
    here: Path, qemu_img: Tool, run: Run, oracle: Run, line: str
) -> None:
    created, options = line.split(" | ")
    _create(qemu_img, created)
    theirs = oracle("amend", "-o", options, "x")
    told = _told(qemu_img)
    _create(qemu_img, created)
    assert _ours(run("amend", "-o", options, "x")) == theirs
    assert theirs.status == 0
    assert _told(qemu_img) == told
    qemu_img("check", "-q", "x")


def _told(qemu_img: Tool) -> dict[str, object]:
    told: dict[str, object] = json.loads(qemu_img("info", "--output=json", "x"))
    del told["actual-size"]
    return told


@pytest.mark.parametrize("line", _REFUSED)
def test_it_refuses_what_qemu_img_refuses_and_changes_nothing(
    here: Path, qemu_img: Tool, run: Run, oracle: Run, line: str
) -> None:
    created, options = line.split(" | ")
    _create(qemu_img, created)
    theirs = oracle("amend", "-o", options, "x")
    assert theirs.status == 1
    _create(qemu_img, created)
    before = Path("x").read_bytes()
    assert _ours(run("amend", "-o", options, "x")) == theirs
    assert Path("x").read_bytes() == before


@pytest.mark.parametrize("line", _WRONG)
def test_a_wrong_command_line(here: Path, qemu_img: Tool, run: Run, oracle: Run, line: str) -> None:
    _create(qemu_img, "1M")
    words = shlex.split(line)
    assert _ours(run(*words)) == oracle(*words)


def test_counts_that_do_not_fit(here: Path, qemu_img: Tool, run: Run, oracle: Run) -> None:
    _create(qemu_img, "1M")
    qemu_img("snapshot", "-c", "s", "x")
    qemu_img("resize", "-q", "x", "2M")
    for options in ("compat=v2", "refcount_bits=16"):
        ours, theirs = (tool("amend", "-o", options, "x") for tool in (run, oracle))
        assert _ours(ours) == theirs


def test_help_lists_what_can_be_changed(here: Path, qemu_img: Tool, run: Run, oracle: Run) -> None:
    _create(qemu_img, "1M")
    for words in (("amend", "-o", "help", "x"), ("amend", "-f", "qcow2", "-o", "help")):
        ours, theirs = run(*words), oracle(*words)
        lines = theirs.out.splitlines(keepends=True)
        kept = "".join(line for line in lines if not line.startswith("  encrypt."))
        assert ours == theirs._replace(out=kept)


def test_progress_goes_to_stderr(here: Path, qemu_img: Tool, run: Run) -> None:
    _create(qemu_img, "1M")
    done = run("amend", "-p", "-o", "refcount_bits=8", "x")
    assert (done.status, done.out) == (0, "")
    assert "(100.00/100%)" in done.err
    assert run("amend", "-q", "-p", "-o", "refcount_bits=16", "x") == (0, "", "")


def test_a_backing_image_is_opened_only_for_another_size(
    here: Path, qemu_img: Tool, run: Run
) -> None:
    _create(qemu_img, "-b base.raw -F raw")
    denied = run("amend", "-o", "size=2M", "x")
    assert denied.status == 1
    assert "--gate directory" in denied.err
    assert run("amend", "--gate", "directory", "-o", "size=2M", "x") == (0, "", "")
    assert _told(qemu_img)["virtual-size"] == 2 << 20
