"""A chain of a thousand images: with a limit that allows it everything works, and else nothing."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

import underlay
from underlay import jobs

_DEPTH = 1000
_DATA = b"from the bottom"
_GATE = underlay.DirectoryGate()
_ALLOWED = underlay.Limits(chain_depth=_DEPTH)
_TOO_DEEP = underlay.Limits(chain_depth=_DEPTH - 1)


@pytest.fixture(scope="module")
def files() -> Generator[None]:
    """As many open files as that takes."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * _DEPTH
    if before[1] != resource.RLIM_INFINITY and before[1] < wanted:
        pytest.skip("this process may not open as many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], wanted), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def top(tmp_path: Path, files: None) -> Path:
    """The last of them; the data is in the first."""
    with underlay.create(tmp_path / "0000", size="1M", cluster_size=4096) as bottom:
        bottom.write(_DATA, 8192)
    overlay = tmp_path / "0001"
    underlay.create(
        overlay, backing_file="0000", backing_fmt="qcow2", cluster_size=4096, size="1M", gate=_GATE
    ).close()
    before, name, after = overlay.read_bytes().rpartition(b"0000")
    assert name
    for number in range(2, _DEPTH):
        below = f"{number - 1:04}".encode()
        (tmp_path / f"{number:04}").write_bytes(before + below + after)
    return tmp_path / f"{_DEPTH - 1:04}"


def test_reading_describing_and_copying_it(top: Path, tmp_path: Path) -> None:
    with underlay.open_any(top, gate=_GATE, limits=_ALLOWED) as disk:
        assert disk.read_bytes(8192, len(_DATA)) == _DATA
        assert [run.depth for run in jobs.map_image(disk)] == [_DEPTH - 1] * 3
        assert len(disk.chain()) == _DEPTH
        assert jobs.picture(disk).data == 4096
        jobs.convert(disk, tmp_path / "copy.raw")
        assert jobs.compare(disk, tmp_path / "copy.raw").identical
    assert jobs.check(top).corruptions == 0
    chain = jobs.info(top, backing_chain=True, gate=_GATE, limits=_ALLOWED)
    assert len(chain) == _DEPTH


def test_changing_what_lies_in_it(top: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"gate": _GATE, "limits": _ALLOWED}
    middle = tmp_path / f"{_DEPTH // 2:04}"
    with underlay.open_any(top, writable=True, **how) as disk:
        disk.write(b"above", 0)
    assert jobs.commit(top, base=middle.name, **how).data == 4096
    assert jobs.rebase(top, None, **how).data == 4096
    with underlay.open_any(top) as disk:
        assert disk.read_bytes(0, 5) == b"above"
        assert disk.read_bytes(8192, len(_DATA)) == _DATA


def test_one_image_more_than_allowed_is_an_error_that_leaves_nothing_open(top: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    uses: list[Callable[[], object]] = [
        lambda: underlay.open_any(top, gate=_GATE, limits=_TOO_DEEP),
        lambda: jobs.info(top, backing_chain=True, gate=_GATE, limits=_TOO_DEEP),
        lambda: jobs.convert(top, top.with_name("copy"), gate=_GATE, limits=_TOO_DEEP),
        lambda: jobs.rebase(top, None, gate=_GATE, limits=_TOO_DEEP),
        lambda: list(jobs.map_image(top, gate=_GATE, limits=_TOO_DEEP)),
    ]
    for use in uses:
        with pytest.raises(underlay.LimitExceededError, match="chain_depth") as found:
            use()
        assert (found.value.value, found.value.allowed) == (_DEPTH, _DEPTH - 1)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not top.with_name("copy").exists()


def test_too_few_open_files_for_it_are_an_error_of_ours(top: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 100, most[1]))
    try:
        with pytest.raises(underlay.StorageError, match="Too many open files"):
            underlay.open_any(top, gate=_GATE, limits=_ALLOWED)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert len(os.listdir("/proc/self/fd")) == before
