"""Counting what is in use, from which follows whether data may lie in holes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from underlay.face import run_blocking
from underlay_drivers.qcow2 import Qcow2
from underlay_drivers.qcow2.refcounts import used_in_block

from .conftest import Tool


@given(
    block=st.binary(min_size=64, max_size=64).map(lambda data: data.replace(b"\x37", b"\0")),
    order=st.integers(0, 6),
    data=st.data(),
)
def test_every_width_is_counted(block: bytes, order: int, data: st.DataObject) -> None:
    bits = 1 << order
    entries: list[int] = []
    for at in range(0, len(block), max(1, bits // 8)):
        if bits >= 8:
            entries.append(int.from_bytes(block[at : at + bits // 8], "big"))
        else:
            entries += [block[at] >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    count = data.draw(st.integers(0, len(entries)))
    expected = sum(1 for entry in entries[:count] if entry)
    assert used_in_block(block, bits, count) == expected


@pytest.mark.parametrize(
    ("options", "written", "sparse"),
    [
        ("preallocation=metadata", "0 64k", True),
        ("preallocation=metadata,refcount_bits=1,cluster_size=4k", "0 64k", True),
        ("preallocation=off", "0 8M", False),
        ("preallocation=falloc", "0 64k", False),
    ],
)
def test_a_layout_made_beforehand_is_noticed(
    qemu_img: Tool, qemu_io: Tool, tmp_path: Path, *, options: str, written: str, sparse: bool
) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "8M")
    qemu_io("-f", "qcow2", "-c", f"write {written}", path)
    disk = Qcow2.open_path_sync(path)
    assert run_blocking(disk.sparse_data()) is sparse
    disk.close_sync()
