"""A power loss while an image is rebased, or committed: it shows the same bytes at any time."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import underlay
from underlay.jobs import commit, rebase
from underlay_storage.memory import MemoryStorage

from .journal import Journal, Recorder
from .judging import chance_of, content_of, differences
from .shapes import make_memory
from .states import Effort, crash_states
from .structure import look_at

if TYPE_CHECKING:
    from tests.conftest import Tool

_SIZE = 320 << 10
_GATE = underlay.PermissiveImplicitOpenGate()
_EFFORT = Effort(exhaustive=6, samples=20, tears=1)

#: Makes an image from the format's options and commands of qemu-io; its bytes.
Image = Callable[..., bytes]


@pytest.fixture
def image(tmp_path: Path, qemu_img: Tool, qemu_io: Tool) -> Image:
    def make(options: str, *commands: str, size: int = _SIZE, below: str = "") -> bytes:
        path = tmp_path / "image"
        kind = "qcow2" if options else "raw"
        more = ["-o", options] if options else []
        more += ["-u", "-b", below, "-F", "raw"] if below else []
        qemu_img("create", "-q", "-f", kind, *more, path, size)
        if below:
            (tmp_path / "below").write_bytes(bytes(_SIZE))
            qemu_img("rebase", "-q", "-u", "-b", tmp_path / "below", "-F", "raw", path)
        for command in commands:
            qemu_io("-f", kind, "-c", command, path)
        if below:
            qemu_img("rebase", "-q", "-u", "-b", below, "-F", "raw", path)
        return path.read_bytes()

    return make


def noise(seed: str) -> bytes:
    return random.Random(seed).randbytes(_SIZE)


def judge(states: Sequence[tuple[bytes, ...]], want: bytes, show: Callable[..., bytes]) -> None:
    for contents in states:
        assert not differences(show(*contents), [want], "the disk")
        assert not look_at(contents[0]).faults


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
def test_rebasing(cluster: int, image: Image) -> None:
    old, new = noise("old")[: 250 << 10], bytearray(noise("new"))
    new[: 10 << 10] = old[: 10 << 10]
    make_memory(f"memory:old-{cluster}", old)
    make_memory(f"memory:new-{cluster}", bytes(new))
    options = f"cluster_size={cluster}"
    start = image(options, "write -P 3 30k 7k", "write -z 100k 8k", below=f"memory:old-{cluster}")

    def show(content: bytes) -> bytes:
        with underlay.open_image(MemoryStorage(content), format="qcow2", gate=_GATE) as disk:
            return disk.read_bytes(0, disk.size)

    want = show(start)
    journal = Journal((start,))
    memory = MemoryStorage(start)
    recorder = Recorder(memory, journal)
    done = rebase(recorder, f"memory:new-{cluster}", backing_format="raw", gate=_GATE)
    assert done.data
    assert done.zeroed
    found = [state.contents for state in crash_states(journal, chance_of(cluster), _EFFORT)]
    assert len(found) > 20
    judge(found, want, show)
    assert show(content_of(memory)) == want
    assert b"memory:new" in content_of(memory)[:1024]


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
def test_committing(cluster: int, image: Image) -> None:
    base = image("cluster_size=4096", "write -P 1 0 80k")
    top = image(
        f"cluster_size={cluster}",
        "write -P 2 10k 60k",
        "write -z 70k 20k",
        "write -P 3 150k 30k",
        size=_SIZE + (32 << 10),
    )

    def show(content: bytes, below: bytes) -> bytes:
        with (
            underlay.open_image(MemoryStorage(below), format="qcow2") as lower,
            underlay.open_image(MemoryStorage(content), format="qcow2", backing=lower) as disk,
        ):
            return disk.read_bytes(0, disk.size)

    want = show(top, base)
    journal = Journal((top, base))
    memory = MemoryStorage(top), MemoryStorage(base)
    recorders = [Recorder(one, journal, file=file) for file, one in enumerate(memory)]
    with (
        underlay.open_image(recorders[1], format="qcow2", writable=True) as lower,
        underlay.open_image(recorders[0], format="qcow2", backing=lower, writable=True) as disk,
    ):
        assert commit(disk).emptied
    found = [state.contents for state in crash_states(journal, chance_of(cluster), _EFFORT)]
    assert len(found) > 20
    judge(found, want, show)
    assert not any(look_at(below).faults for _, below in found)
    assert show(found[-1][0], content_of(memory[1])) == want
