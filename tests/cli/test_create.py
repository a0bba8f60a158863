"""``create`` says what qemu-img says, and makes what qemu-img makes, byte for byte."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Done, Run
    from tests.conftest import Tool

Content = tuple[int, dict[int, bytes]]

_BLOCK = 4096
#: Files that a command may make.
_MADE = ("x", "a b", "a'b", "a,b", "d", "d,e")


@pytest.fixture(scope="session")
def below(tmp_path_factory: pytest.TempPathFactory, qemu_img: Tool) -> Path:
    """Images to lie upon: ``base.raw``, ``odd.raw``, ``base.qcow2``."""
    folder = tmp_path_factory.mktemp("below")
    (folder / "base.raw").write_bytes(bytes(1 << 20))
    (folder / "odd.raw").write_bytes(bytes(1000))
    qemu_img("create", "-q", "-f", "qcow2", folder / "base.qcow2", "2M")
    return folder


@pytest.fixture
def both(below: Path, here: Path, run: Run, oracle: Run) -> Both:
    """Runs a command line at both ends, each in the same folder."""
    for path in below.iterdir():
        shutil.copy(path, here)
    return Both(run, oracle)


class Both:
    """What both ends say and make."""

    def __init__(self, run: Run, oracle: Run) -> None:
        self._run, self._oracle = run, oracle

    def __call__(self, line: str) -> tuple[Done, Done]:
        """What we and what qemu-img say."""
        words = shlex.split(line)
        theirs = self._oracle("create", *words)
        self.their_files = self._take()
        ours = self._run("create", *words)
        self.our_files = self._take()
        # "underlay" stands where "qemu-img" stands.
        return ours._replace(err=ours.err.replace("underlay", "qemu-img")), theirs

    def _take(self) -> dict[str, Content]:
        files = {name: _content(Path(name)) for name in _MADE if Path(name).is_file()}
        for name in files:
            Path(name).unlink()
        return files


def _content(path: Path) -> Content:
    """A file's size, and its blocks that are not all zero; most of it may be a hole."""
    size = path.stat().st_size
    blocks: dict[int, bytes] = {}
    with path.open("rb") as file:
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) & -_BLOCK
            except OSError:
                break  # nothing but a hole
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            file.seek(at)
            for start in range(at, end, _BLOCK):
                block = file.read(_BLOCK)
                if any(block):
                    blocks[start] = block
            at = max(end, at + _BLOCK)
    return size, blocks


_SAME = """
-f qcow2 x 1M
-f qcow2 x 1.5G
-f qcow2 x 0
-f qcow2 x 512
-f qcow2 x 8G -o cluster_size=512
-f qcow2 x 60G -o cluster_size=1k,refcount_bits=64
-f raw x 1M
x 1M
-q -f qcow2 x 1M
-f qcow2 x 1k
-f qcow2 x 0x100000
-f qcow2 x " 1M"
-f qcow2 x +1M
-f qcow2 -o size=1M x
-f qcow2 -osize=1M x
-f qcow2 -o cluster_size=4096,lazy_refcounts=on x 1M
-f qcow2 -ocluster_size=4k -o refcount_bits=1 x 1M
-f qcow2 -o refcount_bits=64,compat=v3 x 1M
-f qcow2 -o refcount_bits=0x8 x 1M
-f qcow2 -o compat=1.1 x 1M
-f qcow2 -o compat=0.10 x 1M
-f qcow2 -o compat=v2 x 1M
-f qcow2 -o compat=v2,cluster_size=512 x 1M
-f qcow2 -o lazy_refcounts=yes x 1M
-f qcow2 -o lazy_refcounts x 1M
-f qcow2 -o nolazy_refcounts x 1M
-f qcow2 -o extended_l2=on x 1M
-f qcow2 -o compression_type=zstd x 1M
-f qcow2 -o compression_type=zlib x 1M
-f qcow2 -o preallocation=off x 1M
-f qcow2 -o preallocation=metadata x 1M
-f qcow2 -o preallocation=metadata,cluster_size=512,refcount_bits=8 x 8M
-f qcow2 -o preallocation=metadata,extended_l2=on,cluster_size=16k x 3M
-f qcow2 -o preallocation=metadata x 5G
-f qcow2 -o preallocation=falloc x 1M
-f qcow2 -o preallocation=full x 1M
-f qcow2 -o preallocation=full,cluster_size=512,refcount_bits=64 x 4M
-f qcow2 -o preallocation=falloc,cluster_size=1k,refcount_bits=1 x 20M
-f qcow2 -o preallocation=falloc,extended_l2=on,cluster_size=16k x 3M
-f raw -o preallocation=full x 1M
-f raw -o preallocation=falloc x 1M
-f raw -o preallocation=off x 1M
-f qcow2 -b base.qcow2 -F qcow2 x
-f qcow2 -b base.qcow2 -F qcow2 x 5M
-f qcow2 -b base.raw -F raw x
-f qcow2 -b base.raw -F raw x 512k
-f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 x
-f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 -b base.raw -F raw x
-f qcow2 -b base.raw -o backing_fmt=raw x
-f qcow2 -u -b missing -F raw x 1M
-f qcow2 -b base.raw -F raw -o compat=v2 x
-f qcow2 -b base.raw -F raw -o preallocation=metadata,extended_l2=on x
-f qcow2 -b base.raw -F raw -o data_file=d x
-f qcow2 -o data_file=d x 1M
-f qcow2 -o data_file=d,data_file_raw=on x 1M
-f qcow2 -o data_file=d,data_file_raw=off x 1M
-f qcow2 -o data_file=d,preallocation=metadata x 1M
-f qcow2 -o data_file=d,preallocation=falloc x 1M
-f qcow2 -o data_file=d,data_file_raw=on,preallocation=full x 1M
-f qcow2 -o data_file=d,extended_l2=on,preallocation=metadata x 1M
-f qcow2 -o cluster_size=4k,cluster_size=8k x 1M
-f qcow2 x 1M -o cluster_size=2M
-f qcow2 -o lazy_refcounts=on,extended_l2=on,refcount_bits=1,compression_type=zstd x 1M
-f qcow2 "a b" 1M
-f qcow2 "a'b" 1M
-f qcow2 -b base.raw -F raw "a,b" 1M
-f qcow2 -o backing_file=a,,b,backing_fmt=raw -u x 1M
-f qcow2 -o data_file=d,,e x 1M
""".strip().splitlines()

_REFUSED = """
-f qcow2 x
-f qcow2
-f qcow2 x 1M extra
-f qcow2 x abc
-f qcow2 x -5
-f qcow2 x 9E
-f qcow2 x 7E
-f qcow2 x 1e3
-f qcow2 x 1.5
-f qcow2 x 1KB
-f qcow2 x ""
-f qcow2 x "1M "
-f qcow2 x 16E
-f qcow2 x 18446744073709551615
-f qcow2 -o size=1M x 2M
-f qcow2 -o size=abc x
-f qcow2 -o size=-1 x
-f qcow2 -o compat=v9 x 1M
-f qcow2 -o compat= x 1M
-f qcow2 -o cluster_size=3000 x 1M
-f qcow2 -o cluster_size=256 x 1M
-f qcow2 -o cluster_size=4M x 1M
-f qcow2 -o cluster_size=0 x 1M
-f qcow2 -o cluster_size=abc x 1M
-f qcow2 -o cluster_size x 1M
-f qcow2 -o refcount_bits=3 x 1M
-f qcow2 -o refcount_bits=128 x 1M
-f qcow2 -o refcount_bits=0 x 1M
-f qcow2 -o refcount_bits=abc x 1M
-f qcow2 -o refcount_bits=8,compat=v2 x 1M
-f qcow2 -o lazy_refcounts=on,compat=v2 x 1M
-f qcow2 -o lazy_refcounts=1 x 1M
-f qcow2 -o extended_l2=on,cluster_size=4k x 1M
-f qcow2 -o extended_l2=on,compat=v2 x 1M
-f qcow2 -o compression_type=zstd,compat=v2 x 1M
-f qcow2 -o compression_type=lzo x 1M
-f qcow2 -o preallocation=bogus x 1M
-f qcow2 -F raw x 1M
-f qcow2 -b missing -F raw x
-f qcow2 -b missing -F raw x 1M
-f qcow2 -u -b missing -F raw x
-f qcow2 -u -b base.qcow2 x 1M
-f qcow2 -b x -F qcow2 x
-f qcow2 -b "" -F qcow2 x 1M
-f qcow2 -o backing_file= x 1M
-f qcow2 -b base.raw -F raw -o preallocation=metadata x
-f qcow2 -b base.raw -F raw -o data_file=d,data_file_raw=on x
-f qcow2 -o data_file_raw=on x 1M
-f qcow2 -o data_file=d,compat=v2 x 1M
-f qcow2 -o foo=bar x 1M
-f qcow2 -o foo x 1M
-f qcow2 -o =bar x 1M
-f qcow2 -o "" x 1M
-f qcow2 -o cluster_size=4k, x 1M
-f qcow2 -o ,cluster_size=4k x 1M
-f qcow2 -o cluster_size=4k,,compat=v3 x 1M
-f qcow2 x 2T -o cluster_size=512
-f qcow2 nofolder/x 1M
-x
-f
""".strip().splitlines()


@pytest.mark.parametrize("line", _SAME)
def test_a_new_image_is_qemu_imgs(both: Both, line: str) -> None:
    ours, theirs = both(line)
    assert ours == theirs
    assert theirs.status == 0
    assert both.their_files
    assert both.our_files == both.their_files


@pytest.mark.parametrize("line", _REFUSED)
def test_what_is_refused_is_told_in_qemu_imgs_words(both: Both, line: str) -> None:
    ours, theirs = both(line)
    assert ours == theirs
    assert theirs.status == 1
    assert not both.our_files


def test_nothing_of_an_old_file_survives(both: Both) -> None:
    both("-f qcow2 x 1M")
    fresh = both.our_files["x"]
    Path("x").write_bytes(b"old!" * (1 << 20))
    both._run("create", "-q", "-f", "qcow2", "x", "1M")
    assert _content(Path("x")) == fresh


@pytest.mark.parametrize(
    "option", ["encrypt.format=luks", "encryption=on", "nocow=on", "extent_size_hint=1M"]
)
def test_what_we_have_not_is_refused_by_name(here: Path, run: Run, option: str) -> None:
    done = run("create", "-f", "qcow2", "-o", option, "x", "1M")
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert f"'{option.partition('=')[0]}' is not supported" in done.err
    assert not (here / "x").exists()


@pytest.mark.parametrize("arguments", [("-f", "qcow2"), ("-f", "qcow2", "x")])
def test_help_lists_qemu_imgs_options_but_those_that_are_refused(
    here: Path, run: Run, oracle: Run, arguments: tuple[str, ...]
) -> None:
    ours = run("create", *arguments, "-o", "help")
    theirs = oracle("create", *arguments, "-o", "help")
    refused = ("  encr", "  nocow=", "  extent_size_hint=")
    kept = [line for line in theirs.out.splitlines(keepends=True) if not line.startswith(refused)]
    assert ours == theirs._replace(out="".join(kept))
    assert not (here / "x").exists()


def test_a_backing_file_without_a_format_is_looked_at_for_a_hint_and_not_opened(
    below: Path, here: Path, run: Run
) -> None:
    done = run("create", "-f", "qcow2", "-b", str(below / "base.qcow2"), "x")
    assert done.status == 1
    assert done.err == (
        "underlay: x: Backing file specified without backing format\nDetected format of qcow2.\n"
    )
